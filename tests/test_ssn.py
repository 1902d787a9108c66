import itertools
import math

import pytest
import torch
from torch import nn

import helpers
from backbones.deepmedic import DeepMedic, DeepMedicConfig, Layer, random_voxel
from ssn import SSN, SSNConfig, train_toy

NARROW = helpers.LEVELS
SMALL_3D = helpers.DEEPMEDIC | dict(dims=3)


def case(*size, classes=2, batch=2, seed=0):
    return helpers.batch(batch, size, classes, channels=1, seed=seed, ignored=0)


def test_default_is_the_papers_lidc_model():
    model = SSN()
    assert f"{helpers.count_parameters(model) / 1e6:.2f}" == "10.32"  # million
    assert model.config.rank == 10 and model.config.mc_samples == 20
    unet, join = model.backbone
    levels = [block[0].weight.shape[0] for block in unet.encoder]
    assert levels == [32, 64, 128, 192, 192, 192, 192]
    into_and_out_of = [(block[0].weight.shape[1], block[-3].weight.shape[0])
                       for block in unet.decoder]
    assert into_and_out_of == 3 * [(384, 192)] + [(320, 192), (256, 128), (160, 64)]
    assert [tuple(p.shape[:2]) for p in join.parameters() if p.dim() == 4] \
        == [(32, 64), (32, 32), (32, 32)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 13 * 3 + 3 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.1)}
    assert model.factor.weight.shape == (20, 32, 1, 1)  # R * K maps
    assert SSN.TRAINING["lr"] == 1e-3 and SSN.TRAINING["batch_size"] == 12


def test_backbone_starts_with_hes_weights():
    torch.manual_seed(0)
    for name, p in SSN().backbone.named_parameters():
        if p.dim() == 4 and p.numel() > 10_000:
            assert abs(p.std() / (2 / p[0].numel()) ** 0.5 - 1) < 0.05, name


def test_a_loss_leaves_nothing_behind_but_batch_norm():
    """So the loss of a batch depends on weights and noise alone, however many steps went before."""
    model = SSN(SSNConfig(**NARROW))
    image, label = case(8, 8)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model(image, label)[0]
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] and model.factor.weight.grad.any()
    assert {name.split(".")[-1] for name, _ in model.named_buffers()} \
        == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_covariance_starts_small():
    torch.manual_seed(0)
    model = SSN(SSNConfig(**NARROW)).eval()
    normal = model.distribution(case(16, 16)[0])
    assert (normal.factor.square().sum(1) + normal.diagonal).mean().sqrt() < 0.3


def test_heads_are_float32_under_autocast():
    backbone = nn.Identity()
    backbone.out_channels = 4
    model = SSN(SSNConfig(rank=2), backbone=backbone)
    features = helpers.seeded(1, 4, 5, 6)
    plain = model.distribution(features)
    with torch.autocast("cpu", torch.bfloat16):
        again = model.distribution(features)
    for name in ("mean", "factor", "diagonal"):
        assert torch.equal(getattr(plain, name), getattr(again, name))


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
    nn.init.constant_(model.log_diagonal.bias, -1e9)  # bounded to a std of exp(-4)
    image, label = case(8, 8)
    expected = nn.functional.cross_entropy(model.distribution(image).mean, label, reduction="none")
    nats = model.log_likelihood(image, label, 500)
    torch.testing.assert_close(nats, -expected.sum((1, 2)), rtol=2e-3, atol=0)


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


def test_low_rank_learns_the_toy_and_diagonal_cannot():
    """Fig. 2 in small: 6 pixels, of which the middle two are both on or both off."""
    label = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    image = torch.zeros(2, 1, 6)
    nats = [train_toy(image, label, rank, steps=600).log_likelihood(image, label, 20_000).mean()
            for rank in (0, 2)]
    assert abs(nats[0] - 2 * math.log(0.5)) < 0.1  # the best of independent pixels
    assert nats[1] > math.log(0.5) - 0.15  # the best there is


# ------------------------------------------------------------------------------------ DeepMedic


def test_deepmedic_is_the_papers():
    net = DeepMedic(4)
    assert net.margin == 40  # 110 -> 30 and 140 -> 60
    assert net(torch.zeros(1, 4, 95, 110, 95)).shape == (1, 50, 15, 30, 15)
    for pathway in net.pathways:
        shapes = [(m.in_channels, m.out_channels) for m in pathway.modules()
                  if isinstance(m, nn.Conv3d)]
        assert shapes == [(4, 30), (30, 30), (30, 40), (40, 40), (40, 40), (40, 40), (40, 50),
                          (50, 50)]
        assert [layer.shortcut for layer in pathway[1:]] == [True, False, True, True, True, False,
                                                             True]
    join = [(m.conv.in_channels, m.conv.out_channels, m.p, m.shortcut) for m in net.join]
    assert join == [(150, 250, 0, False), (250, 250, 0.5, True), (250, 50, 0.5, False)]
    convs = 27 * (30 * 4 + 30 * 30 + 40 * 30 + 3 * 40 * 40 + 50 * 40 + 50 * 50)
    norms = 2 * (2 * 30 + 4 * 40 + 50) + 7  # without biases, and with one slope a PReLU
    join = 250 * 150 + 250 * 250 + 50 * 250 + 2 * (150 + 250 + 250) + 3
    assert helpers.count_parameters(net) == 3 * (convs + norms) + join


def test_a_layer_by_hand():
    torch.manual_seed(0)
    layer = Layer(2, 2, 3).double().eval()
    layer.activation.weight.data.fill_(-0.5)
    x = helpers.seeded(1, 2, 5, 4, 3, dtype=torch.float64)
    normed = x / math.sqrt(1 + 1e-5)
    active = torch.where(normed > 0, normed, -0.5 * normed)
    expected = nn.functional.conv3d(active, layer.conv.weight)
    torch.testing.assert_close(layer(x), expected + x[..., 1:-1, 1:-1, 1:-1])


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
    net = SSN(SSNConfig(**SMALL_3D)).backbone
    torch.manual_seed(0)
    label = torch.arange(2 * 10 * 8 * 9).view(2, 10, 8, 9) % 250
    image = label[:, None].float()
    label[torch.rand(2, 10, 8, 9) < 0.1] = 255
    for _ in range(5):
        x, y = net.random_patches(image, label)
        m = y != 255
        assert y.shape == (2, 6, 6, 6) and x.shape == (2, 1, *[6 + 2 * net.margin] * 3)
        inner = x[:, 0, net.margin:-net.margin, net.margin:-net.margin, net.margin:-net.margin]
        assert torch.equal(inner[m], y[m].float()) and not m.all()


@pytest.mark.parametrize("side", [6, 9])
def test_a_patch_is_centred_on_its_voxel_and_ignored_beyond_the_volume(side):
    """The only lesion voxel is drawn half of the time, and lies in a corner."""
    net = DeepMedic(1, DeepMedicConfig(**SMALL_3D["deepmedic"] | dict(patch=side)))
    label = torch.zeros(1, 4, 8, 7).long()
    label[0, 0, 7, 1] = 1
    torch.manual_seed(0)
    half, found = side // 2, 0
    for _ in range(20):
        x, y = net.random_patches(label[:, None].float(), label)
        if y[0, half, half, half] == 1:
            found += 1
            expected = torch.full((side, side, side), 255)
            inside = torch.zeros(4, 8, 7).long()
            inside[0, 7, 1] = 1
            for i, j, k in itertools.product(range(side), repeat=3):
                z, v, w = i - half, j - half + 7, k - half + 1
                if 0 <= z < 4 and 0 <= v < 8 and 0 <= w < 7:
                    expected[i, j, k] = inside[z, v, w]
            assert torch.equal(y[0], expected)
            assert x[0, 0, half + net.margin, half + net.margin, half + net.margin] == 1
    assert 3 < found < 17


def test_half_of_the_patches_stand_on_a_lesion_the_others_in_healthy_brain():
    label = torch.full((5, 6, 7), 255)
    label[1:3, 1:5, 1:6] = 0
    label[2, 2:4, 2:4] = 3
    drawn = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    centers = torch.tensor([[int(i) for i in random_voxel(label, u)] for u in drawn])
    found = label[tuple(centers.T)]
    assert (found != 255).all()
    assert abs((found == 3).float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert len(torch.unique(centers, dim=0)) == 40  # each of them, the corners too
    only = label.masked_fill(label == 3, 0)  # no lesion
    assert all(only[tuple(random_voxel(only, u))] == 0 for u in drawn[:100])
    only = label.masked_fill(label == 0, 255)  # nothing but a lesion
    assert all(only[tuple(random_voxel(only, u))] == 3 for u in drawn[:100])
    label[:] = 255  # nothing at all: no error
    random_voxel(label, drawn[0])


def first_loss(rank, world):
    """Loss of a volume model in training, with dropout, on rank's rows of a batch of four."""
    torch.manual_seed(0)
    model = SSN(SSNConfig(mc_samples=4, **SMALL_3D))
    for module in model.modules():  # batch norm over the whole batch is models.distribute's task
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    image, label = case(9, 10, 8, batch=4)
    torch.manual_seed(1)
    return model(*(tensor.chunk(world)[rank] for tensor in (image, label)))[0].detach()


def test_two_processes_draw_the_patches_and_masks_of_one(tmp_path):
    helpers.run_two(first_loss_of_two, tmp_path)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, first_loss(0, 1))
    assert halves[0] != halves[1]


def first_loss_of_two(rank, folder):
    torch.save(first_loss(rank, 2), folder / f"{rank}.pt")


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("config, message", [
    (dict(rank=-1), "rank=-1"), (dict(dims=4), "dims=4"), (dict(backbone="vit"), "'deepmedic'"),
    (dict(backbone="deepmedic"), "dims=2"),
    (dict(dims=3, deepmedic=dict(patch=20)), "patch=20 is no multiple of 15"),
    (dict(diagonal_min=0.0), "diagonal_min above 0")])
def test_bad_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        SSN(SSNConfig(**config))


