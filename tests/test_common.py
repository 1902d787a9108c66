import math

import numpy as np
import analysis.pictures
import sources.files
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.distributions import LowRankMultivariateNormal

import common
from backbones.unet import UNet
from common import DiagonalNormal, LowRankNormal
from helpers import seeded


# ---------------------------------------------------------------------------- diagonal normal


def test_diagonal_normal_against_torch_distributions():
    q = DiagonalNormal(seeded(3, 2, 4, seed=1), seeded(3, 2, 4, seed=2))
    p = DiagonalNormal(seeded(3, 2, 4, seed=3), seeded(3, 2, 4, seed=4))
    as_torch = lambda d: Independent(Normal(d.mean.double(), d.log_std.double().exp()), 2)
    expected = kl_divergence(as_torch(q), as_torch(p))
    torch.testing.assert_close(q.kl(p).double(), expected, rtol=1e-6, atol=1e-6)
    z = seeded(3, 2, 4, seed=5)
    torch.testing.assert_close(q.log_prob(z).double(), as_torch(q).log_prob(z.double()),
                               rtol=1e-6, atol=1e-6)
    assert q.kl(q).abs().max() == 0


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_kl_survives_any_log_std(extreme):
    log_std = torch.full((1, 3), extreme, requires_grad=True)
    q, p = DiagonalNormal(torch.zeros(1, 3), log_std), DiagonalNormal(torch.ones(1, 3), -log_std)
    kl = q.kl(p)
    kl.sum().backward()
    assert kl.isfinite().all() and log_std.grad.isfinite().all()


def test_bounded_log_std_is_the_identity_where_networks_live():
    x = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(common.bounded_log_std(x), x, atol=0.025, rtol=0)
    assert common.bounded_log_std(torch.tensor([1e9, -1e9])).tolist() == [4, -4]


def test_diagonal_normal_samples_have_its_moments():
    q = DiagonalNormal(torch.full((20000, 1), 3.0), torch.full((20000, 1), math.log(0.5)))
    z = q.sample(torch.Generator().manual_seed(0))
    assert abs(z.mean() - 3) < 4 * 0.5 / 20000**0.5 and abs(z.std() - 0.5) < 0.01


def test_dropout_zeroes_a_share_p_and_keeps_the_mean():
    dropped = common.dropout(torch.full((2, 50_000), 7.0), 0.3, torch.Generator().manual_seed(0))
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 10.0))  # 7 / (1 - 0.3)
    share = (dropped == 0).double().mean(1)
    assert (share - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 50_000)  # four standard errors
    assert not torch.equal(dropped[0], dropped[1])  # each case has its own mask


def test_importance_ratio_by_hand():
    """Densities 1/2 under q and 1/4 under p; three of four draws from q, or all of them."""
    log_q, log_p = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    ratio = common.importance_log_ratio(log_q, log_p, 3, 1).exp()
    assert ratio.item() == pytest.approx(0.25 / (3 / 4 * 0.5 + 1 / 4 * 0.25))
    assert common.importance_log_ratio(log_q, log_p, 1, 0).exp().item() == pytest.approx(0.5)


def test_hierarchy_noise_doubles_its_maps_and_comes_in_parts(monkeypatch):
    """Five draws of two cases, two at a time; the whole draw is the same whatever the parts are."""
    image, results = torch.zeros(2, 1, 5, 8), []
    for chunk in (2 * 2 * 40 * 3, 2**30):  # draws x cases x pixels x width
        monkeypatch.setattr(common, "CHUNK_CPU", chunk)
        seed = torch.Generator().manual_seed(0)
        results.append(list(common.hierarchy_noise({0: 1, 1: 0, 2: 3}, 4, image, 5, seed, 3)))
    assert [{i: tuple(e.shape) for i, e in part.items()} for part in results[0]] == [
        {0: (2 * m, 1, 2, 2), 2: (2 * m, 3, 8, 8)} for m in (2, 2, 1)]
    for i, whole in results[1][0].items():
        assert torch.equal(torch.cat([part[i] for part in results[0]]), whole)


# ----------------------------------------------------------------------------- low-rank normal


def low_rank(batch=2, rank=3, classes=2, size=(4,)):
    factor = seeded(batch, rank, classes, *size, seed=2) if rank else None
    return LowRankNormal(seeded(batch, classes, *size, seed=1), factor,
                         seeded(batch, classes, *size, seed=3).exp())


def test_low_rank_samples_have_its_mean_and_covariance():
    normal, n = low_rank(), 200_000
    samples = normal.sample(n, torch.Generator().manual_seed(0))[:, 1].flatten(1)  # (n, K*S)
    reference = LowRankMultivariateNormal(normal.mean[1].flatten(), normal.factor[1].flatten(1).T,
                                          normal.diagonal[1].flatten())
    covariance = reference.covariance_matrix
    # standard error of a covariance estimate: sqrt((c_ii c_jj + c_ij^2) / n); five of them
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance**2) / n).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 5 * error).all()
    assert ((samples.mean(0) - reference.mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()


def test_rank_zero_is_independent_normals():
    normal = low_rank(rank=0)
    samples = normal.sample(50_000, torch.Generator().manual_seed(0))[:, 0].flatten(1)
    torch.testing.assert_close(samples.var(0), normal.diagonal[0].flatten(), rtol=0.05, atol=0)
    correlation = samples.T.corrcoef() - torch.eye(8)
    assert correlation.abs().max() < 5 / 50_000**0.5


@pytest.mark.parametrize("n", [1, 4, 5])
def test_antithetic_pairs_mirror_each_other(n):
    normal = low_rank()
    samples = normal.sample(n, antithetic=True)
    assert samples.shape == (n, 2, 2, 4)
    half = (n + 1) // 2
    torch.testing.assert_close(samples[: n - half] + samples[half:],
                               (2 * normal.mean).expand(n - half, -1, -1, -1))


def test_temperature_and_seed():
    normal = low_rank()
    draw = lambda t, seed=0: normal.sample(3, torch.Generator().manual_seed(seed), temperature=t)
    torch.testing.assert_close(draw(4.0) - normal.mean, 2 * (draw(1.0) - normal.mean))
    assert torch.equal(draw(0.0), normal.mean.expand(3, -1, -1, -1))
    assert torch.equal(draw(1.0), draw(1.0)) and not torch.equal(draw(1.0), draw(1.0, seed=1))


def test_scale_classes_moves_one_class_only():
    normal = low_rank(size=(4, 5))
    samples = normal.sample(3)
    scaled = normal.scale_classes(samples, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(scaled[:, :, 0], samples[:, :, 0])
    torch.testing.assert_close(scaled[:, :, 1] - normal.mean[:, 1],
                               -2 * (samples[:, :, 1] - normal.mean[:, 1]))


def test_sampling_is_float32_under_autocast():
    normal = low_rank(rank=4, size=(16,))
    plain = normal.sample(3, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        again = normal.sample(3, torch.Generator().manual_seed(0))
    assert torch.equal(plain, again)


# -------------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_against_a_float64_loop():
    logits, label = seeded(5, 2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[0, :2] = 255
    mask = torch.rand(2, 4, 4) > 0.3
    result = common.cross_entropy(logits, common.valid_label(label, mask))
    assert result.shape == (5, 2)
    for n in range(5):
        for b in range(2):
            expected = 0.0
            for i, j in np.ndindex(4, 4):
                if label[b, i, j] != 255 and mask[b, i, j]:
                    pixel = logits[n, b, :, i, j].double().numpy()
                    expected += np.log(np.exp(pixel).sum()) - pixel[label[b, i, j]]
            assert abs(result[n, b].item() - expected) < 1e-5 * max(1, expected)
    torch.testing.assert_close(common.cross_entropy(logits[0], common.valid_label(label, mask)),
                               result[0])


# ----------------------------------------------------------------------------- padding and U-Net


def test_reflection_by_more_than_the_size():
    x = torch.tensor([[[0.0, 1, 2]]])
    assert common.reflect_pad(x, [(4, 5)])[0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert common.reflect_pad(x[..., :1], [(1, 2)])[0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(5,), (8, 13), (3, 9, 4)])
def test_pad_and_crop_are_inverse(shape):
    x = seeded(2, 3, *shape)
    padded = common.pad_to_multiple(x, 8)
    assert all(s % 8 == 0 for s in padded.shape[2:])
    assert torch.equal(common.center_crop(padded, shape), x)


@pytest.mark.parametrize("option", [dict(norm="none"), dict(convs=2)])
def test_every_unet_option_changes_the_result(option):
    def run(**options):
        torch.manual_seed(0)
        return UNet(1, (4, 6), **options)(seeded(1, 1, 8, 8))

    assert not torch.allclose(run(), run(**option))


def test_unknown_choice_lists_the_valid_ones():
    with pytest.raises(ValueError, match="norm='layer': choose one of 'batch', 'none'"):
        UNet(1, (4, 6), norm="layer")


def test_a_wide_decoder_has_the_coarser_levels_widths():
    net = UNet(1, (4, 6, 8), wide=True, convs=1)
    assert [block[0].weight.shape[:2] for block in net.decoder] == [(8, 8 + 6), (6, 8 + 4)]
    assert net.out_channels == 6 and net(seeded(2, 1, 8, 8)).shape == (2, 6, 8, 8)


def test_a_unet_has_levels():
    with pytest.raises(ValueError, match="channels is empty"):
        UNet(1, ())


def test_orthogonal_initialisation():
    net = UNet(1, (4, 6), norm="none")
    common.init_orthogonal(net)
    weight = net.encoder[1][0].weight.flatten(1)  # (6, 36)
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)
    biases = torch.cat([m.bias for m in net.modules() if hasattr(m, "bias")])
    assert 0 < biases.abs().max() <= 2e-3


# ------------------------------------------------------------------------------ device and files


def test_device_errors_are_one_line():
    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(common.UserError, match="--device"):
            common.pick_device(name)
    assert common.pick_device("cpu").type == "cpu"


def test_a_failed_write_leaves_what_stood_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        sources.files.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_pictures_are_drawn(tmp_path):
    figure, axes = analysis.pictures.new_plot(1, 2, size=(3, 2))
    label = torch.tensor([[0, 1], [2, 255]])
    image = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    analysis.pictures.show_picture(axes[0], analysis.pictures.paint_label(label, image), "a")
    analysis.pictures.show_map(axes[1], image[0])
    picture = axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(picture[1, 1], 0.5)  # ignored: grey
    np.testing.assert_allclose(picture[0, 0], 0.0)  # background: the image's own black
    analysis.pictures.save_figure(figure, tmp_path / "three.png")
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
