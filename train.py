"""Train any model on any data set: one loop, read top to bottom in `train`.

    python train.py --model ssn --data shapes --quick          # about a minute on two CPU cores
    python train.py --model ssn --data lidc --device cuda      # the paper's model and settings
    python train.py --resume runs/ssn-lidc-0                   # goes on where it stopped
    torchrun --nproc_per_node=4 train.py --model ssn --data lidc --device cuda

A run is a folder, runs/<model>-<data>-<seed>/ unless --out says otherwise:
    config.json   every setting, package versions
    split.json    the cases of every part; --data-args split_file=... takes it for another run
    log.jsonl     an object every 50 steps, and one every validation; curves.png draws it
    last.pt       the latest checkpoint; best.pt the one of lowest validation GED
and at the end what evaluate.py writes for best.pt.

All randomness of step t is a function of (seed, t) alone, so a run that was killed at any moment
and resumed gives the same weights, bit for bit on a CPU, as one that was not; and W processes with
--batch-size B see the rows and the noise that one process with the same B would see.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data
import evaluate
from analysis.pictures import plot_curves
from common import Progress, UserError, key_values, start_processes
from models import MODELS, build, distribute, load_checkpoint, place, save
from sources.files import write_text


LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds, at most, between two checkpoints
VALIDATION_CASES = 256  # at most, spread evenly over the validation split
QUICK_CASES, QUICK_SAMPLES = 64, (1, 4, 8, 16)  # with --quick: these, and no 100 samples at the end

# What decides a run's result. A resumed run must agree on all of it but the length.
SETTINGS = dict(model="ssn", data="shapes", path=None, steps=None, batch_size=None, lr=None, seed=0,
                precision="fp32", image_size=None, annotators="all", augment=True, quick=False,
                model_args={}, data_args={})


def parse(argv=None) -> argparse.Namespace:
    """The command line; options not given are None, so that --resume can fill them in."""
    p = argparse.ArgumentParser(description=__doc__, argument_default=None,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help=f"one of: {' '.join(MODELS)} (default ssn)")
    p.add_argument("--data", help=f"one of: {' '.join(data.DATASETS)} (default shapes)")
    p.add_argument("--path", help="file or folder of the data set (default datasets/<data>)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--steps", type=int, help="updates of the weights (default: the paper's)")
    p.add_argument("--batch-size", type=int, help="cases a step, over all processes")
    p.add_argument("--lr", type=float, help="learning rate (default: the paper's)")
    p.add_argument("--seed", type=int)
    p.add_argument("--precision", choices=["fp32", "bf16"], help="bf16: autocast")
    p.add_argument("--compile", action="store_true", help="torch.compile the loss")
    p.add_argument("--image-size", type=int, help="crop (training: at random) or pad to this side")
    p.add_argument("--annotators", help="readers to learn from: all, or numbers like 0 or 1,2")
    p.add_argument("--no-augment", dest="augment", action="store_const", const=False,
                   help="leave the data set's augmentation out")
    p.add_argument("--model-args", nargs="+", metavar="K=V", help="fields of the model's config")
    p.add_argument("--data-args", nargs="+", metavar="K=V", help="options of the data set")
    p.add_argument("--out", help="the run's folder (default runs/<model>-<data>-<seed>)")
    p.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with a run")
    p.add_argument("--quick", action="store_const", const=True,
                   help="a narrow model and few steps: one to three minutes on two CPU cores")
    args = p.parse_args(argv)
    args.model_args = args.model_args and key_values("--model-args", args.model_args)
    args.data_args = args.data_args and key_values("--data-args", args.data_args)
    return args


# ----------------------------------------------------------------------- model and checkpoints


# ------------------------------------------------------------------------------------ settings


def settle(args) -> tuple[dict, Path]:
    """(every setting of the run, its folder); refuses to overwrite a run or to resume another."""
    given = {key: value for key in SETTINGS if (value := getattr(args, key)) is not None}
    if args.resume:
        named = args.resume if args.resume is not True else args.out
        folder = Path(named or default_folder(SETTINGS | given))
        try:
            settings = json.loads((folder / "config.json").read_text())["settings"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"--resume {folder}: no run there (config.json is missing or broken); "
                            "leave --resume out to begin one") from None
        for key, value in given.items():
            if key not in ("steps", "path") and plain(value) != settings[key]:
                raise UserError(f"--resume {folder}: {key} was {settings[key]} there and is "
                                f"{value} now; leave it out, or begin another run with --out")
        return settings | plain(given), folder
    settings = SETTINGS | given
    folder = Path(args.out or default_folder(settings))
    if (folder / "last.pt").exists():
        raise UserError(f"{folder} holds a run already: --resume goes on with it, --out DIR begins "
                        "another beside it")
    return settings, folder


def default_folder(settings) -> str:
    """Where a run goes without --out."""
    return "runs/{model}-{data}-{seed}".format(**settings)


def plain(value):
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def learning_rate(step: int, training: dict) -> float:
    """Piecewise constant: `lr` times the factor of the last of `lr_drops` (step, factor) passed.

    Steps are absolute, so N steps and N more are the same as 2 N.
    """
    factors = [f for first, f in training.get("lr_drops", ()) if step >= first]
    return training["lr"] * (factors[-1] if factors else 1.0)


# --------------------------------------------------------------------------- several processes


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: else an eighth of a CPU step goes into page faults.

    Large tensors would be mapped and unmapped at every step. Elsewhere than on Linux, nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# ------------------------------------------------------------------------------------ the loop


def train_step(loss_of, optimizer, image, label, lr, autocast):
    """One update; returns the terms of the loss and the gradient's norm, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        loss, terms = loss_of(image, label)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))  # infinite: measures, clips nothing
    optimizer.step()
    return {"loss": loss.detach(), **terms, "gradient": norm}


class Stop:
    """SIGTERM and Ctrl-C ask the loop to save and stop; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        """The handler of the first signal."""
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Signals do what they did before, now that there is nothing to save."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, device) -> bool:
        """True on every process once one was asked, so that none waits for another for ever."""
        if not dist.is_initialized():
            return bool(self.signal)
        asked = torch.tensor(self.signal, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.signal = int(asked)
        return bool(self.signal)


class Terms:
    """The mean of every term since the last log, and the first step at which one was not finite.

    Lives on the device: nothing waits for it until it is read.
    """

    def __init__(self):
        self.sum, self.count, self.bad = None, 0, None

    def add(self, step: int, terms: dict) -> None:
        """Count in the terms of one step, tensors on the device."""
        self.names = list(terms)
        values = torch.stack([v.detach().float().reshape(()) for v in terms.values()])
        if self.sum is None:
            self.sum, self.bad = torch.zeros_like(values), torch.full_like(values, float("inf"))
        self.sum += values
        self.count += 1
        self.bad = torch.where(values.isfinite(), self.bad, self.bad.clamp(max=step))

    def check(self) -> None:
        """UserError naming the step and the term of the first non-finite value, if there is one."""
        if self.bad is not None and (step := self.bad.min().item()) < float("inf"):
            # of the terms that failed together, the loss and the gradient are the consequence
            failed = [n for n, b in zip(self.names, self.bad.tolist()) if b == step]
            name = min(failed, key=["loss", "gradient"].count)
            raise UserError(f"step {int(step)}: {name} is not finite (it failed first); the last "
                            "good checkpoint stands. Try a lower --lr, or look at the images' "
                            "scale")

    def read(self) -> dict:
        """{name: mean since the last read}, averaged over processes."""
        self.check()
        mean = self.sum / self.count
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.sum.zero_()
        self.count = 0
        return dict(zip(self.names, mean.tolist()))


def train(settings: dict, folder: Path, device_name="auto", compile=False, resume=False) -> int:
    """Run or resume one run; returns 0, or 128 + the signal that stopped it."""
    stop = Stop()
    keep_freed_memory()
    device, rank, world = start_processes(device_name)
    main = rank == 0

    train_split, val_split = data.load(settings["data"], ("train", "val"), settings["path"],
                                       **settings["data_args"])
    model = place(first_model(settings, train_split), device)
    training = model.TRAINING | (model.QUICK_TRAINING if settings["quick"] else {})
    training |= {k: settings[k] for k in ("steps", "batch_size", "lr") if settings[k] is not None}
    steps = training["steps"]
    if min(steps, training["batch_size"], training["lr"]) <= 0:
        raise UserError("--steps, --batch-size and --lr are above 0")
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[training["optimizer"]]
    momentum = dict(momentum=training["momentum"]) if "momentum" in training else {}
    optimizer = kind(model.parameters(), lr=training["lr"], fused=True,
                     weight_decay=training["weight_decay"], **momentum)

    start, best = 0, float("inf")
    if resume and (folder / "last.pt").exists():
        content = load_checkpoint(folder / "last.pt")
        if content["model"] != settings["model"] or \
                plain(content["config"]) != plain(dataclasses.asdict(model.config)):
            raise UserError(f"{folder / 'last.pt'}: holds a {content['model']} of another config "
                            "than the run's config.json; begin another run with --out")
        model.load_state_dict(content["state"])
        optimizer.load_state_dict(content["optimizer"])
        start, best = content["step"], content["best"]

    size = settings["image_size"]
    if size is not None:
        val_split = data.center(val_split, size)
    train_split = train_split.to(device)
    every = max(1, len(val_split) // (QUICK_CASES if settings["quick"] else VALIDATION_CASES))
    val_split = val_split.subset(range(0, len(val_split), every)).to(device)
    stream = data.batches(
        train_split, training["batch_size"], settings["seed"], start=start, size=size, rank=rank,
        world=world, annotators=readers(settings["annotators"]),
        augmentation=data.DATASETS[settings["data"]].augmentation
        if settings["augment"] else None)

    if main:
        begin_files(folder, settings, training, model, start)
        write_text(folder / "split.json", json.dumps(train_split.parts, indent=1) + "\n")
    loss_of = distribute(model, device) if world > 1 else model
    missing = compile and lacks_compiler(device)
    if compile and not missing:
        loss_of = compiled(loss_of)
    autocast = torch.autocast(device.type, torch.bfloat16) if settings["precision"] == "bf16" \
        else contextlib.nullcontext()
    progress = Progress(steps, start, quiet=not main)
    progress.say(f"{settings['model']} on {settings['data']}: {len(train_split)} training cases, "
                 f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}"
                 + (f", {world} processes" if world > 1 else "")
                 + (f", going on at step {start}" if resume else "") + f" -> {folder}")
    if missing:
        progress.say(f"--compile: {missing}; going on without it, at the usual speed")
    terms, saved_at, logged_at = Terms(), time.monotonic(), time.monotonic()
    validate_every = max(LOG_EVERY, min(5000, steps // 10))
    model.train()
    step = start
    while True:
        finished = step >= steps
        stopping = (step % LOG_EVERY == 0 or world == 1) and stop.agreed(device)
        validating = step > start and (step % validate_every == 0 or finished) and not stopping

        if validating:
            terms.check()
            ged = evaluate.score(model, val_split, full=False)["ged_16"].mean().item()
        if main and validating:
            append(folder / "log.jsonl", {"step": step, "val_ged_16": ged})
            progress.update(step, f"validation GED {ged:.4f}", line=True)
            if ged < best:
                best = ged
                save(folder / "best.pt", settings["model"], model, optimizer, step, best)
            plot_curves(folder / "curves.png", read_log(folder))

        if main and (validating or stopping or time.monotonic() - saved_at > SAVE_EVERY):
            terms.check()  # a checkpoint is only ever a good one
            save(folder / "last.pt", settings["model"], model, optimizer, step, best)
            saved_at = time.monotonic()

        if finished or stopping:
            break

        torch.manual_seed(settings["seed"] * 1_000_003 + step)
        image, label = next(stream)
        result = train_step(loss_of, optimizer, image, label, learning_rate(step, training),
                            autocast)
        step += 1

        terms.add(step, result)
        progress.update(step)
        if step % LOG_EVERY == 0 or step in (1, steps):
            count, means, now = terms.count, terms.read(), time.monotonic()
            if main:
                append(folder / "log.jsonl",
                       {"step": step, "lr": learning_rate(step - 1, training), **means,
                        "seconds_per_step": (now - logged_at) / count})
                progress.update(step, f"loss {means['loss']:.4g}", line=True)
            logged_at = time.monotonic()

    stop.restore()
    del loss_of  # freed after its group is gone, DistributedDataParallel can hang
    gc.collect()
    if finished:
        samples = QUICK_SAMPLES if settings["quick"] else evaluate.SAMPLES
        if world > 1:
            dist.barrier()  # until best.pt is there
        evaluate.report(folder, samples=samples, device=device)
    else:
        progress.say(f"stopped and saved at step {step}; go on with: "
                     f"python train.py --resume {folder}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0 if finished else 128 + stop.signal


def first_model(settings, split) -> nn.Module:
    """The run's model for this data, its initial weights a function of the seed."""
    Model = MODELS.get(settings["model"])
    fields = dict(in_channels=split.images.shape[1], num_classes=split.num_classes)
    if Model and hasattr(Model.Config, "dims"):
        fields["dims"] = split.images.dim() - 2
    if Model and settings["quick"]:
        fields |= Model.QUICK_CONFIG
    torch.manual_seed(settings["seed"])
    return build(settings["model"], fields | settings["model_args"])


def compiled(loss_of):
    """torch.compile, with eager mode's random numbers: a run with it is the same as one without."""
    return torch.compile(loss_of, options={"fallback_random": True})


def lacks_compiler(device) -> str | None:
    """What torch.compile needs and this machine lacks, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        names = [os.environ.get("CC"), "gcc", "clang", "cc"]
        return None if any(map(shutil.which, filter(None, names))) else "no C compiler was found"
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return None if shutil.which(name) else f"no C++ compiler ({name}) was found"


def readers(text: str):
    """"all" -> None, "0" -> (0,), "1,2" -> (1, 2)."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--annotators {text}: all, or numbers like 0 or 1,2") from None


def begin_files(folder, settings, training, model, start) -> None:
    """config.json, and log.jsonl cut back to the step the run goes on from."""
    folder.mkdir(parents=True, exist_ok=True)
    import matplotlib
    import numpy

    config = dict(settings=settings, training=training, config=dataclasses.asdict(model.config),
                  parameters=sum(p.numel() for p in model.parameters()),
                  versions=dict(python=platform.python_version(), torch=torch.__version__,
                                numpy=numpy.__version__, matplotlib=matplotlib.__version__))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for half in folder.glob(".*.tmp"):  # of a write that a kill cut short
        half.unlink()
    log = folder / "log.jsonl"
    kept = [line for line in read_log(folder) if line["step"] <= start]
    write_text(log, "".join(json.dumps(line) + "\n" for line in kept))


def read_log(folder) -> list[dict]:
    """The log's entries; a last line that a kill cut short is left out."""
    entries = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in (Path(folder) / "log.jsonl").read_text().splitlines():
            entries.append(json.loads(line))
    return entries


def append(path, entry: dict) -> None:
    """One more line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def main(argv=None) -> int:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        args = parse(argv)
        settings, folder = settle(args)
        return train(settings, folder, args.device, args.compile, bool(args.resume))
    except (UserError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.strerror}{f' ({error.filename})' if error.filename else ''}; "
              "what was saved before stands", file=sys.stderr)
        return 2
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        print("error: batch norm cannot learn from a single value a channel: raise --batch-size or "
              "--image-size", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of memory: lower --batch-size or --image-size", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
