"""VAE U-Net: the loss against torch.distributions and loops, its two kinds of latents, sampling."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import analysis.paper_figures
import models
import vae_unet
from helpers import run_two
from vae_unet import LatentSkip, VAEUNet, VAEUNetConfig, dice_loss

BOUND = 4  # of common.bounded_log_std
UNET = dict(channels=(4, 5, 6), convs=1)
SWIN = dict(backbone="swin", width=4, depths=(2, 2, 1), heads=(1, 2, 4), patch=2, window=3,
            drop_path=0.0)
BOTH = pytest.mark.parametrize("backbone", [UNET, SWIN], ids=["unet", "swin"])
KINDS = pytest.mark.parametrize("latents", ["mask", "image"])
WEIGHTS = dict(ce_weight=0.7, dice_weight=0.2, kl_weight=1.7)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(backbone=UNET, seed=0, **fields):
    """Three levels, three classes; the latents made to matter more than at the start."""
    torch.manual_seed(seed)
    model = VAEUNet(VAEUNetConfig(**dict(in_channels=2, num_classes=3) | backbone | fields))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LatentSkip):
                module.conv.weight.normal_(std=0.3)
                module.conv.bias.uniform_(-1, 1)
    return model


def batch(count=2, size=(16, 8), classes=3, channels=2, seed=0):
    """Images, and labels with some ignored pixels."""
    g = generator(seed)
    label = torch.randint(classes, (count, *size), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.1] = 255
    return seeded(count, channels, *size, seed=seed), label


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def count(module):
    return sum(p.numel() for p in module.parameters())


# -------------------------------------------------- the objective, in float64 from its definition


def normals(skips, features):
    """The latents' distributions by torch.distributions, of all levels but the coarsest."""
    result = []
    for skip, f in zip(copy.deepcopy(skips).double(), features):
        mean, log_std = skip.conv(f).chunk(2, 1)
        result.append(Normal(mean, (BOUND * torch.tanh(log_std / BOUND)).exp()))
    return result


def distributions(model, image, label):
    """(features, the image's distributions, the mask's) from their definition."""
    net = copy.deepcopy(model.backbone).double()
    grey = torch.zeros(label.shape, dtype=torch.float64)
    hot = torch.zeros(len(label), 3, *label.shape[1:], dtype=torch.float64)
    for at in itertools.product(*map(range, label.shape)):
        value = label[at].item()
        grey[at] = {0: 0.0, 1: 0.5, 2: 1.0, 255: -1.0}[value]
        if value != 255:
            hot[at[0], value, at[1], at[2]] = 1
    if model.config.latents == "image":
        features = net.encode(image.double())
        of_mask = normals(model.mask_skips, copy.deepcopy(model.mask_net).double().encode(hot))
        return features, normals(model.skips, features), of_mask, hot
    features = net.encode(torch.cat([image.double(), grey[:, None].expand(-1, 2, -1, -1)]))
    split = [f.chunk(2) for f in features]
    return ([f[0] for f in split], normals(model.skips, [f[0] for f in split]),
            normals(model.skips, [f[1] for f in split]), hot)


def decoded(model, features, z):
    """Logits in float64 for latents z of every skip connection."""
    model = copy.deepcopy(model).double()
    joined = [torch.cat([f, level], 1) for f, level in zip(features, z)]
    return model.head(model.backbone.decode([*joined, features[-1]]))


def one_of_two(rank, folder):
    model = small().train()
    image, label = uneven_batch()
    run = models.distribute(model, image.device)
    torch.save(outcome(run, model, image.chunk(2)[rank], label.chunk(2)[rank]),
               folder / f"{rank}.pt")


def uneven_batch():
    """Four cases, in which classes and ignored pixels are spread unevenly."""
    label = torch.arange(4 * 64).view(4, 8, 8) // 90
    label[3, :5] = 255
    return seeded(4, 2, 8, 8), label


def outcome(run, model, image, label):
    torch.manual_seed(1)
    loss, _ = run(image, label)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_two_processes_do_what_one_does(tmp_path):
    """Dice and the number of valid pixels are those of the whole batch."""
    run_two(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = small().train()
    expected = outcome(model, model, *uneven_batch())
    torch.testing.assert_close((first[0] + second[0]) / 2, expected[0], rtol=1e-5, atol=1e-5)
    for rank in (first, second):
        torch.testing.assert_close(rank[1:], expected[1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("elbo", [False, True])
@KINDS
@BOTH
def test_loss_is_the_papers(backbone, latents, elbo):
    """CE and Dice at z of the mask (code) or the image (text); KL(image's || mask's), summed, or
    the ELBO's KL(mask's || image's)."""
    model = small(backbone, latents=latents, kl_scale="mean", elbo_kl=elbo, **WEIGHTS)
    image, label = batch()
    torch.manual_seed(3)
    loss, terms = model(image, label)
    features, of_image, of_mask, hot = distributions(model, image, label)
    torch.manual_seed(3)
    noise = [torch.randn(q.mean.shape).double() for q in of_image]
    drawn, other = (of_mask, of_image) if latents == "mask" else (of_image, of_mask)

    kls = [kl_divergence(p, q).mean() for p, q in zip(of_image, of_mask)]
    others = [kl_divergence(q, p).mean() for p, q in zip(of_image, of_mask)]
    assert len(kls) == 2 and abs(sum(kls) - sum(others)) > 0.05  # the direction matters
    kls = others if elbo else kls
    logits, wrong = (decoded(model, features, [q.mean + q.stddev * e for q, e in zip(of, noise)])
                     for of in (drawn, other))
    assert (logits - wrong).abs().max() > 0.05

    ce = -(logits.log_softmax(1) * hot).sum() / hot.sum()
    prob, dice = logits.softmax(1) * hot.sum(1, keepdim=True), 0
    for k in range(3):
        inter, sizes = prob[:, k] * hot[:, k], prob[:, k] ** 2 + hot[:, k]
        dice = dice + (1 - (2 * inter.sum() + 1e-5) / (sizes.sum() + 1e-5)) / 3
    for i, kl in enumerate(kls):
        same(terms[f"kl_{i}"].double(), kl)
    same(terms["kl"].double(), sum(kls))
    same(terms["cross_entropy"].double(), ce)
    same(terms["dice"].double(), dice)
    same(loss.double(), 0.7 * ce + 0.2 * dice + 1.7 * sum(kls))


def test_kl_scales():
    """KL of a latent 1/2 everywhere: "mean" is it at any level; "pixel" is 4^-i of it at level i,
    and twice that where half of the pixels are ignored."""
    for scale, expected in (("mean", (0.5, 0.5)), ("pixel", (1.0, 0.25))):
        model, (image, label) = small(latents="image", kl_scale=scale), batch()
        label = torch.zeros_like(label)
        label[:, :8] = 255
        with torch.no_grad():
            for skips, mean in ((model.skips, 1.0), (model.mask_skips, 0.0)):
                for skip in skips:
                    skip.conv.weight.zero_()
                    skip.conv.bias.copy_(torch.tensor([mean, 0.0]))
        terms = model(image, label)[1]
        for i, kl in enumerate(expected):
            assert terms[f"kl_{i}"].item() == pytest.approx(kl, abs=1e-6)
        assert terms["kl"].item() == pytest.approx(sum(expected), abs=1e-6)


def test_dice_by_hand():
    """Two classes, three valid pixels: p(1) = 3/4, 1/4, 1/2 for labels 1, 0, 1."""
    ratio = torch.tensor([[[3.0, 1 / 3, 1.0, 7.0]]])
    logits = torch.cat([torch.zeros_like(ratio), ratio.log()], 1)
    ones = 2 * (3 / 4 + 1 / 2) / (9 / 16 + 1 / 16 + 1 / 4 + 2)
    zeros = 2 * (3 / 4) / (1 / 16 + 9 / 16 + 1 / 4 + 1)
    loss = dice_loss(logits, torch.tensor([[1, 0, 1, 255]]))
    assert loss.item() == pytest.approx(1 - (ones + zeros) / 2, abs=1e-5)
    # class 1 is absent, and its Dice of nearly 0 counts; without any label there is no loss
    zeros = 2 * (1 / 4 + 3 / 4 + 1 / 2) / (1 / 16 + 9 / 16 + 1 / 4 + 3)
    loss = dice_loss(logits, torch.tensor([[0, 0, 0, 255]]))
    assert loss.item() == pytest.approx(1 - zeros / 2, abs=2e-5)
    assert dice_loss(logits, torch.tensor([[255] * 4])).item() == pytest.approx(0, abs=1e-6)


def gradient(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True,
                                allow_unused=True)
    return sum(g.abs().sum().item() for g in found if g is not None)


@pytest.mark.parametrize("reparameterised", [True, False])
def test_only_reparameterised_draws_teach_the_latents_by_cross_entropy(reparameterised):
    model = small(kl_weight=0.0, reparameterised=reparameterised)
    assert (gradient(model(*batch())[0], model.skips) > 0) == reparameterised
    model = small(reparameterised=reparameterised)
    assert gradient(model(*batch())[0], model.skips) > 0  # by the KL


def test_running_statistics_are_of_samples_of_q_and_p():
    """A norm of the decoder that follows a convolution: its mean moves twice a step."""
    model, (image, label), seen = small().train(), batch(), []
    convolution, norm = model.backbone.decoder[-1][:2]
    convolution.register_forward_hook(
        lambda module, args, out: seen.append(out.detach().mean((0, 2, 3))))
    expected = norm.running_mean.clone()
    model(image, label)
    assert len(seen) == 2 and not torch.allclose(*seen, atol=1e-3)
    for mean in seen:
        expected.lerp_(mean, norm.momentum)
    torch.testing.assert_close(norm.running_mean, expected)
    model.eval()(image, label)
    assert len(seen) == 3


def test_a_separate_mask_encoder_learns_from_the_kl_alone():
    for weight in (0.0, 1.0):
        model = small(latents="image", kl_weight=weight)
        loss = model(*batch())[0]
        for module in (model.mask_net, model.mask_skips):
            assert (gradient(loss, module) > 0) == (weight > 0)
    assert not hasattr(small(), "mask_net")


@KINDS
def test_samples_and_predictions_come_from_the_image_alone(latents):
    model, (image, label) = small(latents=latents).eval(), batch()
    features, of_image, of_mask, _ = distributions(model, image, label)
    means = decoded(model, features, [p.mean for p in of_image])
    same(model.predict(image).double(), means.softmax(1))
    same(model.reconstruct(image, label).double(),
         decoded(model, features, [q.mean for q in of_mask]))
    g = generator(5)
    z = [[p.mean + p.stddev * torch.randn(p.mean.shape, generator=g) for p in of_image]
         for _ in range(3)]
    samples = model.sample(image, 3, generator(5))
    same(samples.double(), torch.stack([decoded(model, features, level) for level in z]))
    assert samples.std(0).max() > 0.05


# ---------------------------------------------------------------------------- log-likelihood


@pytest.mark.parametrize("n", [1, 4, 5])
@KINDS
def test_log_likelihood_is_importance_sampling(latents, n):
    """Draws and weights written out: ceil(n/2) from the mask's distribution, the others from the
    image's; all from the image's where the decoder was trained on those."""
    model, (image, label) = small(latents=latents).eval(), batch()
    mask = seeded(*label.shape, seed=5) > -1
    torch.manual_seed(4)
    got = model.log_likelihood(image, label, n, mask)
    label = torch.where(mask, label, 255)
    features, of_image, of_mask, hot = distributions(model, image, label)
    torch.manual_seed(4)
    share = math.ceil(n / 2) / n if latents == "mask" else 0.0
    weights = []
    for i in range(n):
        of = of_mask if i < share * n else of_image
        z = [q.mean + q.stddev * torch.randn(q.mean.shape).double() for q in of]
        log_y = (decoded(model, features, z).log_softmax(1) * hot).sum((1, 2, 3))
        log_p, log_q = (sum(d.log_prob(level).flatten(1).sum(1) for d, level in zip(ds, z))
                        for ds in (of_image, of_mask))
        mixture = share * log_q.exp() + (1 - share) * log_p.exp()
        weights.append(log_y.exp() * log_p.exp() / mixture)
    same(got.double(), torch.stack(weights).mean(0).log(), 1e-4)


def test_log_likelihood_is_a_lower_bound_on_average_and_tightens():
    """Of log p(y | x), known from 20,000 draws of the image's latents (error below 0.02 nats)."""
    model = small(channels=(4, 5)).eval()
    image, label = seeded(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.long)
    torch.manual_seed(0)
    truth = model.sample(image, 20_000)
    log_p = torch.cat([-vae_unet.cross_entropy(part, label) for part in truth.split(5000)])
    truth = (log_p.logsumexp(0) - math.log(len(log_p))).item()
    image, label = image.expand(200, -1, -1, -1), label.expand(200, -1, -1)  # 200 repeats
    bounds = [model.log_likelihood(image, label, n).mean().item() for n in (2, 16, 256)]
    assert bounds[0] < bounds[1] < truth + 0.02 and abs(bounds[2] - truth) < 0.05


# ------------------------------------------------------------------------------------ sampling


def test_samples_use_the_latents_of_every_skip_connection():
    model, (image, _) = small().eval(), batch()
    for level in range(2):
        still = copy.deepcopy(model)
        block = still.backbone.decoder[level][0]  # coarse to fine: reads skip connection 1 - level
        with torch.no_grad():  # the latent is the last of the skip's channels, which come first
            block.weight[:, UNET["channels"][1 - level]] = 0
        assert still.sample(image, 4).std(0).max() > 0.01


def test_operations_are_the_encoder_once_and_n_decoders():
    model, (image, _) = small(), batch(1)
    pixels = 16 * 8
    encoder = 9 * (2 * 4 * pixels + 4 * 5 * pixels // 4 + 5 * 6 * pixels // 16)
    latents = 2 * (4 * pixels + 5 * pixels // 4)
    decoder = 9 * ((6 + 5 + 1) * 5 * pixels // 4 + (5 + 4 + 1) * 4 * pixels) + 4 * 3 * pixels
    for n in (1, 7):
        with FlopCounterMode(display=False) as counter:
            model.sample(image, n)
        assert counter.get_total_flops() == 2 * (encoder + latents + n * decoder)


def test_drop_path_in_samples_is_asked_for():
    """Same latents, other layers: only with `sample_drop_path`, and then by the generator."""
    image = batch()[0]
    samples = {}
    for asked in (False, True):
        model = small(SWIN, drop_path=0.6, sample_drop_path=asked).eval()
        with torch.no_grad():
            for stage in model.backbone.decoder:
                stage["join"].weight[:, -1] = 0  # of the latent
        samples[asked] = model.sample(image, 6, generator())
        assert torch.equal(samples[asked], model.sample(image, 6, generator()))
        assert torch.equal(model.predict(image), model.predict(image))
    assert samples[False].std(0).max() < 1e-5 < 1e-2 < samples[True].std(0).max()


# ----------------------------------------------------------------------------- counts, options


def test_default_count_is_the_one_stated():
    with torch.device("meta"):
        model = VAEUNet()
    assert f"Default: {count(model) / 1e6:.2f} M parameters" in VAEUNet.__doc__


def test_swin_counts_are_the_papers():
    """20.08 M, of them 3,560 for the latents with the head that the code makes and never uses."""
    def unbuilt(**fields):
        with torch.device("meta"):
            return VAEUNet(VAEUNetConfig(num_classes=9, backbone="swin", **fields))

    total = count(unbuilt())
    latents = count(unbuilt(latent_dim=2)) - total
    unused = 768 * 2 + 2
    assert latents == sum(2 * w + 2 + w for w in (96, 192, 384)) == 3560 - unused
    assert f"{total / 1e6:.2f}" == "20.08"
    assert f"{count(unbuilt(depths=(2, 2, 2, 2))) / 1e6:.2f}" == "27.17"


@pytest.mark.parametrize("fields, message", [
    (dict(dims=4), "dims=4: choose one of 1, 2, 3"),
    (dict(backbone="resnet"), "backbone='resnet': choose one of 'unet', 'swin'"),
    (dict(latents="both"), "latents='both': choose one of 'mask', 'image'"),
    (dict(kl_scale="sum"), "kl_scale='sum': choose one of 'mean', 'pixel'"),
    (dict(latent_dim=0), "latent_dim is at least 1"),
    (dict(channels=(4,)), "1 resolution levels"),
    (dict(SWIN, dims=3), "dims is 2"),
    (dict(sample_drop_path=True), "sample_drop_path=True")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEUNet(VAEUNetConfig(**UNET | fields))


def test_latents_start_close_to_standard_normals():
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(in_channels=2, num_classes=3, **SWIN))
    for p in model.encode(batch()[0])[1]:
        assert p.mean.abs().max() < 0.3 and p.log_std.abs().max() < 0.3


# ------------------------------------------------------------------------- what others build on


class AnotherUNet(nn.Module):
    """Max pooling, transposed convolutions, no normalisation; with latents on its skips."""

    def __init__(self, latent=None):
        super().__init__()
        more = 1 if latent else 0
        self.top, self.bottom = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.last = nn.Conv2d(12 + more, 2, 3, padding=1)
        self.latent = latent

    def forward(self, x):
        skip = self.top(x).relu()
        up = self.up(self.bottom(F.max_pool2d(skip, 2)).relu())
        normal = None
        if self.latent:
            normal = self.latent(skip)
            skip = torch.cat([skip, normal.sample()], 1)
        return self.last(torch.cat([skip, up], 1)), normal


def test_latent_skip_on_another_unet():
    image = seeded(2, 1, 8, 8)
    torch.manual_seed(0)
    net = AnotherUNet(LatentSkip(6))
    (logits, normal), (again, _) = net(image), net(image)
    assert logits.shape == (2, 2, 8, 8) and not torch.equal(logits, again)
    loss = F.cross_entropy(logits, (image[:, 0] > 0).long()) + normal.kl(normal).sum()
    loss.backward()
    assert net.latent.conv.weight.grad.abs().min() > 0
    assert count(net) - count(AnotherUNet()) == 2 * 6 + 2 + 9 * 2


@BOTH
def test_pictures(backbone, tmp_path):
    model = small(backbone, in_channels=1).eval()
    image = seeded(1, 13, 18)
    analysis.paper_figures.plot_latents(model, image, tmp_path / "latents.png")
    analysis.paper_figures.plot_vae_samples(model, {"a": image, "b": 2 * image},
                                            tmp_path / "samples.png")
    for name in ("latents", "samples"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
