import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import evaluate
import models
import train
from common import UserError

TOP = Path(__file__).parent.parent
TINY = ["--model", "ssn", "--data", "shapes", "--data-args", "n=20", "size=32", "--batch-size", "4",
        "--model-args", "channels=(4,6)", "convs=1", "mc_samples=4", "--device", "cpu"]


def run(*arguments, code=0, capsys=None):
    assert train.main([*map(str, arguments)]) == code
    return capsys.readouterr() if capsys else None


def start(*arguments, launcher=("train.py",)):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *launcher, *map(str, arguments)], cwd=TOP,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def weights(path):
    return models.load_checkpoint(path)["state"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 100 steps, and everything it wrote."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(*TINY, "--steps", 100, "--out", folder)
    return folder


# --------------------------------------------------------------------------------- a whole run


def test_a_run_writes_what_it_says(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {"config.json", "split.json", "log.jsonl", "last.pt", "best.pt", "curves.png",
                     "metrics.json", "per_case.csv", "per_class.csv", "samples.png",
                     "uncertainty.png", "dice.png", "ged.png", "maps.png", "modes.png",
                     "manipulation.png", "overview.png"}
    parts = json.loads((finished / "split.json").read_text())
    assert parts.keys() == {"train", "val", "test"}
    with open(finished / "per_case.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == parts["test"]
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["steps"] == 100 and config["training"]["lr"] == 1e-3
    assert config["config"]["channels"] == [4, 6] and config["config"]["num_classes"] == 4
    assert config["versions"]["torch"] == torch.__version__
    entries = log(finished)
    assert [e["step"] for e in entries if "loss" in e] == [1, 50, 100]
    assert [e["step"] for e in entries if "val_ged_16" in e] == [50, 100]
    assert {"lr", "negative_log_likelihood", "gradient", "seconds_per_step"} <= entries[0].keys()
    metrics = json.loads((finished / "metrics.json").read_text())
    wanted = {f"{name}_{n}" for name in ("ged", "ncc", "diversity", "hungarian_iou")
              for n in (1, 4, 8, 16, 100)}
    assert wanted | {"dice", "dice_present", "dice_mean", "log_likelihood", "mode_tv_100",
                     "mode_pooled_tv_100", "mode_gap_100", "ged_predict"} <= metrics.keys()
    assert metrics["ged_16"].keys() == {"mean", "stderr", "n"} and metrics["ged_16"]["n"] == 4


def test_best_is_the_checkpoint_of_lowest_validation_ged(finished):
    geds = {e["step"]: e["val_ged_16"] for e in log(finished) if "val_ged_16" in e}
    best = models.load_checkpoint(finished / "best.pt")
    assert best["step"] == min(geds, key=geds.get) and best["best"] == min(geds.values())


def test_a_loaded_model_samples(finished):
    model = models.load(finished / "best.pt")
    assert not model.training and model.sample(torch.zeros(1, 1, 20, 30), 3).shape == \
        (3, 1, 4, 20, 30)


# --------------------------------------------------------------------------------------- resume


def test_n_and_n_more_steps_equal_2n(finished, tmp_path):
    run(*TINY, "--steps", 50, "--out", tmp_path)
    run("--resume", tmp_path, "--steps", 100)
    assert equal(weights(tmp_path / "last.pt"), weights(finished / "last.pt"))
    losses = lambda folder: [(e["step"], e["loss"]) for e in log(folder) if "loss" in e]
    assert losses(tmp_path) == losses(finished)


def killed_run(folder, number, wait):
    """Start the run of `finished` (or go on with it), send it a signal, return its output."""
    begun = (folder / "config.json").exists()
    process = start(*(["--resume", folder] if begun else [*TINY, "--steps", 100, "--out", folder]))
    wait()
    process.send_signal(number)
    return process.communicate(timeout=120)[0], process.returncode


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_sigterm_saves_and_the_resumed_run_ends_the_same(finished, tmp_path):
    begun = lambda: (tmp_path / "log.jsonl").exists() and len(log(tmp_path)) > 0
    output, code = killed_run(tmp_path, signal.SIGTERM, lambda: until(begun))
    assert code == 128 + signal.SIGTERM and "stopped and saved at step" in output, output
    assert 0 < models.load_checkpoint(tmp_path / "last.pt")["step"] < 100
    run("--resume", tmp_path)
    assert equal(weights(tmp_path / "last.pt"), weights(finished / "last.pt"))


@pytest.mark.slow
def test_twenty_kills_change_nothing(finished, tmp_path):
    random.seed(0)
    for _ in range(20):
        killed_run(tmp_path, signal.SIGKILL, lambda: time.sleep(random.uniform(1, 8)))
        for name in ("last.pt", "best.pt"):
            if (tmp_path / name).exists():
                models.load_checkpoint(tmp_path / name)
    run("--resume", tmp_path)
    assert equal(weights(tmp_path / "last.pt"), weights(finished / "last.pt"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_resume_refuses_other_settings(finished, capsys):
    error = run("--resume", finished, "--lr", 0.5, code=2, capsys=capsys).err
    assert "lr was None there and is 0.5 now" in error and error.count("\n") == 1
    error = run(*TINY, "--out", finished, code=2, capsys=capsys).err
    assert "holds a run already" in error
    assert "no run there" in run("--resume", "/nowhere", code=2, capsys=capsys).err


def test_checkpoint_of_another_config_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "run"
    run(*TINY, "--steps", 1, "--out", other, "--seed", 1)
    content = torch.load(other / "last.pt", weights_only=True)
    content["config"]["rank"] = 3
    torch.save(content, other / "last.pt")
    error = run("--resume", other, code=2, capsys=capsys).err
    assert "another config" in error
    with pytest.raises(UserError, match="do not fit"):
        models.load(other / "last.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_unreadable_checkpoints_are_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        models.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        models.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- when it goes wrong


def test_a_full_disk_leaves_the_last_checkpoint(finished, monkeypatch):
    before = (finished / "best.pt").read_bytes()

    def full(content, name):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    model = models.load(finished / "best.pt")
    with pytest.raises(UserError, match="No space left on device; the checkpoint before it stands"):
        models.save(finished / "best.pt", "ssn", model, torch.optim.Adam(model.parameters()), 7, 0.5)
    assert (finished / "best.pt").read_bytes() == before
    assert not [p for p in finished.iterdir() if p.name.startswith(".")]


def test_a_non_finite_loss_stops_with_step_and_term(tmp_path, capsys, monkeypatch):
    from ssn import SSN
    plain, calls = SSN.loss, []

    def breaks(self, image, label, mask=None):
        calls.append(1)
        return plain(self, image * float("nan" if len(calls) == 60 else 1), label, mask)

    monkeypatch.setattr(SSN, "forward", breaks)
    error = run(*TINY, "--steps", 100, "--out", tmp_path, code=2, capsys=capsys).err
    assert "step 60: negative_log_likelihood is not finite" in error and error.count("\n") == 1
    content = models.load_checkpoint(tmp_path / "last.pt")
    assert content["step"] == 50 and all(v.isfinite().all() for v in content["state"].values())


def test_terms_name_the_cause_and_not_its_consequence():
    terms = train.Terms()
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    terms.add(1, {"loss": good, "kl": good, "gradient": good})
    terms.add(2, {"loss": bad, "kl": bad, "gradient": bad})
    with pytest.raises(UserError, match="step 2: kl is not finite"):
        terms.check()


@pytest.mark.parametrize("arguments, message", [
    (["--model", "unet3000"], "choose one of ssn"),
    (["--data", "imagenet"], "toy1d"),
    (["--data-args", "m=3"], "n, size, seed"),
    (["--data-args", "n"], "key=value"),
    (["--model-args", "ranks=3"], "rank"),
    (["--model-args", "rank=-1"], "rank is at least 0"),
    (["--data", "lidc", "--path", "/nowhere"], "nothing to read at /nowhere"),
    (["--device", "cuda:7"], "--device cuda:7"),
    (["--steps", "0"], "above 0"),
    (["--annotators", "both"], "all, or numbers"),
    (["--annotators", "99"], "choose from 0 to 11"),
])
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    error = run("--out", tmp_path / "run", *arguments, code=2, capsys=capsys).err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_batch_norm_of_a_single_value_is_one_line(tmp_path, capsys):
    """Seven levels of a 64-pixel image leave one pixel."""
    error = run("--data", "shapes", "--data-args", "n=6", "--batch-size", 1, "--steps", 2,
                "--model-args", "channels=(2,2,2,2,2,2,2)", "convs=1", "--device", "cpu",
                "--out", tmp_path / "run", code=2, capsys=capsys).err
    assert error.startswith("error: batch norm") and "--batch-size" in error
    assert error.count("\n") == 1


def test_unknown_options_are_refused():
    with pytest.raises(SystemExit):
        train.parse(["--precision", "fp8"])


# -------------------------------------------------------------------------------------- options


def test_learning_rate_is_piecewise_constant():
    training = dict(lr=0.1, lr_drops=((10, 0.5), (20, 0.1)))
    rates = [train.learning_rate(step, training) for step in (0, 9, 10, 19, 20, 1000)]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.01, 0.01])
    assert train.learning_rate(1000, dict(lr=0.1)) == 0.1


def test_annotators_image_size_precision_and_augmentation_reach_the_loop(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(data, "batches", lambda *a, **k: seen.update(k) or iter(()))
    with pytest.raises(StopIteration):
        train.main([*TINY, "--out", str(tmp_path), "--annotators", "1,2", "--image-size", "24",
                    "--no-augment"])
    assert seen["annotators"] == (1, 2) and seen["size"] == 24 and seen["augmentation"] is None


def test_bf16_trains_and_changes_the_loss(finished, tmp_path):
    run(*TINY, "--steps", 1, "--precision", "bf16", "--out", tmp_path)
    a, b = log(tmp_path)[0]["loss"], log(finished)[0]["loss"]
    assert a != b and abs(a / b - 1) < 0.02


@pytest.mark.parametrize("arguments", [
    ["--data", "toy1d", "--model-args", "mc_samples=4"],
    ["--data", "lesions3d", "--data-args", "n=5", "size=32", "--model-args", "pathway=(2,2)",
     "scales=(1,3)", "patch=12", "hidden=(4,)", "mc_samples=2"]])
def test_lines_and_volumes_train(arguments, tmp_path):
    run(*arguments, "--device", "cpu", "--steps", 2, "--batch-size", 2, "--out", tmp_path)
    assert (tmp_path / "samples.png").exists()


def test_image_size_crops_the_validation_too(tmp_path):
    run(*TINY, "--steps", 1, "--image-size", 24, "--out", tmp_path)
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(train.lacks_compiler(torch.device("cpu"))), reason="no compiler")
def test_compiled_loss_is_the_same(tmp_path):
    """And so are the random numbers in it, which count from the first step with mean_steps=0."""
    steps = [*TINY, "--steps", 1, "--model-args", "channels=(4,6)", "convs=1", "mc_samples=4",
             "mean_steps=0", "--out"]
    run(*steps, tmp_path / "a")
    run(*steps, tmp_path / "b", "--compile")
    assert abs(log(tmp_path / "b")[0]["loss"] / log(tmp_path / "a")[0]["loss"] - 1) < 1e-4


def test_without_a_compiler_it_goes_on(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    out = run(*TINY, "--steps", 1, "--compile", "--out", tmp_path, capsys=capsys).out
    assert "--compile: no C++ compiler (g++) was found; going on without it" in out
    assert log(tmp_path)[0]["loss"] == log(finished)[0]["loss"]


def test_two_processes_see_what_one_does(finished, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517",
                "train.py")
    output, _ = start(*TINY, "--steps", 3, "--out", tmp_path, launcher=launcher).communicate()
    first = log(tmp_path)[0]
    assert abs(first["loss"] / log(finished)[0]["loss"] - 1) < 1e-5, output
    assert abs(first["gradient"] / log(finished)[0]["gradient"] - 1) < 1e-4
    assert "metrics.json" in {p.name for p in tmp_path.iterdir()}


def test_two_processes_judge_as_one_does(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["data_args"]["n"] = 350  # 70 test cases: batches of 32, 32 and 6
    (folder / "config.json").write_text(json.dumps(config))
    evaluate.report(folder, samples=(1, 16), device=torch.device("cpu"), quiet=True)
    alone = {name: (folder / name).read_text() for name in ("per_case.csv", "metrics.json")}
    assert alone["per_case.csv"].count("\n") == 71
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29518",
                "evaluate.py")
    for name in alone:
        (folder / name).unlink()
    process = start(folder, "--samples", 1, 16, "--device", "cpu", launcher=launcher)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert {name: (folder / name).read_text() for name in alone} == alone
    assert output.count("numbers and pictures in") == 1
