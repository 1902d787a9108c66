"""The files of a run, runs/<model>-<data>-<seed>/: settings, lock, log and checkpoints.

Every file except the log is written completely or not at all. A full disk ends in a one-line error,
which says whether an earlier checkpoint is intact.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import matplotlib
import numpy as np
import torch

from common import UserError
from sources.files import holds, write_atomically, write_text

# ------------------------------------------------------------------------- settings and lock

WRITTEN = "config.json", "split.json", "log.jsonl"  # when a run begins
CHANGEABLE = ("steps", "path", "lr", "lr_drops")  # what --resume may give anew
# What decides a run's result, in config.json's "settings": (types, default).
SETTINGS = dict(
    model=(str, "ssn"), data=(str, "shapes"), path=(str | None, None), steps=(int | None, None),
    batch_size=(int | None, None), lr=(float | int | None, None), lr_drops=(list | None, None),
    seed=(int, 0), precision=(str, "fp32"), image_size=(int | None, None), annotators=(str, "all"),
    augment=(bool, True), quick=(bool, False), model_args=(dict, {}), data_args=(dict, {}))


def read_config(folder: Path) -> dict:
    """Returns the run's config.json, with defaults for settings that it lacks. UserError where it
    is missing or broken."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["settings"]["data"]  # without which there is no run
        given = {name: default for name, (_, default) in SETTINGS.items()} | config["settings"]
        for name, (kinds, _) in SETTINGS.items():
            if not isinstance(given[name], kinds) or (given[name] is True and kinds is not bool):
                raise TypeError(name)  # True would count as the number 1
        return config | {"settings": given, "changes": list(config.get("changes", []))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        there = holds(folder if folder.is_dir() else folder.parent)
        raise UserError(f"{folder}: no run there (config.json is missing or broken); give a folder "
                        f"that train.py wrote; {there}") from None


def read_split(folder: Path) -> dict[str, list]:
    """Returns the run's split.json, {split: names of its cases}, or {} without one."""
    file = folder / "split.json"
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return {split: list(map(str, found[split])) for split in found}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file}: broken; without it, the run's cases are not known") from None


def plain(value):
    """Returns `value` as it comes back from JSON, with lists for tuples."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def own(folder: Path):
    """Holds the folder's lock, so that no other run writes here. It ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{folder} is in use by {lock.read()}; wait for it to end, or choose "
                            "another folder with --out") from None
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may have been moved
                if list(folder.iterdir()) == [folder / "lock"]:  # a mistake: nothing was begun
                    (folder / "lock").unlink()
                    folder.rmdir()


def check_free(folder) -> None:
    """Raises UserError if a new run in this folder would replace files that are of no run."""
    with contextlib.suppress(UserError):
        read_config(folder)
        return
    for name in (*WRITTEN, "lock"):
        file = folder / name
        # a lock of ours says "process 123 on host", or the first bytes of it if the disk was full
        ours = name == "lock" and file.is_file() and b"process ".startswith(file.read_bytes()[:8])
        if file.exists() and not ours:
            raise UserError(f"{folder} holds a {name}, but no run: give another folder as --out")


def begin(folder, settings, training, model, split, start) -> None:
    """Writes config.json and split.json, and cuts log.jsonl back to the step `start`."""
    for name in (*WRITTEN, "last.pt", "best.pt", "curves.png"):
        for half in folder.glob(f".{name}.*.tmp"):  # of a write that a kill cut short
            half.unlink()
    changes = read_config(folder)["changes"] if start else []
    changes.append({"step": start} | {key: settings[key] for key in CHANGEABLE})
    versions = {package.__name__: package.__version__ for package in (torch, np, matplotlib)}
    config = dict(settings=settings, training=training, config=dataclasses.asdict(model.config),
                  parameters=sum(p.numel() for p in model.parameters()), changes=changes,
                  versions=dict(python=platform.python_version(), **versions))
    log = [json.dumps(entry) + "\n" for entry in read_log(folder) if entry["step"] <= start]
    texts = (json.dumps(config, indent=2) + "\n", json.dumps(split.parts, indent=1) + "\n",
             "".join(log))
    for name, text in zip(WRITTEN, texts):
        if start and name == "split.json" and (folder / name).exists():
            continue  # it may name cases of the test split that are not there now
        with writing(folder / name, start):
            write_text(folder / name, text)


@contextlib.contextmanager
def writing(path, step):
    """Turns a full disk into one line: what could not be written, when, and what stands."""
    try:
        yield
    except OSError as error:
        stands = "last.pt stands" if (path.parent / "last.pt").exists() else "nothing was saved yet"
        raise UserError(f"cannot write {path} at step {step}: {error.strerror or error}; {stands}; "
                        f"make room, then --resume {path.parent}") from error


def append(path, entry: dict) -> None:
    """Appends a line of JSON."""
    with writing(path, entry["step"]), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(folder) -> list[dict]:
    """Returns the log's entries, except for lines that a kill or a full disk cut short."""
    entries, log = [], folder / "log.jsonl"
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            numbers = isinstance(entry, dict) and {type(value) for value in entry.values()}
            if numbers and numbers <= {int, float} and "step" in entry:
                entries.append(entry)
    return entries


# -------------------------------------------------------------------------------- checkpoints

MOMENTS = {torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
           torch.optim.SGD: ("momentum_buffer",),
           torch.optim.RMSprop: ("step", "square_avg", "momentum_buffer")}


def save(path, name, model, optimizer, step, best) -> None:
    """Writes a checkpoint that torch.load reads, whole or not at all; OSError where there is no
    room."""
    content = dict(model=name, config=dataclasses.asdict(model.config), state=model.state_dict(),
                   optimizer=optimizer.state_dict(), step=step, best=best)
    buffer = io.BytesIO()  # torch.save to a full disk raises many kinds of errors
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path) -> dict:
    """Reads what `save` wrote, and checks it by the checksums in it. Runs nothing in it."""
    if not Path(path).is_file():
        folder = Path(path).parent
        advice = (f"it has not been validated yet; train.py --resume {folder}, or --weights last"
                  if (folder / "last.pt").is_file() else "train one with train.py")
        raise UserError(f"{path}: no such checkpoint; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("it is compressed")  # and could unpack to any size
            if damaged := archive.testzip():
                raise ValueError(f"damaged at {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in dict(model=str, config=dict, state=dict, optimizer=dict, step=int,
                              best=float).items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is a {type(content[key]).__name__}")
        json.dumps(content["config"])  # only numbers, texts and tuples of them
        return content
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of train.py ({reason})") from error


def restore(path, settings, model, optimizer) -> tuple[int, float]:
    """Loads a checkpoint of this run; returns its step and the best validation GED so far."""
    content = load_checkpoint(path)
    if (content["model"], plain(content["config"])) != (
            settings["model"], plain(dataclasses.asdict(model.config))):
        raise UserError(f"{path}: holds a {content['model']} of another config than the run's "
                        "config.json; begin another run with --out")
    check_state(path, model, content["state"])
    model.load_state_dict(content["state"])
    restore_optimizer(path, optimizer, content["optimizer"])
    return content["step"], content["best"]


def check_state(path, model, state: dict) -> None:
    """Raises UserError unless `state` has the model's names, with their shapes and dtypes."""
    expected = model.state_dict()
    for name in [*expected, *state]:
        if not same_kind(state.get(name), expected.get(name)):
            raise UserError(f"{path}: its weights do not fit the model of its config; the first "
                            f"that differs is {str(name)[:80]}")


def same_kind(found, expected: torch.Tensor | None) -> bool:
    """Tells whether `found` is an ordinary tensor of the shape and dtype of `expected`."""
    return (isinstance(found, torch.Tensor) and found.layout == torch.strided
            and expected is not None
            and (found.shape, found.dtype) == (expected.shape, expected.dtype))


def restore_optimizer(path, optimizer, saved: dict) -> None:
    """Loads the moments of `saved`; UserError unless they fit the optimiser's parameters. Options
    such as the learning rate come from the run's settings, not from the file."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for name in MOMENTS[type(optimizer)]
             if name != "momentum_buffer" or optimizer.defaults["momentum"]]
    try:
        for index, values in saved["state"].items():
            for name in names:
                expected = torch.tensor(0.0) if name == "step" else parameters[index]
                if not same_kind(values[name], expected):
                    raise ValueError(f"{name} has another shape or dtype than its parameter")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: its optimiser state does not fit the model ({error}); begin "
                        "another run with --out") from error
