"""Train any model on any data set: one loop, read top to bottom in `train`.

    python train.py --model ssn --data shapes --quick          # about two minutes on two cores
    python train.py --model ssn --data lidc --device cuda      # the paper's model and settings
    python train.py --resume runs/ssn-lidc-0                   # also with other --steps and --lr
    torchrun --nproc_per_node=4 train.py --model ssn --data lidc --device cuda

A run is a folder, runs/<model>-<data>-<seed>/ unless --out says otherwise:
    config.json   every setting, package versions
    split.json    the cases of every split; --data-args split_file=... uses it for another run
    log.jsonl     an object every 50 steps, and one every validation; curves.png draws it
    last.pt       the latest checkpoint; best.pt the one of lowest validation GED
                  (Rand error for sets with instances)
    lock          held while a process trains here, so that no second one does
and at the end what evaluate.py writes for best.pt.

All randomness of step t is a function of (seed, t) alone: a run that was killed and resumed with
the same number of processes gives the same weights, bit for bit on a CPU, as one that was not, and
several processes see the rows and the noise of a batch that one process would see.
"""

import argparse
import contextlib
import ctypes
import gc
import math
import os
import signal
import sys
import time
from pathlib import Path

# Threads that wait for work sleep instead of spinning, unless the user has chosen otherwise: beside
# another job on the same cores, spinning made a step take seven times as long. OpenMP reads this
# once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from torch import nn

import data
import evaluate
from analysis.pictures import plot_curves
from common import (Progress, UserError, is_first, key_values, out_of_memory, set_tf32,
                    start_processes)
from models import (MODELS, Recorded, build, check_fields, compiled, distribute, lacks_compiler,
                    learning_rate, make_optimizer, place, published)
from sources.base import check_known
from sources.runs import (CHANGEABLE, SETTINGS, append, begin, check_free, own, plain, read_config,
                          read_log, restore, save, writing)

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds, at most, between two checkpoints
VALIDATION_CASES = 256  # at most, spread evenly over the validation split
QUICK_CASES, QUICK_SAMPLES = 64, (1, 4, 8, 16)  # --quick: validation cases, samples of the report
LARGEST_RMS = 1000  # of images; above it, KLs take thousands of steps to come down
PRECISIONS = "fp32", "tf32", "bf16"
LIMITS = dict(steps=(1, 10**9), batch_size=(1, 10**5), image_size=(1, 10**4), seed=(0, 2**31 - 1))


def parse(argv=None) -> argparse.Namespace:
    """The command line; options not given are None, so that --resume can fill them in."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--model", help=f"one of: {' '.join(MODELS)} (default ssn)")
    p.add_argument("--data", help=f"one of: {' '.join(data.DATASETS)} (default shapes)")
    p.add_argument("--path", help="file or folder of the data set (default datasets/<data>)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--steps", type=int, help="updates of the weights (default: the paper's)")
    p.add_argument("--batch-size", type=int, help="cases per step, over all processes")
    p.add_argument("--lr", type=float, help="learning rate (default: the paper's)")
    p.add_argument("--lr-drops", nargs="+", metavar="STEP:FACTOR",
                   help="from STEP on, FACTOR times --lr (default: the paper's schedule, or "
                   "that of --quick, which is stretched if --steps is larger)")
    p.add_argument("--seed", type=int, help="of weights, batches and noise (default 0)")
    p.add_argument("--precision", choices=PRECISIONS,
                   help="fp32 (default); tf32: matrix products and convolutions of a GPU round "
                   "their inputs to 10 bits; bf16: autocast")
    p.add_argument("--compile", action="store_true", help="torch.compile the loss")
    p.add_argument("--cuda-graphs", action="store_true",
                   help="record a step's kernels once and start them together from then on: faster "
                   "where a GPU waits for Python, as it does for small models and batches")
    p.add_argument("--image-size", type=int, help="crop or pad to this side: training at random "
                   "places, validation and test about the centre")
    p.add_argument("--annotators", metavar="WHO",
                   help="learn from these: all, or names like anna,bob as `data.py show` prints "
                   "them; where annotators have no names, 0,1 and so on")
    p.add_argument("--no-augment", dest="augment", action="store_const", const=False,
                   help="train without the data set's augmentation")
    p.add_argument("--model-args", nargs="+", metavar="K=V", help="fields of the model's config")
    p.add_argument("--data-args", nargs="+", metavar="K=V", help="options of the data set")
    p.add_argument("--out", help="the run's folder (default runs/<model>-<data>-<seed>)")
    p.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="resume a run")
    p.add_argument("--quick", action="store_const", const=True,
                   help="a narrow model and few steps, with a batch size and learning rate for it: "
                   "one to three minutes on two CPU cores")
    args = p.parse_args(argv)
    args.model_args = args.model_args and key_values("--model-args", args.model_args)
    args.data_args = args.data_args and key_values("--data-args", args.data_args)
    return args


# ------------------------------------------------------------------------------------ settings


def settle(args) -> tuple[dict, Path]:
    """Return every setting of the run and its folder. Raises UserError for settings that make no
    sense, and where --resume would go on with other settings than those of the run."""
    given = {key: value for key in SETTINGS if (value := getattr(args, key)) is not None}
    settings = {key: default for key, (_, default) in SETTINGS.items()} | given
    named = args.resume if isinstance(args.resume, str) else args.out
    if "" in (args.resume, args.out, args.path):  # a shell's unset variable
        raise UserError("--resume, --out or --path is empty: give a path, or leave the option out")
    if isinstance(args.resume, str) and args.out:
        raise UserError(f"--resume {args.resume} writes to its own folder: leave out --out")
    folder = Path(named or "runs/{model}-{data}-{seed}".format(**settings))
    if "\0" in str(folder):
        raise UserError(f"--out {str(folder)!r}: no file name holds a null character")
    if args.resume:
        before = read_config(folder)["settings"]
        for key, value in plain(given).items():
            if key not in CHANGEABLE and value != before[key]:
                raise UserError(f"--resume {folder}: {key} was {before[key]} there and is "
                                f"{value} now; leave it out, or begin another run with --out")
        settings = before | plain(given)
    check_known("--precision", settings["precision"], PRECISIONS)
    for key, (low, high) in LIMITS.items():
        if settings[key] is not None and not low <= settings[key] <= high:
            option = "--" + key.replace("_", "-")
            raise UserError(f"{option} {settings[key]}: give a whole number from {low} to {high}")
    if settings["lr"] is not None and not 0 < settings["lr"] < float("inf"):
        raise UserError(f"--lr {settings['lr']}: give a finite number above 0")
    return settings, folder


def annotators(text: str, split) -> list[int] | None:
    """The numbers of the annotators named in `text`, like "anna,bob"; None for "all"."""
    if text == "all":
        return None
    numbers = {name: number for number, name in enumerate(split.annotators)}
    names = [name.strip() for name in text.split(",")]
    return [numbers[check_known("--annotators", name, numbers)] for name in names]


def lr_drops(texts: list[str]) -> list[tuple[int, float]]:
    """["1000:0.1"] -> [(1000, 0.1)], sorted."""
    try:
        pairs = [text.split(":") for text in texts]
        drops = sorted((int(step), float(factor)) for step, factor in pairs)
        if all(0 < factor < float("inf") for _, factor in drops):
            return drops
    except (ValueError, AttributeError):
        pass  # said below
    raise UserError(f"--lr-drops {' '.join(map(str, texts))}: write STEP:FACTOR, both numbers, "
                    "like 1000:0.1")


def first_model(settings, split) -> nn.Module:
    """The run's model for this data, its initial weights a function of the seed. UserError where
    the images' scale is far from what any model expects."""
    rms = float(torch.linalg.vector_norm(split.images)) / split.images.numel() ** 0.5
    if rms > LARGEST_RMS:
        raise UserError(f"{settings['data']}: pixels of about {rms:.3g} are too large to train on: "
                        "bring the images to about [0, 1], or to mean 0 and deviation 1, or store "
                        "them as uint8 or uint16")
    fields = dict(in_channels=split.images.shape[1], num_classes=split.num_classes,
                  dims=split.images.dim() - 2) | published(settings["model"], settings["data"])[0]
    if settings["quick"]:
        fields |= MODELS[settings["model"]].QUICK_CONFIG
        if split.instances is not None:
            fields |= getattr(MODELS[settings["model"]], "QUICK_INSTANCES", {})
    given = settings["model_args"]
    for name in ("in_channels", "dims", "num_classes"):
        value, found = given.get(name, fields[name]), fields[name]
        more = name == "num_classes" and isinstance(value, int) and value > found  # is harmless
        if value != found and not more:
            raise UserError(f"--model-args {name}={value}: the data has {found}; leave it out")
    torch.manual_seed(settings["seed"])
    return build(settings["model"], fields | given)


def recipe(model, settings) -> dict:
    """How this run trains: the paper's settings, or those of --quick, overridden by those given.

    More steps than those of --quick stretch its schedule: a run of three times the length would
    otherwise spend most of its steps at the last and lowest learning rate.
    """
    _, elsewhere = published(settings["model"], settings["data"])
    training = model.TRAINING | (model.QUICK_TRAINING if settings["quick"] else elsewhere)
    training |= {k: settings[k] for k in ("steps", "batch_size", "lr") if settings[k] is not None}
    if settings["lr_drops"]:
        training |= dict(lr_drops=lr_drops(settings["lr_drops"]), poly_power=0)
    elif settings["quick"] and "lr_drops" in training:
        stretch = max(1, training["steps"] / model.QUICK_TRAINING["steps"])
        training |= dict(lr_drops=tuple((round(stretch * step), factor)
                                        for step, factor in training["lr_drops"]))
    return training


# ------------------------------------------------------------------------------------ the loop


def train_step(loss_of, optimizer, image, label, lr, autocast):
    """One update with `loss_of`, a model or a `Recorded` one; returns the terms of the loss and the
    gradient's norm, on the device."""
    optimizer.param_groups[0]["lr"] = lr
    if isinstance(loss_of, Recorded):
        loss, terms = loss_of(image, label)
    else:
        optimizer.zero_grad()
        with autocast:
            loss, terms = loss_of(image, label)
        loss.backward()
    parameters = optimizer.param_groups[0]["params"]
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm = torch.linalg.vector_norm(torch.stack(norms))  # torch.nn.utils has it from 2.6 on
    optimizer.step()
    return {"loss": loss.detach(), **terms, "gradient": norm}


class Stop:
    """SIGTERM, Ctrl-C and a closed terminal ask the loop to save and stop; a second signal stops at
    once."""

    def __init__(self):
        self.signal = 0
        asking = [signal.SIGTERM, signal.SIGINT]
        # a closed terminal, unless nohup told the process to ignore it; Windows has no such signal
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.ask) for number in asking}

    def ask(self, number, frame):
        """The handler of the first signal."""
        self.signal = number
        self.restore()
        if number == getattr(signal, "SIGHUP", None):  # shell and system both send it
            signal.signal(number, signal.SIG_IGN)

    def restore(self):
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, device) -> bool:
        """True on every process once one was asked, so that none waits forever for another."""
        if dist.is_initialized():
            asked = torch.tensor(self.signal, device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.signal = int(asked)
        return self.signal > 0


class Terms:
    """The mean of every term since the last log, and the first step at which one was not finite;
    on the device, so that no step waits for them."""

    def __init__(self):
        self.sum, self.count, self.bad, self.since = 0, 0, None, time.monotonic()

    def add(self, step: int, terms: dict) -> None:
        """Count in the terms of one step."""
        self.names = list(terms)
        values = torch.stack([v.detach().float().reshape(()) for v in terms.values()])
        if self.bad is None:
            self.bad = torch.full_like(values, float("inf"))
        self.sum, self.count = self.sum + values, self.count + 1
        self.bad = torch.where(values.isfinite(), self.bad, self.bad.clamp(max=step))

    def failed(self) -> str | None:
        """The step and the term of the first non-finite value, if there is one."""
        if self.bad is None or (step := self.bad.min().item()) == float("inf"):
            return None
        names = [name for name, bad in zip(self.names, self.bad.tolist()) if bad == step]
        # of the terms that failed together, the loss and the gradient are the consequence
        causes = [name for name in names if name not in ("loss", "gradient")]
        return f"step {step:.0f}: {(causes or names)[0]}"

    def read(self) -> dict:
        """{name: mean since the last read, over all processes}, and how many steps there were and
        how long one took."""
        mean = self.sum / self.count
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        now = time.monotonic()
        pace = dict(steps=self.count, seconds_per_step=(now - self.since) / self.count)
        self.sum, self.count, self.since = 0, 0, now
        return dict(zip(self.names, mean.tolist())) | pace


def refuse_non_finite(terms, model, step, folder) -> None:
    """Raise UserError where the loss, the gradient or a weight is not finite, so that it is never
    saved."""
    weights = [value for value in model.state_dict().values()
               if value.is_floating_point() and value.numel()]
    # the largest magnitudes: one operation a weight, which a GPU runs together
    finite = torch.stack(torch._foreach_norm(weights, math.inf)).isfinite().all()
    if failed := terms.failed() or (None if finite else f"step {step}: a weight"):
        advice = "nothing was saved: begin again with a lower --lr"
        if (folder / "last.pt").exists():
            advice = f"last.pt stands: --resume {folder} with a lower --lr"
        raise UserError(f"{failed} is not finite (it failed first); {advice}, or look at the "
                        "images' scale")


def load_splits(settings: dict, folder: Path, begun: bool) -> tuple:
    """The training split, of the annotators chosen, and the validation cases, both on the host."""
    if begun:  # the cases that split.json names
        train_split, val_split = evaluate.load_data(folder, settings, ("train", "val"))
    else:
        train_split, val_split = data.load(settings["data"], ("train", "val"), settings["path"],
                                           **settings["data_args"])
    if (chosen := annotators(settings["annotators"], train_split)) is not None:
        train_split = data.labelled_by(train_split, chosen)
    if settings["image_size"] is not None:
        val_split = data.center(val_split, settings["image_size"])
    every = max(1, len(val_split) // (QUICK_CASES if settings["quick"] else VALIDATION_CASES))
    return train_split, val_split.subset(range(0, len(val_split), every))


def describe(settings, split, model, device, world: int, start: int, folder: Path) -> str:
    """The first line that a run prints."""
    words = [f"{settings['model']} on {settings['data']}: {len(split)} training cases",
             split.drawn_by]
    if settings["annotators"] != "all":
        words.append(f"learning from {settings['annotators']}")
    words += [f"{sum(p.numel() for p in model.parameters()):,} parameters", str(device)]
    if world > 1:
        words.append(f"{world} processes")
    if start:
        words.append(f"resumed at step {start}")
    return f"{', '.join(words)} -> {folder}"


def train(settings: dict, folder: Path, device_name="auto", compile=False, resume=False,
          graphs=False) -> int:
    """Run or resume one run; returns 0, or 128 + the signal that stopped it."""
    check_fields(settings["model"], settings["model_args"])
    device, rank, world = start_processes(device_name)
    if graphs and (device.type != "cuda" or dist.is_initialized() or compile):
        raise UserError("--cuda-graphs needs one CUDA device, and works neither with torchrun nor "
                        "with --compile")
    stop = Stop()
    set_tf32(settings["precision"] == "tf32")

    last, best_file = folder / "last.pt", folder / "best.pt"
    begun = last if last.exists() or not best_file.exists() else best_file
    train_split, val_split = load_splits(settings, folder, resume and begun.exists())
    model = place(first_model(settings, train_split), device)
    val_split.num_classes = model.config.num_classes  # more than the data's with --model-args
    training = recipe(model, settings)
    optimizer = make_optimizer(model, training)
    if begun.exists() and not resume:  # told only once nothing else is wrong with the command
        raise UserError(f"{folder} holds a run already: --resume {folder} continues it, --out DIR "
                        "begins another beside it")
    start, best, steps, size = 0, float("inf"), training["steps"], settings["image_size"]
    if begun.exists():
        start, best = restore(begun, settings, model, optimizer)
    if not best_file.exists():  # deleted, or this run has not been validated yet
        best = float("inf")

    val_split = val_split.to(device)
    try:
        train_split = train_split.to(device)  # frees the copy on the host
    except torch.OutOfMemoryError:
        raise UserError(f"the training images take {train_split.images.nbytes / 2**30:.0f} GB, "
                        f"more than {device} has free: shrink them, name fewer cases in a "
                        "split_file, or use --device cpu") from None
    keep_freed_memory()
    stream = data.batches(
        train_split, training["batch_size"], settings["seed"], start=start, size=size,
        rank=rank, world=world,
        augmentation=data.DATASETS[settings["data"]].augmentation if settings["augment"] else None)

    if rank == 0:
        begin(folder, settings, training, model, train_split, start)
    progress = Progress(steps, start)
    progress.say(describe(settings, train_split, model, device, world, start, folder))
    loss_of = distribute(model, device) if world > 1 else model
    if compile and (missing := lacks_compiler(device)):
        progress.say(f"--compile: {missing}; training without it, at the usual speed")
    elif compile:
        loss_of = compiled(loss_of)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16",
                              cache_enabled=not graphs)
    if not train_split.parts.get("test"):
        progress.say("no test split: this run will be judged on its validation split")

    validate_every = max(LOG_EVERY, min(5000, steps // 10))
    terms, saved_at, stopping, step = Terms(), time.monotonic(), False, start
    model.train()
    while True:
        finished = step >= steps
        new = step > start or (start and best == float("inf"))
        validating = new and (step % validate_every == 0 or finished)
        saving = validating or stopping or time.monotonic() - saved_at > SAVE_EVERY
        paused = time.monotonic()
        if saving:
            refuse_non_finite(terms, model, step, folder)
        if validating:
            name, value = evaluate.validation_score(model, val_split)  # lower is better
            if rank == 0:
                if step > start:  # else the log has it
                    append(folder / "log.jsonl", {"step": step, f"val_{name}": value})
                progress.update(step, f"validation {name} {value:.4f}", line=True)
                if value < best:
                    best = value
                    with writing(best_file, step):
                        save(best_file, settings["model"], model, optimizer, step, best)

        if saving:
            saved_at = time.monotonic()
            if rank == 0:
                with writing(last, step):
                    save(last, settings["model"], model, optimizer, step, best)
                with writing(folder / "curves.png", step):
                    plot_curves(folder / "curves.png", read_log(folder))
        terms.since += time.monotonic() - paused  # seconds_per_step is training alone

        if finished or stopping:
            break

        torch.manual_seed(settings["seed"] * 1_000_003 + step)
        image, label = next(stream)
        if graphs and step == start:
            loss_of = Recorded(model, image, label, autocast)
        lr = learning_rate(step, training)
        terms.add(step + 1, train_step(loss_of, optimizer, image, label, lr, autocast))
        step += 1

        progress.update(step)
        stopping = (step % LOG_EVERY == 0 or not dist.is_initialized()) and stop.agreed(device)
        if step % LOG_EVERY == 0 or step in (1, steps) or stopping:
            refuse_non_finite(terms, model, step, folder)
            means = terms.read()
            if rank == 0:
                append(folder / "log.jsonl", {"step": step, "lr": lr, **means})
                progress.update(step, f"loss {means['loss']:.4g}", line=True)

    stop.restore()
    del loss_of  # a recorded graph's memory; DistributedDataParallel can hang if it is freed later
    optimizer.zero_grad()
    gc.collect()
    if stopping:
        progress.say(f"stopped and saved at step {step}; resume with: "
                     f"python train.py --resume {folder}")
    else:
        if hasattr(model, "advice") and (advice := model.advice(read_log(folder))):
            progress.say(advice)
        set_tf32(False)  # as evaluate.py
        if world > 1:
            dist.barrier()  # until best.pt is there
        try:
            evaluate.report(folder, split="test" if train_split.parts.get("test") else "val",
                            samples=QUICK_SAMPLES if settings["quick"] else evaluate.SAMPLES,
                            device=device)
        except (KeyboardInterrupt, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            stands = (f"training is finished and best.pt stands: python train.py --resume {folder} "
                      "makes the report")
            if isinstance(error, KeyboardInterrupt):
                progress.say(f"stopped; {stands}")
                return 130
            raise UserError(f"{' '.join(str(error).split())[:200]}; {stands}") from None
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 128 + stop.signal if stopping else 0


# ------------------------------------------------------------------------------- the machine


def keep_freed_memory() -> None:
    """On Linux, let the process keep the memory that it frees: getting it back from the system
    page by page took an eighth of a step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # gives back what reading the data took
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# ------------------------------------------------------------------------ the command line


def main(argv=None) -> int:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        args = parse(argv)
        settings, folder = settle(args)
        if not args.resume:
            check_free(folder)
        with own(folder) if is_first() else contextlib.nullcontext():
            return train(settings, folder, args.device, args.compile, bool(args.resume),
                         args.cuda_graphs)
    except UserError as error:
        text = str(error)
    except OSError as error:  # a folder that may not be written
        text = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
    except (RuntimeError, ValueError, MemoryError) as error:
        if out_of_memory(error):
            text = "out of memory: lower --batch-size or --image-size"
        elif "more than 1 value per channel" in str(error):
            text = ("batch norm cannot learn from a single value a channel: raise --batch-size or "
                    "--image-size")
        else:
            raise
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
