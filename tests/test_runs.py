"""Checkpoints: what is saved comes back, and nothing else is loaded."""
import dataclasses
import os
import random
import zipfile

import pytest
import torch

import models
from sources import runs
import train
from common import UserError
from ssn import SSN, SSNConfig

CONFIG = SSNConfig(channels=(4, 6), convs=1, mc_samples=2, rank=2)


def trained(kind="adam"):
    """A small model and its optimiser after one step."""
    torch.manual_seed(0)
    model = SSN(CONFIG)
    recipe = dict(optimizer=kind, lr=0.01, weight_decay=0.0)
    if kind != "adam":
        recipe["momentum"] = 0.9
    optimizer = train.make_optimizer(model, recipe)
    model(torch.randn(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))[0].backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    model, optimizer = trained()
    runs.save(path, "ssn", model, optimizer, 7, 0.5)
    return path, model


def resave(path, target, change):
    """The checkpoint at `target`, changed."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def test_what_was_saved_comes_back(saved):
    path, model = saved
    content = runs.load_checkpoint(path)
    assert (content["model"], content["step"], content["best"]) == ("ssn", 7, 0.5)
    assert content["config"] == dataclasses.asdict(CONFIG)
    loaded = models.load(path)
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert models.load(path.parent).config == CONFIG  # a run's folder is its best.pt
    assert torch.load(path, weights_only=True).keys() == content.keys()  # an ordinary file


@pytest.mark.parametrize("kind", ["adam", "sgd", "rmsprop"])
def test_every_optimiser_s_state_comes_back(kind, tmp_path):
    model, optimizer = trained(kind)
    runs.save(tmp_path / "last.pt", "ssn", model, optimizer, 1, 0.5)
    other, fresh = trained(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert runs.restore(tmp_path / "last.pt", dict(model="ssn"), other, fresh) == (1, 0.5)
    for a, b in zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values()):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_flipped_bit_is_refused_or_harmless(saved, tmp_path):
    path, model = saved
    whole, random_place = path.read_bytes(), random.Random(0)
    places = [random_place.randrange(8 * len(whole)) for _ in range(60)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            state = runs.load_checkpoint(tmp_path / "x.pt")["state"]
        except UserError as error:
            assert "\n" not in str(error) and "x.pt: " in str(error)
            refused += 1
        else:
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert refused >= 30  # most bytes are weights and moments, each with a checksum


def test_a_checkpoint_that_unpacks_to_more_than_it_holds_is_refused(saved, tmp_path):
    """A zip bomb: the records of torch.save are never compressed."""
    with zipfile.ZipFile(saved[0]) as whole, zipfile.ZipFile(
            tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr("archive/data/999", bytes(10**7))
    with pytest.raises(UserError, match="x.pt: not a checkpoint.*compressed"):
        models.load(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_unreadable_checkpoints_are_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        models.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "x.pt", "/dev/zero"):
        with pytest.raises(UserError, match="no such checkpoint; train one"):
            models.load(path)
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match="not been validated yet; .* --weights last"):
        models.load(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        models.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("state"), "not a checkpoint"),
    (lambda c: c.update(state=3), "state is a int"),
    (lambda c: c.update(config={"rank": torch.ones(2)}), "not a checkpoint"),
    (lambda c: c.update(model="nothing"), "choose from"),
    (lambda c: c["config"].update(rank=3), "do not fit"),
    (lambda c: c["config"].update(channels=()), "cannot be built"),
    (lambda c: c["config"].update(ranks=3), "unknown ssn option"),
    (lambda c: c["state"].pop("mean.weight"), "do not fit"),
    (lambda c: c["state"].update(more=torch.ones(1)), "do not fit"),
    (lambda c: c["state"].update({"mean.weight": torch.ones(1)}), "do not fit"),
    (lambda c: c["state"].update({"mean.weight": c["state"]["mean.weight"].double()}), "do not fit"),
    (lambda c: c["state"].update({"mean.weight": 3}), "do not fit")])
def test_a_checkpoint_that_does_not_fit_is_one_line(saved, tmp_path, change, message):
    path = resave(saved[0], tmp_path / "x.pt", change)
    with pytest.raises(UserError, match=message) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda c: c["optimizer"].pop("state"),
    lambda c: c["optimizer"].update(state=[]),
    lambda c: c["optimizer"]["state"].update({0: {}}),
    lambda c: c["optimizer"]["state"].update({999: c["optimizer"]["state"][0]}),
    lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(1)),  # was a SIGSEGV
    lambda c: c["optimizer"]["state"][0].update(exp_avg_sq=None),
    lambda c: c["optimizer"]["state"][0].update(step=torch.ones(3)),
    lambda c: c["optimizer"]["state"][1].update(exp_avg=c["optimizer"]["state"][1]["exp_avg"].half())])
def test_moments_that_do_not_fit_are_one_line(saved, tmp_path, change):
    path = resave(saved[0], tmp_path / "x.pt", change)
    model, optimizer = trained()
    with pytest.raises(UserError, match="optimiser state does not fit") as caught:
        runs.restore(path, dict(model="ssn"), model, optimizer)
    assert "\n" not in str(caught.value)


def test_the_optimiser_s_options_come_from_the_settings(saved, tmp_path):
    path = resave(saved[0], tmp_path / "x.pt",
                  lambda c: c["optimizer"].update(param_groups=[{"lr": 7.0, "fused": "x"}]))
    model, optimizer = trained()
    runs.restore(path, dict(model="ssn"), model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_failed_write_leaves_the_last_checkpoint(saved, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(saved[0].read_bytes())
    model, optimizer = trained()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(UserError, match="No space left on device; last.pt stands"), \
                runs.writing(path, 8):
            runs.save(path, "ssn", model, optimizer, 8, 0.4)
    assert path.read_bytes() == saved[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
