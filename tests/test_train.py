"""Training: what a run writes, resuming, stopping, options, and what goes wrong in one line."""
import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import data
import evaluate
import models
from sources import runs
import train
from common import UserError
from helpers import FORKSERVER, run_two, undraw
from ssn import SSN

TOP = Path(__file__).parent.parent
TINY = ["--model", "ssn", "--data", "shapes", "--data-args", "n=20", "size=32", "--batch-size", "4",
        "--model-args", "channels=(4,6)", "convs=1", "mc_samples=4", "--device", "cpu"]
REPORT, SAVEFIG = evaluate.report, Figure.savefig


def run(*arguments, code=0, capsys=None):
    assert train.main([*map(str, arguments)]) == code
    return capsys.readouterr() if capsys else None


def one_line(capsys, *arguments):
    """The error of a command that must end in one line on stderr and status 2."""
    error = run(*arguments, code=2, capsys=capsys).err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def start(*arguments, **environment):
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=TOP, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1") | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def weights(path):
    return runs.load_checkpoint(path)["state"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder, key="loss"):
    return {entry["step"]: entry for entry in runs.read_log(folder) if key in entry}


@pytest.fixture(scope="module", autouse=True)
def reports():
    """The report and the pictures take longer than the run: here the first is only noted, the
    others are blank. A run logs and is validated every 10 steps, not every 50."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "report", lambda folder, **options: calls.append((folder, options)))
        patch.setattr(train, "LOG_EVERY", 10)
        undraw(patch)
        yield calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reports):
    """A run of 20 steps, with its curves."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", SAVEFIG)
        run(*TINY, "--steps", 20, "--out", folder)
    return folder


def on_step(monkeypatch, number, action):
    """Call `action(model)` after the update of step `number`, counted from 1."""
    update, calls = train.train_step, []

    def step(loss_of, *rest):
        result = update(loss_of, *rest)
        calls.append(1)
        if len(calls) == number:
            action(loss_of)
        return result

    monkeypatch.setattr(train, "train_step", step)


# --------------------------------------------------------------------------------- a whole run


def test_a_run_writes_what_it_says(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "report", REPORT)
    monkeypatch.setattr(evaluate, "SAMPLES", (1, 16))
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)
    folder = shutil.copytree(finished, tmp_path / "run")
    run("--resume", folder)  # nothing is left to train: only the report is written
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "split.json", "log.jsonl", "last.pt", "best.pt", "curves.png", "lock",
            "metrics.json", "per_case.csv", "samples.png"} <= names
    splits = json.loads((folder / "split.json").read_text())
    assert splits.keys() == {"train", "val", "test"}
    with open(folder / "per_case.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == splits["test"]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == 20 and config["training"]["lr"] == 1e-3
    assert config["config"]["channels"] == [4, 6] and config["config"]["num_classes"] == 4
    assert config["versions"]["torch"] == torch.__version__
    assert list(log(folder)) == [1, 10, 20] and list(log(folder, "val_ged_16")) == [10, 20]
    assert [entry["steps"] for entry in log(folder).values()] == [1, 9, 10]
    assert log(folder)[1].keys() >= {"lr", "negative_log_likelihood", "gradient",
                                     "seconds_per_step"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["ged_16"].keys() == {"mean", "stderr", "n"} and metrics["ged_16"]["n"] == 4


def test_best_is_the_checkpoint_of_lowest_validation_ged(finished):
    geds = {step: entry["val_ged_16"] for step, entry in log(finished, "val_ged_16").items()}
    best = runs.load_checkpoint(finished / "best.pt")
    assert best["step"] == min(geds, key=geds.get) and best["best"] == min(geds.values())


def test_a_split_file_without_a_test_split_is_said_first_and_judged_on_validation(
        tmp_path, reports, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels" / "a").mkdir(parents=True)
    for i in range(4):
        Image.new("L", (32, 32), 60 * i).save(tmp_path / "images" / f"c{i}.png")
        label = Image.new("L", (32, 32))
        label.paste(1, (4, 4, 20, 20))
        label.save(tmp_path / "labels" / "a" / f"c{i}.png")
    split = {"train": ["c0", "c1"], "val": ["c2", "c3"]}
    (tmp_path / "split.json").write_text(json.dumps(split | {"test": []}))
    out = run("--data", "folder", "--path", tmp_path, "--data-args",
              f"split_file={tmp_path / 'split.json'}", "--batch-size", 2, "--steps", 1, *TINY[-6:],
              "--out", tmp_path / "run", capsys=capsys).out
    assert out.splitlines()[2].startswith("no test split")
    assert reports[-1][1]["split"] == "val"


# --------------------------------------------------------------------------------------- resume


def test_best_pt_alone_is_resumed_and_never_replaced(tmp_path, monkeypatch, capsys):
    """last.pt was deleted, or a kill came between the two. The best step is 10 of 20."""
    monkeypatch.setattr(evaluate, "validation_score",
                        lambda model, split: ("ged_16", 0.5 + model.training_step))
    update, whole, folder = train.train_step, tmp_path / "whole", tmp_path / "run"

    def step(model, *rest):
        model.training_step = getattr(model, "training_step", 0) + 1
        return update(model, *rest)

    monkeypatch.setattr(train, "train_step", step)
    run(*TINY, "--steps", 20, "--out", whole)
    shutil.copytree(whole, folder)
    (folder / "last.pt").unlink()
    best = (folder / "best.pt").read_bytes()
    assert "holds a run already" in one_line(capsys, *TINY, "--steps", 20, "--out", folder)
    monkeypatch.setattr(evaluate, "validation_score", lambda model, split: ("ged_16", 99.0))
    assert "resumed at step 10" in run("--resume", folder, capsys=capsys).out
    assert equal(weights(folder / "last.pt"), weights(whole / "last.pt"))
    assert (folder / "best.pt").read_bytes() == best
    assert list(log(folder)) == list(log(whole))


def test_a_missing_best_pt_is_made_again(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "best.pt").unlink()
    run("--resume", folder)  # at the last step, which is validated
    assert equal(weights(folder / "best.pt"), weights(finished / "last.pt"))
    assert (folder / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


@pytest.mark.parametrize("error, text", [
    (KeyboardInterrupt(), "stopped"), (OSError(28, "No space left on device"), "No space left"),
    (OSError("image file is truncated"), "truncated"), (RuntimeError("out of memory"), "out of")])
def test_a_report_that_fails_does_not_hide_the_training(finished, tmp_path, monkeypatch, capsys,
                                                        error, text):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(evaluate, "report", fail)
    folder = shutil.copytree(finished, tmp_path / "run")
    stopped = isinstance(error, KeyboardInterrupt)
    streams = run("--resume", folder, code=130 if stopped else 2, capsys=capsys)
    said = streams.out if stopped else streams.err
    assert text in said and f"best.pt stands: python train.py --resume {folder}" in said


def test_a_closed_terminal_stops_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            stop = train.Stop()
            assert (signal.SIGHUP in stop.before) == asked
            if asked:
                for _ in range(2):  # the shell sends it, and then the system
                    os.kill(os.getpid(), signal.SIGHUP)
                assert stop.signal == signal.SIGHUP
                signal.signal(signal.SIGHUP, handler)
            stop.restore()
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_n_and_n_more_steps_equal_2n(finished, tmp_path):
    run(*TINY, "--steps", 10, "--out", tmp_path)
    run("--resume", tmp_path, "--steps", 20)
    assert equal(weights(tmp_path / "last.pt"), weights(finished / "last.pt"))
    assert {s: e["loss"] for s, e in log(tmp_path).items()} == \
        {s: e["loss"] for s, e in log(finished).items()}
    changes = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert [(c["step"], c["steps"]) for c in changes] == [(0, 10), (10, 20)]


@pytest.mark.parametrize("step", [7, 10, 20])  # in mid-interval, at a validation, at the end
def test_sigterm_saves_and_the_resumed_run_ends_the_same(step, finished, tmp_path, monkeypatch,
                                                         reports, capsys):
    done = len(reports)
    on_step(monkeypatch, step, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    code = 128 + signal.SIGTERM
    out = run(*TINY, "--steps", 20, "--out", tmp_path, code=code, capsys=capsys).out
    assert f"stopped and saved at step {step}" in out and len(reports) == done
    assert runs.load_checkpoint(tmp_path / "last.pt")["step"] == step
    run("--resume", tmp_path)
    assert len(reports) == done + 1
    for name in ("last.pt", "best.pt"):
        assert equal(weights(tmp_path / name), weights(finished / name))
    assert log(tmp_path, "val_ged_16") == log(finished, "val_ged_16")
    # The log's means say over how many steps they go, so none is lost or counted twice.
    here, there = log(tmp_path), log(finished)
    assert sum(entry["steps"] for entry in here.values()) == 20
    total = sum(here[s]["loss"] * here[s]["steps"] for s in here if 1 < s <= 10)
    assert total == pytest.approx(9 * there[10]["loss"], rel=1e-5)


def test_the_command_line_stops_at_sigterm(tmp_path):
    """And draws its curves, though MPLBACKEND names no backend of matplotlib."""
    process = start("train.py", *TINY, "--steps", 100_000, "--out", tmp_path, MPLBACKEND="nonsense")
    end = time.monotonic() + 100
    while not log(tmp_path) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM and "stopped and saved at step" in output
    assert 0 < runs.load_checkpoint(tmp_path / "last.pt")["step"] < 100_000
    assert (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path_factory, tmp_path):
    random.seed(0)
    whole = tmp_path_factory.mktemp("runs") / "whole"
    run(*TINY, "--steps", 100, "--out", whole)

    def arguments():
        begun = (tmp_path / "config.json").exists()
        return ["--resume", tmp_path] if begun else [*TINY, "--steps", 100, "--out", tmp_path]

    for _ in range(20):
        process = start("train.py", *arguments())
        time.sleep(random.uniform(1, 8))
        process.kill()
        process.communicate()
        for name in ("last.pt", "best.pt"):
            if (tmp_path / name).exists():
                runs.load_checkpoint(tmp_path / name)
    run(*arguments())
    assert equal(weights(tmp_path / "last.pt"), weights(whole / "last.pt"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_resume_refuses_other_settings(finished, capsys):
    error = one_line(capsys, "--resume", finished, "--batch-size", 2)
    assert "batch_size was 4 there and is 2 now" in error
    assert "holds a run already" in one_line(capsys, *TINY, "--out", finished)
    assert "no run there" in one_line(capsys, "--resume", "/nowhere")
    assert not Path("/nowhere").exists()


def test_a_folder_belongs_to_one_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    with runs.own(folder):
        for arguments in (["--resume", folder], [*TINY, "--out", folder]):
            error = one_line(capsys, *arguments)
            assert f"in use by process {os.getpid()} on " in error
    run("--resume", folder)  # the lock is free again


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    locked = FORKSERVER.Event()
    process = FORKSERVER.Process(target=own_for_ever, args=(tmp_path, locked))
    process.start()
    assert locked.wait(100)
    with pytest.raises(UserError, match=f"in use by process {process.pid} "), runs.own(tmp_path):
        pass
    process.kill()
    process.join()
    with runs.own(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def own_for_ever(folder, locked):
    with runs.own(folder):
        locked.set()
        time.sleep(100)


# ------------------------------------------------------------------------------ when it goes wrong


@pytest.mark.parametrize("limit", [0, 4_096, 25_000])
def test_a_full_disk_is_one_line_and_resume_goes_on(limit, finished, tmp_path, monkeypatch, capsys):
    """No file may grow past `limit` bytes after step 12, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert (finished / "last.pt").stat().st_size > 25_000
    on_step(monkeypatch, 12, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    try:
        error = one_line(capsys, *TINY, "--steps", 20, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in error and "File too large" in error and "at step 20" in error
    assert f"last.pt stands; make room, then --resume {tmp_path}" in error
    assert runs.load_checkpoint(tmp_path / "last.pt")["step"] == 10
    assert not list(tmp_path.glob(".*"))
    run("--resume", tmp_path)
    for name in ("last.pt", "best.pt"):
        assert equal(weights(tmp_path / name), weights(finished / name))


def test_a_disk_full_from_the_start_says_that_nothing_was_saved(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        error = one_line(capsys, *TINY, "--steps", 1, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "config.json at step 0: File too large; nothing was saved yet" in error


def test_a_non_finite_loss_stops_with_step_and_term(tmp_path, capsys, monkeypatch):
    plain, calls = SSN.loss, []

    def breaks(self, image, label, mask=None):
        calls.append(1)
        return plain(self, image * float("nan" if len(calls) == 12 else 1), label, mask)

    monkeypatch.setattr(SSN, "forward", breaks)
    error = one_line(capsys, *TINY, "--steps", 20, "--out", tmp_path)
    assert "step 12: negative_log_likelihood is not finite" in error
    assert f"last.pt stands: --resume {tmp_path} with a lower --lr" in error
    content = runs.load_checkpoint(tmp_path / "last.pt")
    assert content["step"] == 10 and all(v.isfinite().all() for v in content["state"].values())
    run("--resume", tmp_path, "--lr", 1e-4)  # as the error advises
    assert log(tmp_path)[20]["lr"] == 1e-4
    changes = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert [(c["step"], c["lr"]) for c in changes] == [(0, None), (10, 1e-4)]


def test_non_finite_weights_are_never_saved(tmp_path, capsys, monkeypatch):
    """As after an update that overflows: loss and gradient of its step were finite."""
    on_step(monkeypatch, 3, lambda model: next(model.parameters()).data.fill_(float("inf")))
    error = one_line(capsys, *TINY, "--steps", 3, "--out", tmp_path)
    assert "step 3: a weight is not finite" in error and "nothing was saved" in error
    assert not list(tmp_path.glob("*.pt"))


def test_terms_name_the_cause_and_not_its_consequence():
    terms = train.Terms()
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    terms.add(1, {"loss": good, "kl": good, "gradient": good})
    assert terms.failed() is None
    terms.add(2, {"loss": bad, "kl": bad, "gradient": bad})
    assert terms.failed() == "step 2: kl"


@pytest.mark.parametrize("arguments, message", [
    (["--model", "unet3000"], "did you mean unet? choose from ssn"),
    (["--data", "imagenet"], "toy1d"),
    (["--data-args", "m=3"], "n, size, seed"),
    (["--data-args", "n"], "key=value"),
    (["--data-args", "n=" + "1+" * 5000 + "1"], "key=value"),
    (["--data-args", "n=" + "(" * 400], "whole number"),
    (["--model-args", "ranks=3"], "rank"),
    (["--model-args", "rank=-1"], "rank is at least 0"),
    (["--model-args", "channels=garbage"], "ssn cannot be built"),
    (["--model-args", "channels=5"], "ssn cannot be built"),
    (["--model-args", "channels=()"], "ssn cannot be built"),
    (["--model-args", "channels=(999999,999999)"], "ssn cannot be built: it has more than"),
    (["--data", "lidc", "--path", "/nowhere"], "there is no /nowhere"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--steps", "0"], "from 1 to"),
    (["--batch-size", "9" * 20], "--batch-size 99999999999999999999: give a whole number"),
    (["--seed", "-1"], "--seed -1: give a whole number from 0 to 2147483647"),
    (["--seed", "2147483648"], "from 0 to 2147483647"),
    (["--lr", "nan"], "--lr nan: give a finite number above 0"),
    (["--lr", "inf", "--steps", "1"], "--lr inf"),
    (["--lr", "-1"], "--lr -1.0"),
    (["--lr-drops", "100"], "STEP:FACTOR"),
    (["--lr-drops", "100:0.1", "5:inf"], "STEP:FACTOR"),
    (["--annotators", "both"], "choose from 0, 1"),
    (["--annotators", "99"], "choose from 0, 1"),
    (["--path", "a\0b", "--data", "npz"], ""),
])
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    small = [] if "--data" in arguments else ["--data-args", "n=20", "size=32"]
    assert message in one_line(capsys, "--out", tmp_path / "run", *small, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    "[]", "{}", "3", '{"settings": []}', '{"settings": {"model": "ssn"}}', "{", "[" * 100_000])
def test_a_broken_config_is_one_line(content, finished, tmp_path, capsys):
    shutil.copy(finished / "last.pt", tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json is missing or broken" in one_line(capsys, "--resume", tmp_path)


@pytest.mark.parametrize("key, value", [
    ("seed", 10**30), ("seed", "1"), ("steps", []), ("lr", "x"), ("lr", float("nan")),
    ("lr_drops", [3]), ("lr_drops", ["x"]), ("model_args", []), ("data", None), ("annotators", 3),
    ("batch_size", -1), ("image_size", 10**9)])
def test_a_broken_setting_is_one_line(key, value, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["settings"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    one_line(capsys, "--resume", folder)


def test_other_lines_in_the_log_are_left_out(tmp_path):
    lines = ['{"step": 1, "loss": 2.5}', "[]", "3", '{"loss": 1}', '{"step": "x"}', "{}", '{"st',
             '{"step": 2, "loss": null}', "[" * 100_000, '{"step": 3, "loss": 0.5}', "\x00"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert runs.read_log(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 0.5}]
    assert runs.read_log(tmp_path / "nowhere") == []


def test_a_strange_world_size_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "start with torchrun" in one_line(capsys, *TINY, "--out", tmp_path / "run")


def test_batch_norm_of_a_single_value_is_one_line(tmp_path, capsys):
    """Seven levels of a 64-pixel image leave one pixel."""
    error = one_line(capsys, "--data", "shapes", "--data-args", "n=6", "--batch-size", 1, "--steps",
                     2, "--model-args", "channels=(2,2,2,2,2,2,2)", "convs=1", "--device", "cpu",
                     "--out", tmp_path / "run")
    assert error.startswith("error: batch norm") and "--batch-size" in error


def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *a: torch.empty(2**55))
    assert "out of memory: lower" in one_line(capsys, *TINY, "--out", tmp_path)


def test_unknown_options_are_refused():
    with pytest.raises(SystemExit):
        train.parse(["--precision", "fp8"])


@pytest.mark.parametrize("stream", [
    None, io.TextIOWrapper(io.BytesIO(), "ascii"), io.TextIOWrapper(open("/dev/full", "wb", 0))])
def test_output_that_cannot_be_shown_stops_nothing(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    progress = common.Progress(3)
    progress.say("± \udcff")
    progress.update(1, "läuft", line=True)
    if stream is not None and stream.encoding == "ascii":
        lines = stream.buffer.getvalue().decode().splitlines()
        assert lines[0] == "? ?" and lines[1].endswith("l?uft")
    else:
        assert sys.stdout is None


# -------------------------------------------------------------------------------------- options


def test_learning_rates():
    training = dict(lr=0.1, lr_drops=((10, 0.5), (20, 0.1)))
    rates = [models.learning_rate(step, training) for step in (0, 9, 10, 19, 20, 1000)]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.01, 0.01])
    assert models.learning_rate(1000, dict(lr=0.1)) == 0.1
    poly = dict(lr=0.1, steps=100, poly_power=0.9)
    assert [models.learning_rate(step, poly) for step in (0, 50, 99)] == \
        pytest.approx([0.1, 0.1 * 0.5**0.9, 0.1 * 0.01**0.9])


def test_more_steps_stretch_the_quick_schedule():
    """Otherwise a longer quick run would spend most of its steps at the last, lowest rate."""
    steps = SSN.QUICK_TRAINING["steps"]
    drops = SSN.QUICK_TRAINING["lr_drops"]
    for given, factor in ((3 * steps, 3), (steps, 1), (40, 1)):
        recipe = train.recipe(SSN, settings("ssn", "shapes", quick=True, steps=given))
        assert recipe["lr_drops"] == tuple((factor * step, rate) for step, rate in drops)
    given = train.recipe(SSN, settings("ssn", "shapes", quick=True, steps=3 * steps,
                                       lr_drops=["5:0.1"]))
    assert given["lr_drops"] == [(5, 0.1)]


def test_lr_drops_replace_the_recipe_s_schedule(tmp_path):
    run(*TINY, "--steps", 4, "--lr", 0.01, "--lr-drops", "3:0.01", "1:0.1", "--out", tmp_path)
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training["lr_drops"] == [[1, 0.1], [3, 0.01]]
    assert [entry["lr"] for entry in log(tmp_path).values()] == pytest.approx([0.01, 1e-4])
    run("--resume", tmp_path, "--lr-drops", "3:0.5", "--steps", 6)
    assert log(tmp_path)[6]["lr"] == 0.005


@pytest.mark.parametrize("name, kind, options", [
    ("adam", torch.optim.Adam, {}), ("sgd", torch.optim.SGD, dict(momentum=0.6)),
    ("rmsprop", torch.optim.RMSprop, dict(momentum=0.6, alpha=0.9))])
def test_optimizers_have_the_options_that_are_theirs(name, kind, options):
    given = dict(lr=1.0, weight_decay=0.1) | options
    training = dict(momentum=0.6, optimizer=name) | given  # --quick may replace SGD by Adam
    optimizer = models.make_optimizer(torch.nn.Linear(2, 1), training)
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in given} == given


def settings(model, data, **given):
    return {key: default for key, (_, default) in runs.SETTINGS.items()} | given \
        | dict(model=model, data=data)


def test_images_far_from_unit_scale_are_refused():
    """Floats like 0..255 train, as does CT from -1000 to 1000; those like 0..10,000 do not."""
    images = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    given = settings("prob_unet", "npz", model_args=dict(channels=(4, 6)))
    for grown in (255 * images, 2000 * images - 1000):
        train.first_model(given, SimpleNamespace(images=grown, num_classes=2))
    with pytest.raises(UserError, match=r"npz: pixels of about 5\.\d+e\+03 are too large"):
        train.first_model(given, SimpleNamespace(images=1e4 * images, num_classes=2))


@pytest.mark.parametrize("model, name", models.RECIPES)
def test_what_a_paper_did_otherwise_is_the_default_there(model, name, monkeypatch):
    """Every entry builds and trains, --quick and options override it, other sets do not see it."""
    fields, training = models.RECIPES[model, name]
    assert name in data.DATASETS
    dims, channels = (3, 4) if name == "brats" else (2, 3)
    split = SimpleNamespace(images=torch.zeros(1, channels, *[8] * dims), num_classes=4,
                            instances=None)
    monkeypatch.setattr(train, "build", lambda *given: models.build(*given, meta=True))
    built = train.first_model(settings(model, name), split)
    assert {key: getattr(built.config, key) for key in fields} == fields
    default = train.recipe(built, settings(model, "lidc"))
    assert default == built.TRAINING
    recipe = train.recipe(built, settings(model, name))
    assert recipe == default | training
    assert all(first < recipe["steps"] for first, _ in recipe.get("lr_drops", ()))
    quick = train.recipe(built, settings(model, name, quick=True))
    assert quick == built.TRAINING | built.QUICK_TRAINING
    own = train.recipe(built, settings(model, name, lr=0.5, steps=7, batch_size=3,
                                       lr_drops=["5:0.1"]))
    assert (own["lr"], own["steps"], own["batch_size"], own["lr_drops"]) == (0.5, 7, 3, [(5, 0.1)])
    if "kappa" in fields:
        small = train.first_model(settings(model, name, quick=True), split)
        given = train.first_model(settings(model, name, model_args=dict(kappa=3.0)), split)
        assert small.config.kappa == 0.35 and given.config.kappa == 3.0


def test_brats_is_trained_as_published():
    recipe = train.recipe(SSN, settings("ssn", "brats"))
    optimizer = models.make_optimizer(torch.nn.Linear(2, 1), recipe)
    assert type(optimizer) is torch.optim.RMSprop
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "alpha", "weight_decay")} \
        == dict(lr=1e-3, momentum=0.6, alpha=0.9, weight_decay=1e-4)
    rates = [models.learning_rate(1000 * k, recipe) for k in range(121)]
    halvings = [k for k in range(1, 121) if rates[k] == rates[k - 1] / 2]
    assert halvings == [44, 64, 80, 90, 98, 105] and len(set(rates)) == 7
    assert (recipe["batch_size"], recipe["steps"]) == (10, 120_000)


def test_a_sum_with_more_weight_decay_trains_as_a_mean():
    """What RECIPES does for `unet` on BraTS: RMSprop divides the gradient by its own size."""
    results = []
    for scale in (1, 30**3):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(3, 1).double(), torch.randn(20, 3).double()
        training = models.BRATS | dict(weight_decay=0.1 * scale)
        optimizer = models.make_optimizer(model, training)
        for _ in range(20):
            optimizer.zero_grad()
            (scale * (model(x) - x[:, :1] - 2).square().mean()).backward()
            optimizer.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kappa, said", [("1e-9", True), ("1e9", False)])
def test_a_target_that_was_never_reached_is_said(kappa, said, tmp_path, capsys):
    out = run("--model", "hpunet", "--data", "shapes", "--data-args", "n=6", "size=32", "--steps",
              2, "--batch-size", 2, "--device", "cpu", "--out", tmp_path, "--model-args",
              "channels=(4,6,8)", "convs=1", "blocks=1", "latents=(2,1)", f"kappa={kappa}",
              capsys=capsys).out
    advice = "the reconstruction never reached its target kappa=1e-09: raise it with --model-args"
    assert (advice in out) == said


@pytest.mark.parametrize("constraint, found, weight, advice", [
    (1.0, 0.6, 2.0, "never reached"), (-1.0, 0.1, 0.2, "easily met, by a reconstruction of 0.1:"),
    (-1.0, 0.1, 0.9, None), (-1.0, 0.4, 0.2, None)])
def test_advice_on_kappa(constraint, found, weight, advice):
    entry = {"constraint": constraint, "reconstruction_per_pixel": found, "lambda": weight}
    model = models.build("hpunet", dict(kappa=0.5), meta=True)
    said = model.advice([{"val_ged_16": 1}, entry])
    assert said is None if advice is None else advice in said
    assert model.advice([{"loss": 1}]) is None  # of the objective "elbo"


def test_the_gradient_s_norm():
    model = torch.nn.Linear(3, 2)
    unused = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    image = torch.randn(4, 3)
    result = train.train_step(lambda x, y: (model(x).square().sum(), {}), optimizer, image, None,
                              0.0, torch.autocast("cpu", enabled=False))
    squares = sum(float(v) ** 2 for p in model.parameters() for v in p.grad.flatten())
    assert result["gradient"].item() == pytest.approx(squares**0.5, rel=1e-6)


def test_annotators_image_size_and_augmentation_reach_the_loop(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(data, "batches",
                        lambda split, *a, **k: given.update(k, split=split) or iter(()))
    with pytest.raises(StopIteration):
        train.main([*TINY, "--out", str(tmp_path), "--annotators", "1,2", "--image-size", "24",
                    "--no-augment"])
    assert given["size"] == 24 and given["augmentation"] is None
    assert (given["split"].weights > 0).nonzero()[:, 1].unique().tolist() == [1, 2]


def test_bf16_trains_and_changes_the_loss(finished, tmp_path):
    run(*TINY, "--steps", 1, "--precision", "bf16", "--out", tmp_path)
    a, b = log(tmp_path)[1]["loss"], log(finished)[1]["loss"]
    assert a != b and abs(a / b - 1) < 0.02


def test_tf32_is_a_setting_of_training(tmp_path, monkeypatch):
    """Of its products and convolutions; the report is made without it."""
    found = []
    on_step(monkeypatch, 1, lambda _: found.append((torch.get_float32_matmul_precision(),
                                                    torch.backends.cudnn.allow_tf32)))
    run(*TINY, "--steps", 1, "--precision", "tf32", "--out", tmp_path / "a")
    found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    assert found == [("high", True), ("highest", False)]
    on_step(monkeypatch, 1, lambda _: found.append((torch.get_float32_matmul_precision(),
                                                    torch.backends.cudnn.allow_tf32)))
    run(*TINY, "--steps", 1, "--out", tmp_path / "b")
    assert found[2] == ("highest", False)


@pytest.mark.parametrize("arguments", [
    ["--data", "toy1d", "--model-args", "mc_samples=4"],
    ["--data", "lesions3d", "--data-args", "n=5", "size=32", "--model-args", "mc_samples=2",
     "deepmedic={'pathway': (2, 2), 'scales': (1, 3), 'patch': 12, 'hidden': (4,)}"],
    [*TINY, "--image-size", 24]])
def test_lines_volumes_and_crops_train_and_are_judged(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "report", REPORT)
    monkeypatch.setattr(evaluate, "SAMPLES", (1, 4))
    run(*arguments, "--device", "cpu", "--steps", 2, "--batch-size", 2, "--out", tmp_path)
    assert (tmp_path / "samples.png").exists() and (tmp_path / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(models.lacks_compiler(torch.device("cpu"))), reason="no compiler")
def test_compiled_loss_is_the_same(tmp_path):
    """And so are the random numbers in it."""
    steps = [*TINY, "--steps", 1, "--model-args", "channels=(4,6)", "convs=1", "mc_samples=4",
             "--out"]
    run(*steps, tmp_path / "a")
    run(*steps, tmp_path / "b", "--compile")
    assert abs(log(tmp_path / "b")[1]["loss"] / log(tmp_path / "a")[1]["loss"] - 1) < 1e-4


def test_without_a_compiler_it_goes_on(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models.shutil, "which", lambda name: None)
    out = run(*TINY, "--steps", 1, "--compile", "--out", tmp_path, capsys=capsys).out
    assert "--compile: no compiler (g++) was found; training without it" in out
    assert log(tmp_path)[1]["loss"] == log(finished)[1]["loss"]


# --------------------------------------------------------------------------------- two processes

def train_as_one_of_two(rank, folder):
    """As torchrun starts it; at the end of training, the folder of another run is judged."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    undraw(pytest.MonkeyPatch())
    evaluate.report = lambda _, **options: REPORT(folder / "run", samples=(1, 4),
                                                  device=torch.device("cpu"))
    with open(folder / f"{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        run(*TINY, "--steps", 3, "--out", folder / "two")


def test_two_processes_train_and_judge_as_one_does(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["data_args"]["n"] = 170  # 34 test cases: batches of 32 and 2
    (folder / "config.json").write_text(json.dumps(config))
    REPORT(folder, samples=(1, 4), device=torch.device("cpu"))
    alone = {name: (folder / name).read_text() for name in ("per_case.csv", "metrics.json")}
    assert alone["per_case.csv"].count("\n") == 35
    for name in alone:
        (folder / name).unlink()
    run_two(train_as_one_of_two, tmp_path, group=False)
    one, two = log(finished)[1], log(tmp_path / "two")[1]
    assert abs(two["loss"] / one["loss"] - 1) < 1e-5
    assert abs(two["gradient"] / one["gradient"] - 1) < 1e-4
    assert {name: (folder / name).read_text() for name in alone} == alone
    output = "".join((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert output.count("numbers and pictures in") == 1


def test_more_classes_than_the_data_has(tmp_path):
    run(*TINY[:-2], "num_classes=6", *TINY[-2:], "--steps", 10, "--out", tmp_path / "run")
    assert "val_ged_16" in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("arguments, text", [
    (["--model-args", "num_classes=2"], "num_classes=2: the data has 4"),
    (["--model-args", "in_channels=3"], "in_channels=3: the data has 1"),
    (["--model-args", "dims=3"], "dims=3: the data has 2"), (["--out", ""], "empty"),
    (["--resume", ""], "empty"), (["--resume", "a", "--out", "b"], "leave out --out")])
def test_options_that_do_not_fit(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = ["--data", "shapes", "--data-args", "n=6", "size=32", "--steps", 1, "--device", "cpu"]
    assert text in one_line(capsys, *plain, *arguments)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def test_cuda_graphs_are_for_one_gpu(tmp_path, capsys):
    assert train.main(["--cuda-graphs", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "--cuda-graphs needs one CUDA device" in capsys.readouterr().err
