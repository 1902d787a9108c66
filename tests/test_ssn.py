import math

import pytest
import torch
from torch import nn

import helpers
from backbones.deepmedic import DeepMedic, DeepMedicConfig
from ssn import SSN, SSNConfig, train_toy

NARROW = helpers.LEVELS
SMALL_3D = helpers.DEEPMEDIC | dict(dims=3)


def case(*size, classes=2, batch=2, seed=0):
    return helpers.batch(batch, size, classes, channels=1, seed=seed, ignored=0)


def test_default_is_the_papers_lidc_model():
    model = SSN()
    assert helpers.count_parameters(model) == 9_240_312
    assert model.config.rank == 10 and model.config.mc_samples == 20
    levels = [block[0].weight.shape[0] for block in model.backbone[0].encoder]
    assert levels == [32, 64, 128, 192, 192, 192, 192]
    assert model.factor.weight.shape == (20, 32, 1, 1)  # R * K maps
    assert SSN.TRAINING["lr"] == 1e-3 and SSN.TRAINING["batch_size"] == 12


def test_loss_against_a_float64_loop():
    torch.manual_seed(0)
    model = SSN(SSNConfig(num_classes=3, mc_samples=6, rank=2, **NARROW)).eval()
    image, label = case(5, 7, classes=3)
    label[0, :2] = 255
    torch.manual_seed(1)
    loss, terms = model.loss(image, label)
    torch.manual_seed(1)
    samples = model.distribution(image).sample(6, antithetic=True).double()
    total = 0.0
    for b in range(2):
        likelihoods = []
        for m in range(6):
            log_p = 0.0
            for i in range(5):
                for j in range(7):
                    if label[b, i, j] != 255:
                        log_p += samples[m, b, :, i, j].log_softmax(0)[label[b, i, j]].item()
            likelihoods.append(log_p)
        top = max(likelihoods)
        total -= top + math.log(sum(math.exp(v - top) for v in likelihoods) / 6)
    assert abs(loss.item() - total / 2) < 1e-6 * abs(total)
    assert torch.equal(terms["negative_log_likelihood"], loss)


def test_likelihood_of_rank_zero_with_no_variance_is_the_cross_entropy():
    model = SSN(SSNConfig(rank=0, diagonal_min=1e-12, **NARROW)).eval()
    nn.init.zeros_(model.log_diagonal.weight)
    nn.init.constant_(model.log_diagonal.bias, -1e9)  # bounded to exp(-10)
    image, label = case(8, 8)
    expected = nn.functional.cross_entropy(model.distribution(image).mean, label, reduction="none")
    nats = model.log_likelihood(image, label, 500)
    torch.testing.assert_close(nats, -expected.sum((1, 2)), rtol=1e-3, atol=0)


def test_more_samples_raise_the_likelihood_estimate():
    torch.manual_seed(0)
    model = SSN(SSNConfig(**NARROW)).eval()
    image, label = case(8, 8)
    few = torch.stack([model.log_likelihood(image, label, 2) for _ in range(50)]).mean(0)
    assert (few < model.log_likelihood(image, label, 4000)).all()


def test_any_network_serves_as_backbone():
    net = nn.Conv2d(1, 5, 3, padding=1)
    net.out_channels = 5
    model = SSN(SSNConfig(rank=3), backbone=net)
    assert model.sample(torch.randn(2, 1, 6, 7), 4).shape == (4, 2, 2, 6, 7)


def test_the_mean_learns_alone_at_first():
    model = SSN(SSNConfig(mean_steps=2, **NARROW))
    image, label = case(8, 8)
    for step in range(4):
        model.zero_grad()
        loss = model(image, label)[0]
        loss.backward()
        assert bool(model.factor.weight.grad.any()) == (step >= 2)
        assert model.mean.weight.grad.any()
    model.eval()
    model(image, label)
    assert model.steps_seen == 4  # in the checkpoint, so that a resumed run goes on


def test_mask_takes_the_randomness_out_of_the_background():
    model = SSN(SSNConfig(**NARROW)).eval()
    image, label = case(8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:5] = True
    normal = model.distribution(image, mask)
    variance = normal.factor.square().sum(1) + normal.diagonal
    torch.testing.assert_close(variance[:, :, 6:], torch.full_like(variance[:, :, 6:], 1e-5))
    assert (variance[:, :, 2:5] > 1e-3).all()
    changed = label.masked_fill(~mask, 1)  # what stands outside does not matter
    results = []
    for y in (label, changed):
        torch.manual_seed(0)
        results.append(model.loss(image, y, mask)[0])
    assert torch.equal(*results)


def test_low_rank_learns_the_toy_and_diagonal_cannot():
    """Fig. 2 in small: 6 pixels, of which the middle two are both on or both off."""
    label = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    image = torch.zeros(2, 1, 6)
    nats = [train_toy(image, label, rank, steps=600).log_likelihood(image, label, 20_000).mean()
            for rank in (0, 2)]
    assert abs(nats[0] - 2 * math.log(0.5)) < 0.1  # the best of independent pixels
    assert nats[1] > math.log(0.5) - 0.15  # the best there is


# ------------------------------------------------------------------------------------ DeepMedic


def test_deepmedic_sizes_are_the_papers():
    net = DeepMedic(1, DeepMedicConfig())
    assert net.margin == 40  # 110 -> 30 and 140 -> 60
    assert [p[0].weight.shape[0] for p in net.pathways] == [30, 30, 30]
    assert net(torch.zeros(1, 1, 95, 110, 95)).shape == (1, 250, 15, 30, 15)


def test_stitched_maps_equal_the_whole_volume_pass():
    torch.manual_seed(0)
    model = SSN(SSNConfig(num_classes=3, **SMALL_3D)).eval()
    volume = torch.randn(2, 1, 7, 12, 10)
    whole = model.backbone.stitch(volume, model._maps, 12)  # a single tile
    for tile in (3, 6):
        for a, b in zip(model.backbone.stitch(volume, model._maps, tile), whole):
            assert a.shape[2:] == volume.shape[2:]
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_sample_has_no_seam_where_patches_meet(monkeypatch):
    """Steps across borders of the 6^3 tiles are as high as in a sample of one whole-volume pass."""
    stitch = DeepMedic.stitch
    monkeypatch.setattr(DeepMedic, "stitch", lambda *a: stitch(*a, 7))  # 7: rounded down to 6
    torch.manual_seed(0)
    model = SSN(SSNConfig(**SMALL_3D)).eval()
    volume = torch.randn(1, 1, 18, 18, 18)
    stitched = model.sample(volume, 4, torch.Generator().manual_seed(0))
    maps = stitch(model.backbone, volume, model._maps, 18)
    whole = model._normal(*maps).sample(4, torch.Generator().manual_seed(0))
    step = lambda s: (s[..., 6] - s[..., 5]).abs().mean()
    torch.testing.assert_close(step(stitched), step(whole), atol=1e-5, rtol=0)
    torch.testing.assert_close(stitched, whole, atol=1e-4, rtol=0)


def test_random_patches_are_windows_of_the_volume():
    torch.manual_seed(0)
    net = SSN(SSNConfig(**SMALL_3D)).backbone
    assert isinstance(net, DeepMedic)
    label = torch.arange(10 * 8 * 9).view(1, 10, 8, 9) % 250
    image = label[:, None].float()
    mask = torch.rand(1, 10, 8, 9) > 0.1
    for _ in range(5):
        x, y, m = net.random_patch(image, label, mask, 6)
        assert y.shape == (1, 6, 6, 6) and x.shape == (1, 1, *[6 + 2 * net.margin] * 3)
        inner = x[:, 0, net.margin:-net.margin, net.margin:-net.margin, net.margin:-net.margin]
        assert torch.equal(inner[m], y[m].float()) and (y[~m] == 255).all()


def test_patches_beyond_a_small_volume_are_ignored():
    net = SSN(SSNConfig(**SMALL_3D)).backbone
    x, y, m = net.random_patch(torch.zeros(1, 1, 4, 8, 8), torch.zeros(1, 4, 8, 8).long(), None, 6)
    assert m is None and (y[:, 4:] == 255).all() and (y[:, :4] == 0).all()


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("config, message", [
    (dict(rank=-1), "rank=-1"), (dict(dims=4), "dims=4"), (dict(backbone="vit"), "'deepmedic'"),
    (dict(backbone="deepmedic"), "dims=2"),
    (dict(dims=3, deepmedic=dict(patch=20)), "patch=20 is no multiple of 15")])
def test_bad_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        SSN(SSNConfig(**config))


