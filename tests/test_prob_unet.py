"""Probabilistic U-Net: sizes and operations worked by hand, its bounds against float64 loops."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from analysis.paper_figures import plot_latent_map
from helpers import batch, count_parameters, seeded
from prob_unet import Image2ImageVAE, ProbUNet, ProbUNetConfig

GRID = [dict(prior=a, posterior=b, z_enters=c) for a, b, c in itertools.product(
    ("conditional", "fixed"), ("image_and_mask", "mask"), ("after", "input"))]


def small(seed=0, **fields):
    """Three levels, three classes, three latents; z made to matter more than at the start."""
    torch.manual_seed(seed)
    fields = dict(in_channels=2, num_classes=3, channels=(4, 5, 6), convs=1, latent_dim=3) | fields
    model = ProbUNet(ProbUNetConfig(**fields))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
                module.weight *= 1.5
    return model


# ------------------------------------------------------------------------- the paper's model


def unbuilt(Model):
    """The default model without memory for its weights: shapes only."""
    with torch.device("meta"):
        return Model()


def conv_shapes(module):
    return [tuple(p.shape) for p in module.parameters() if p.dim() == 4]


def test_default_shapes_are_the_papers():
    default = unbuilt(ProbUNet)

    def level(before, after):
        return [(after, before, 3, 3), (after, after, 3, 3), (after, after, 3, 3)]

    path = [level(1, 32), level(32, 64), level(64, 128), level(128, 256), level(256, 512)]
    assert conv_shapes(default.unet.encoder) == sum(path, [])
    assert conv_shapes(default.prior_net) == sum(path, [])
    path[0] = level(1 + 2, 32)  # image and one-hot mask
    assert conv_shapes(default.posterior_net) == sum(path, [])
    back = level(512 + 256, 256) + level(256 + 128, 128) + level(128 + 64, 64) + level(64 + 32, 32)
    assert conv_shapes(default.unet.decoder) == back
    for net in (default.prior_net, default.posterior_net):
        assert net.head.weight.shape == (2 * 6, 512)
    # the first of three 1x1 convolutions, on 32 features and 6 latents, is in two halves
    assert default.from_features.weight.shape == (32, 32, 1, 1)
    assert default.from_z.weight.shape == (32, 6) and default.from_z.bias is None
    assert conv_shapes(default.comb) == [(32, 32, 1, 1), (2, 32, 1, 1)]


def test_default_counts_are_those_stated():
    def path(first):
        return sum(9 * a * b + b + 2 * (9 * b * b + b)
                   for a, b in zip((first, 32, 64, 128, 256), (32, 64, 128, 256, 512)))

    def unet(first):
        back = sum(9 * (a + b) * b + b + 2 * (9 * b * b + b)
                   for a, b in ((512, 256), (256, 128), (128, 64), (64, 32)))
        return path(first) + back

    def head(latents):
        return 512 * 2 * latents + 2 * latents

    def comb(latents):
        return (32 + latents) * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2

    def count(Model):
        return count_parameters(unbuilt(Model))

    assert count(ProbUNet) == unet(1) + comb(6) + path(1) + head(6) + path(3) + head(6)
    assert f"{count(ProbUNet) / 1e6:.2f} M parameters" in ProbUNet.__doc__
    assert f"{(count(ProbUNet) - path(3) - head(6)) / 1e6:.2f} M of them for sampling" \
        in ProbUNet.__doc__
    assert count(Image2ImageVAE) == unet(1 + 3) + comb(0) + path(2) + head(3)
    assert f"{count(Image2ImageVAE) / 1e6:.2f} M parameters" in Image2ImageVAE.__doc__


def test_learning_rate_falls_to_1e_6_in_five_steps():
    drops = ProbUNet.TRAINING["lr_drops"]
    assert len(drops) == 5 and drops[-1][0] < ProbUNet.TRAINING["steps"]
    assert ProbUNet.TRAINING["lr"] * drops[-1][1] == pytest.approx(1e-6)


def test_image2image_vae_is_a_point_of_the_grid():
    c = Image2ImageVAE.Config()
    assert (c.prior, c.posterior, c.z_enters) == ("fixed", "mask", "input")
    assert (c.beta, c.latent_dim, c.channels) == (10, 3, ProbUNetConfig().channels)
    assert Image2ImageVAE.TRAINING is ProbUNet.TRAINING


# ------------------------------------------------------------------- against float64 loops


def normals(model, image, label):
    """Prior and posterior of torch.distributions, in float64."""
    return [Independent(Normal(d.mean.double(), d.log_std.double().exp()), 1)
            for d in (model.prior(image), model.posterior(image, label))]


def concatenated(model, image, z):
    """Eq. 2 as the paper writes it, in float64: z (n, B, N) broadcast and concatenated, one sample
    at a time -> (n, B, K, H, W)."""
    model, image = copy.deepcopy(model).double(), image.double()
    out = []
    for sample in z.double():
        z_map = sample[:, :, None, None].expand(-1, -1, *image.shape[2:])
        if model.config.z_enters == "input":
            x = model.from_features(model.unet(torch.cat([image, z_map], 1)))
        else:
            first = model.from_features
            weight = torch.cat([first.weight, model.from_z.weight[..., None, None]], 1)
            x = F.conv2d(torch.cat([model.unet(image), z_map], 1), weight, first.bias)
        for layer in model.comb:
            x = F.relu(x) if isinstance(layer, torch.nn.ReLU) else layer(x)
        out.append(x)
    return torch.stack(out).detach()


def log_prob_loop(logits, label):
    """sum_i log softmax(logits_i)[label_i] of one case, pixel after pixel."""
    total = 0.0
    for y, x in itertools.product(range(label.shape[0]), range(label.shape[1])):
        k = label[y, x].item()
        if k != 255:
            values = logits[:, y, x].tolist()
            top = max(values)
            total += values[k] - top - math.log(sum(math.exp(v - top) for v in values))
    return total


def noise(seed, *shape):
    torch.manual_seed(seed)
    return torch.randn(*shape).double()


@pytest.mark.parametrize("point", GRID, ids=lambda p: "-".join(p.values()))
def test_loss_is_minus_the_elbo(point):
    model, (image, label) = small(beta=1.7, **point), batch()
    mask = seeded(*label.shape, seed=5) > -1
    torch.manual_seed(3)
    loss, terms = model(image, label, mask)
    label = torch.where(mask, label, 255)
    prior, posterior = normals(model, image, label)
    z = posterior.mean + posterior.stddev * noise(3, 2, 3)
    logits = concatenated(model, image, z[None])[0]
    reconstruction = -sum(map(log_prob_loop, logits, label)) / 2
    kl = kl_divergence(posterior, prior).mean()
    assert kl > 1e-3
    torch.testing.assert_close(terms["reconstruction"].item(), reconstruction, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["kl"].double(), kl, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.item(), reconstruction + 1.7 * kl.item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("z_enters", ["after", "input"])
def test_importance_bound(z_enters, n, monkeypatch):
    model, (image, label) = small(z_enters=z_enters), batch()
    mask = seeded(*label.shape, seed=5) > -1
    monkeypatch.setattr("common.CHUNK_CPU", 2 * 2 * 4 * 4 * 8 * 12)  # two samples at a time
    torch.manual_seed(4)
    bound = model.log_likelihood(image, label, n, mask)
    label = torch.where(mask, label, 255)
    prior, posterior = normals(model, image, label)
    from_q = {1: 1, 5: 3}[n]
    torch.manual_seed(4)
    e_q = torch.randn(2, from_q, 3).double().transpose(0, 1)  # (n, B, N)
    e_p = torch.randn(2, n - from_q, 3).double().transpose(0, 1)
    z = torch.cat([posterior.mean + posterior.stddev * e_q, prior.mean + prior.stddev * e_p])
    logits = concatenated(model, image, z)
    for case in range(2):
        log_p = [log_prob_loop(logits[i, case], label[case]) for i in range(n)]
        weights = []
        for i in range(n):
            p, q = (d.log_prob(z[i])[case].exp().item() for d in (prior, posterior))
            weights.append(p / (from_q / n * q + (n - from_q) / n * p))
        best = max(log_p)
        mean = sum(math.exp(p - best) * w for p, w in zip(log_p, weights)) / n
        torch.testing.assert_close(bound[case].item(), best + math.log(mean), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_bound_nears_the_integral_even_where_the_posterior_is_off(shift):
    """One latent: p(y | x) by the trapezoidal rule. The posterior is moved by `shift` of its own
    standard deviations; draws from it alone would then miss all that counts."""
    model, (image, label) = small(seed=2, latent_dim=1), batch(1)
    prior, posterior = normals(model, image, label)
    with torch.no_grad():
        model.posterior_net.head.bias[0] += shift * posterior.stddev.item()
    grid = torch.linspace(-12, 12, 401, dtype=torch.float64)[:, None, None]
    z = prior.mean + prior.stddev * grid
    logits = model.decode(image, z.float()).double()
    log_p = torch.tensor([log_prob_loop(sample[0], label[0]) for sample in logits])
    density = torch.exp(-grid[:, 0, 0].square() / 2) / math.sqrt(2 * math.pi)
    best = log_p.max()
    exact = best + (torch.exp(log_p - best) * density).sum().mul(24 / 400).log()
    torch.manual_seed(0)
    assert abs(model.log_likelihood(image, label, 10_000)[0] - exact) < 0.05
    few = model.log_likelihood(image.expand(200, -1, -1, -1), label.expand(200, -1, -1), 8)
    assert few.quantile(0.05) > exact - 10 and few.mean() < exact + 3 * few.std() / 200**0.5


def test_bound_rises_with_n_and_stays_below_4096_samples():
    model, (image, label) = small(), batch(1)
    torch.manual_seed(0)
    image, label = image.expand(200, -1, -1, -1), label.expand(200, -1, -1)  # 200 repeats
    bounds = {n: model.log_likelihood(image, label, n) for n in (1, 4, 16, 64)}
    high = model.log_likelihood(image[:1], label[:1], 4096).item()
    means = [b.mean().item() for b in bounds.values()] + [high]
    error = max(b.std().item() for b in bounds.values()) / 200**0.5
    assert means[1] - means[0] > 5 * error  # there is something to gain
    assert all(more > fewer - 3 * error for fewer, more in itertools.pairwise(means))
    torch.manual_seed(1)
    elbo = -model(image, label)[0].item()
    assert abs(elbo - means[0]) < 5 * error


# ----------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("z_enters", ["after", "input"])
@pytest.mark.parametrize("chunk", [1, 2 * 2 * 4 * 4 * 8 * 12, 2**30])
def test_samples_are_eq_2_whatever_is_computed_at_once(z_enters, chunk, monkeypatch):
    monkeypatch.setattr("common.CHUNK_CPU", chunk)
    model, (image, _) = small(z_enters=z_enters), batch()
    sizes = []
    model.comb.register_forward_hook(lambda module, args, out: sizes.append(len(out) // 2))
    samples = model.sample(image, 5, torch.Generator().manual_seed(0))
    assert sizes == {1: [1] * 5, 2**30: [5]}.get(chunk, [2, 2, 1])
    prior = model.prior(image)
    noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    expected = concatenated(model, image, prior.mean + prior.std * noise)
    torch.testing.assert_close(samples.double(), expected, rtol=1e-5, atol=1e-5)
    assert samples.std(0).max() > 0.1 and not samples.requires_grad


def test_predict_and_reconstruct_stand_at_the_means():
    model, (image, label) = small(), batch()
    prior, posterior = model.prior(image), model.posterior(image, label)
    expected = concatenated(model, image, torch.stack([prior.mean, posterior.mean]))
    torch.testing.assert_close(model.predict(image).double(), expected[0].softmax(1),
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.reconstruct(image, label).double(), expected[1],
                               rtol=1e-5, atol=1e-5)
    assert not model.predict(image).requires_grad
    assert not model.reconstruct(image, label).requires_grad


def flops(model, image, n):
    with FlopCounterMode(display=False) as counter:
        model.sample(image, n)
    return counter.get_total_flops()


def encoder_products(first, pixels):
    """Multiplications of one pass through channels (4, 5, 6), one 3x3 convolution a level."""
    return 9 * (first * 4 * pixels + 4 * 5 * pixels // 4 + 5 * 6 * pixels // 16)


def decoder_products(pixels):
    return 9 * ((6 + 5) * 5 * pixels // 4 + (5 + 4) * 4 * pixels)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_operations_are_once_and_n_times_the_rest(chunk, monkeypatch):
    monkeypatch.setattr("common.CHUNK_CPU", chunk)
    model, (image, _) = small(), batch(1)
    pixels = 8 * 12
    prior = encoder_products(2, pixels) + 6 * 2 * 3
    once = prior + encoder_products(2, pixels) + decoder_products(pixels) + 4 * 4 * pixels
    rest = 3 * 4 + (4 * 4 + 4 * 3) * pixels  # z's half of the first layer, and two more layers
    for n in (1, 2, 7):
        assert flops(model, image, n) == 2 * (once + n * rest)


def test_z_at_the_input_costs_a_unet_a_sample():
    model, (image, _) = small(z_enters="input"), batch(1)
    pixels = 8 * 12
    prior = encoder_products(2, pixels) + 6 * 2 * 3
    rest = encoder_products(2 + 3, pixels) + decoder_products(pixels) \
        + (4 * 4 + 4 * 4 + 4 * 3) * pixels
    for n in (1, 3):
        assert flops(model, image, n) == 2 * (prior + n * rest)


# ---------------------------------------------------------------------------- the ablations


def test_prior_fixed():
    image, _ = batch()
    fixed = small(prior="fixed").prior(image)
    assert fixed.mean.abs().max() == 0 and (fixed.std == 1).all()
    prior = small().prior(image)
    assert (prior.mean[0] - prior.mean[1]).abs().max() > 1e-3  # of two images
    assert (prior.std[0] - prior.std[1]).abs().max() > 1e-3


@pytest.mark.parametrize("posterior, differs", [("mask", False), ("image_and_mask", True)])
def test_what_the_posterior_is_given(posterior, differs):
    model, (image, label) = small(posterior=posterior), batch()
    mean = lambda image, label: model.posterior(image, label).mean
    assert torch.equal(mean(image, label), mean(2 * image, label)) != differs
    assert not torch.equal(mean(image, label), mean(image, label.flip(1)))


@pytest.mark.parametrize("point", GRID, ids=lambda p: "-".join(p.values()))
def test_gradient_reaches_every_parameter(point):
    model, (image, label) = small(**point), batch(4)
    model(image, label)[0].backward()
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() == 0]
    assert not dead
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert ("prior_net" in names) == (point["prior"] == "conditional")
    assert ("from_z" in names) == (point["z_enters"] == "after")


def test_the_posterior_is_given_the_mask_minus_a_half(monkeypatch):
    model, (image, label) = small(), batch()
    given = []
    monkeypatch.setattr(model.posterior_net, "forward", lambda x: given.append(x))
    model.posterior(image, label)
    hot = torch.stack([(label == k).float() for k in range(3)], 1)
    assert torch.equal(given[0], torch.cat([image, hot - 0.5], 1))


def test_more_layers_in_f_comb():
    image, _ = batch()
    model = small(comb_layers=4)
    assert conv_shapes(model.comb) == [(4, 4, 1, 1), (4, 4, 1, 1), (3, 4, 1, 1)]
    assert model.sample(image, 2).shape == (2, 2, 3, 8, 12)


@pytest.mark.parametrize("fields, message", [
    (dict(prior="none"), "prior='none': choose one of 'conditional', 'fixed'"),
    (dict(posterior="image"), "posterior='image': choose one of"),
    (dict(z_enters="before"), "z_enters='before': choose one of"),
    (dict(dims=4), "dims=4: choose one of 1, 2, 3"),
    (dict(latent_dim=0), "latent_dim is at least 1"),
    (dict(comb_layers=1), "comb_layers at least 2")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ProbUNet(ProbUNetConfig(channels=(2, 2), **fields))


# ----------------------------------------------------------------------------------- training


def step(model, optimizer, image, label):
    optimizer.zero_grad()
    loss, terms = model(image, label)
    loss.backward()
    optimizer.step()
    return loss.item(), terms


def test_a_tiny_ambiguous_batch_overfits():
    """One image with two readers: samples hit each of both maps exactly, and little else."""
    torch.manual_seed(0)
    model = ProbUNet(ProbUNetConfig(channels=(8, 16), convs=1, latent_dim=2))
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, :, :4], label[1, 2:6, 2:6] = 1, 1
    image = seeded(1, 1, 8, 8).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        _, terms = step(model, optimizer, image, label.repeat(4, 1, 1))
    assert terms["reconstruction"] < 1  # nats, of 64 pixels
    assert terms["kl"] > 0.5  # log 2 would do; 0 is a collapse
    assert torch.equal(model.reconstruct(image[:2], label).argmax(1), label)
    samples = model.sample(image[:1], 200, torch.Generator().manual_seed(0)).argmax(2)[:, 0]
    hits = (samples[:, None] == label).flatten(2).all(2).float().mean(0)
    assert hits.min() > 0.2 and hits.sum() > 0.75


def test_images_of_any_scale_give_no_nan():
    torch.manual_seed(0)
    model = ProbUNet(ProbUNetConfig(channels=(8, 16, 16), convs=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i in range(40):
        image, label = batch(classes=2, channels=1, size=(16, 16), seed=i)
        loss, terms = step(model, optimizer, 100 * image, label)
        assert math.isfinite(loss) and terms["kl"].isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------ picture


def test_latent_map(tmp_path, monkeypatch):
    model, (image, label) = small(latent_dim=2), batch(1)
    seen = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda image, z: seen.append(z) or decode(image, z))
    labels = torch.cat([label, label.flip(1)]).to(torch.uint8)
    plot_latent_map(model, image[0], labels, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    prior = model.prior(image)
    position = ((seen[0][:, 0] - prior.mean) / prior.std).view(19, 19, 2)  # rows from the top
    torch.testing.assert_close(position[0, 0], torch.tensor([-4.5, 4.5]), rtol=0, atol=1e-4)
    torch.testing.assert_close(position[9, 10], torch.tensor([0.5, 0]), rtol=0, atol=1e-4)
