"""VAE U-Net: the loss against torch.distributions and loops, attention against explicit windows."""
import copy
import itertools
import math

import analysis.paper_figures
import analysis.pictures
import backbones.swin_unet
import data
import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import train
import vae_unet
from backbones.swin_unet import SwinBlock, SwinUNet
from common import center_crop, pad_to_multiple
from vae_unet import LatentSkip, VAEUNet, VAEUNetConfig, dice_loss

UNET = dict(channels=(4, 5, 6), convs=1)
SWIN = dict(backbone="swin", width=4, depths=(2, 2, 1), heads=(1, 2, 4), patch=2, window=3)
BOTH = pytest.mark.parametrize("backbone", [UNET, SWIN], ids=["unet", "swin"])


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(backbone=UNET, seed=0, **fields):
    """Three levels, three classes; the latents made to matter more than at the start."""
    torch.manual_seed(seed)
    model = VAEUNet(VAEUNetConfig(**dict(in_channels=2, num_classes=3) | backbone | fields))
    with torch.no_grad():
        for skip in itertools.chain(model.skips, model.mask_skips):
            skip.conv.weight.normal_(std=0.3)
            skip.conv.bias.uniform_(-1, 1)
    return model


def batch(count=2, size=(16, 12), classes=3, channels=2, seed=0):
    """Images, and labels with some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.1] = 255
    return seeded(count, channels, *size, seed=seed), label


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ the objective


def normals(net, skips, x):
    """q(z_i | x) of every level by torch.distributions, in float64."""
    net, skips = copy.deepcopy(net).double(), copy.deepcopy(skips).double()
    result = []
    for skip, features in zip(skips, net.encode(x.double())):
        mean, log_std = skip.conv(features).chunk(2, 1)
        result.append(Normal(mean, (10 * torch.tanh(log_std / 10)).exp()))
    return result


def hot_loop(label, classes):
    """One-hot (B, K, H, W), zero where ignored."""
    hot = torch.zeros(len(label), classes, *label.shape[1:], dtype=torch.float64)
    for b, y, x in itertools.product(*map(range, label.shape)):
        if label[b, y, x] != 255:
            hot[b, label[b, y, x], y, x] = 1
    return hot


def decoded(model, image, z):
    """Logits in float64 for latents z (B, N, H_i, W_i) of every level."""
    model = copy.deepcopy(model).double()
    features = model.backbone.encode(image.double())
    joined = [torch.cat([f, level], 1) for f, level in zip(features, z)]
    return model.head(model.backbone.decode(joined))


@BOTH
def test_loss_is_the_papers(backbone):
    """CE and Dice at z ~ q(z | image); KL(q(z | image) || p(z | mask)), mean over levels."""
    model, (image, label) = small(backbone, beta=1.7), batch(size=(16, 8))
    label[1] = torch.where(label[1] == 2, 0, label[1])
    torch.manual_seed(3)
    loss, terms = model(image, label)
    hot = hot_loop(label, 3)
    of_image = normals(model.backbone, model.skips, image)
    of_mask = normals(model.mask_net, model.mask_skips, hot)
    torch.manual_seed(3)
    noise = [torch.randn(q.mean.shape).double() for q in of_image]

    kls = [kl_divergence(q, p).mean() for q, p in zip(of_image, of_mask)]
    swapped = [kl_divergence(p, q).mean() for q, p in zip(of_image, of_mask)]
    assert abs(sum(kls) - sum(swapped)) > 0.1
    logits = decoded(model, image, [q.mean + q.stddev * e for q, e in zip(of_image, noise)])
    wrong = decoded(model, image, [p.mean + p.stddev * e for p, e in zip(of_mask, noise)])
    assert (logits - wrong).abs().max() > 0.1

    log_p = (logits.log_softmax(1) * hot).sum(1)  # of the label, 0 where ignored
    ce = sum(-log_p[b].sum() / hot[b].sum() for b in range(2)) / 2
    prob, dice = logits.softmax(1) * hot.sum(1, keepdim=True), 0
    for k in range(3):
        inter, of_prob, of_label = prob[:, k] * hot[:, k], prob[:, k] ** 2, hot[:, k]
        dice = dice + (1 - 2 * inter.sum() / (of_prob.sum() + of_label.sum())) / 3
    for i, kl in enumerate(kls):
        same(terms[f"kl_{i}"].double(), kl)
    same(terms["kl"].double(), sum(kls) / 3)
    same(terms["cross_entropy"].double(), ce)
    same(terms["dice"].double(), dice)
    same(loss.double(), 0.4 * ce + 0.6 * dice + 1.7 * sum(kls) / 3)


def test_kl_is_a_mean_over_positions_and_levels(monkeypatch):
    """Image N(1, 1), mask N(0, 2^2) everywhere: KL = log 2 + (1 + 1) / 8 - 1/2 at any size."""
    model = small()
    with torch.no_grad():
        for skips, mean, log_std in ((model.skips, 1.0, 0.0), (model.mask_skips, 0.0, math.log(2))):
            for skip in skips:
                skip.conv.weight.zero_()
                skip.conv.bias.copy_(torch.tensor([mean, log_std]))
    for size in ((8, 8), (16, 24)):
        terms = model(*batch(size=size))[1]
        log_std = 10 * math.tanh(math.log(2) / 10)  # as bounded
        expected = log_std + (1 + 1) / (2 * math.exp(2 * log_std)) - 0.5
        for name in ("kl", "kl_0", "kl_1", "kl_2"):
            assert terms[name].item() == pytest.approx(expected, abs=1e-6)


def test_mask_encoder_learns_from_the_kl_alone():
    model, (image, label) = small(beta=0.0), batch()
    model(image, label)[0].backward()
    gradient = lambda part: sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None)
    assert gradient(model.mask_net) == gradient(model.mask_skips) == 0 < gradient(model.skips)
    model = small()
    model(image, label)[0].backward()
    assert gradient(model.mask_net) > 0 and gradient(model.mask_skips) > 0


def test_samples_come_from_the_image_alone():
    model, (image, _) = small(), batch()
    before = model.sample(image, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.mask_skips.parameters():
            parameter += 1
    assert torch.equal(model.sample(image, 2, torch.Generator().manual_seed(0)), before)


def test_dice_by_hand():
    """Two classes, three valid pixels: p(1) = 3/4, 1/4, 1/2 for labels 1, 0, 1."""
    odds = torch.tensor([[[3.0, 1 / 3, 1.0, 7.0]]])
    label = torch.tensor([[1, 0, 1, 255]])
    logits = torch.cat([torch.zeros_like(odds), odds.log()], 1)
    hot = hot_loop(label[:, None], 2)[:, :, 0].float()
    ones = 2 * (3 / 4 + 1 / 2) / (9 / 16 + 1 / 16 + 1 / 4 + 2)
    zeros = 2 * (3 / 4) / (1 / 16 + 9 / 16 + 1 / 4 + 1)
    loss = dice_loss(logits, hot, label != 255)
    assert loss.item() == pytest.approx(1 - (ones + zeros) / 2, abs=1e-6)
    # class 1 absent: the mean is over the others; all ignored: 0
    absent = torch.tensor([[0, 0, 0, 255]])
    hot = hot_loop(absent[:, None], 2)[:, :, 0].float()
    zeros = 2 * (1 / 4 + 3 / 4 + 1 / 2) / (1 / 16 + 9 / 16 + 1 / 4 + 3)
    assert dice_loss(logits, hot, absent != 255).item() == pytest.approx(1 - zeros, abs=1e-6)
    assert dice_loss(logits, 0 * hot, absent < 0) == 0


def test_log_likelihood_is_the_mean_over_draws():
    model, (image, label) = small().eval(), batch()
    mask = seeded(*label.shape, seed=5) > -1
    torch.manual_seed(4)
    got = model.log_likelihood(image, label, 3, mask)
    of_image = normals(model.backbone, model.skips, image)
    torch.manual_seed(4)
    hot = hot_loop(torch.where(mask, label, 255), 3)
    log_p = []
    for _ in range(3):
        z = [q.mean + q.stddev * torch.randn(q.mean.shape).double() for q in of_image]
        log_p.append((decoded(model, image, z).log_softmax(1) * hot).sum((1, 2, 3)))
    same(got.double(), torch.stack(log_p).exp().mean(0).log(), 1e-6)


def test_predict_stands_at_the_means():
    model, (image, _) = small().eval(), batch()
    means = [q.mean for q in normals(model.backbone, model.skips, image)]
    same(model.predict(image).double(), decoded(model, image, means).softmax(1), 1e-6)
    assert not model.predict(image).requires_grad


# ------------------------------------------------------------------------------------ sampling


@BOTH
def test_samples_do_not_hang_on_what_is_computed_at_once(backbone, monkeypatch):
    model, (image, _) = small(backbone).eval(), batch()
    draw = lambda seed=1: model.sample(image, 5, torch.Generator().manual_seed(seed))
    sizes = []
    model.head.register_forward_hook(lambda module, args, out: sizes.append(len(out) // 2))
    whole = draw()
    assert sizes == [5] and whole.shape == (5, 2, 3, 16, 12) and not whole.requires_grad
    assert whole.std(0).max() > 0.05 and not torch.equal(whole, draw(2))
    monkeypatch.setattr(vae_unet, "CHUNK", 2 * 2 * model.encode(image)[0][0][0].numel())
    sizes.clear()
    same(draw(), whole)
    assert sizes == [2, 2, 1]
    torch.manual_seed(9)  # the generator decides, not the global state
    assert torch.equal(draw(), draw())


def test_samples_use_the_latents_of_every_level():
    model, (image, _) = small().eval(), batch()
    for level in range(3):
        still = copy.deepcopy(model)
        for i, skip in enumerate(still.skips):
            if i != level:
                skip.conv.weight.data[1] = 0
                skip.conv.bias.data[1] = -100  # std exp(-10)
        assert still.sample(image, 4).std(0).max() > 0.01


def test_operations_are_the_encoder_once_and_n_decoders():
    model, (image, _) = small(), batch(1)
    pixels = 16 * 12
    encoder = 9 * (2 * 4 * pixels + 4 * 5 * pixels // 4 + 5 * 6 * pixels // 16)
    latents = 2 * (4 * pixels + 5 * pixels // 4 + 6 * pixels // 16)
    decoder = 9 * ((6 + 1 + 5 + 1) * 5 * pixels // 4 + (5 + 4 + 1) * 4 * pixels) + 4 * 3 * pixels
    for n in (1, 3, 7):
        with FlopCounterMode(display=False) as counter:
            model.sample(image, n)
        assert counter.get_total_flops() == 2 * (encoder + latents + n * decoder)


# ------------------------------------------------------------------------------ sizes, options


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_default_counts_are_those_stated():
    with torch.device("meta"):
        model = VAEUNet()
    assert f"Default: {count(model) / 1e6:.2f} M parameters, " \
        f"{count(model.for_inference()) / 1e6:.2f} M of them for sampling" in VAEUNet.__doc__


def test_swin_counts_are_the_papers():
    """20.08 M, a few thousand of them the latents'; Swin-Unet's depths give its own 27.17 M."""
    def unbuilt(**fields):
        with torch.device("meta"):
            return VAEUNet(VAEUNetConfig(num_classes=9, backbone="swin", **fields))

    model = unbuilt()
    total = count(model.for_inference())
    widths = (96, 192, 384, 768)
    latents = sum(2 * w + 2 for w in widths)  # mean and log std
    latents += sum(widths[:3]) + 4 * 384  # what reads them: three joins, and the way up
    with_two = unbuilt(latent_dim=2)
    assert count(with_two.for_inference()) - total == latents
    assert f"{total / 1e6:.2f}" == "20.08" and f"{latents / 1e3:.1f} k" in vae_unet.__doc__
    assert abs(total / 20.08e6 - 1) < 0.02 and latents / total < 0.0003
    assert f"{count(unbuilt(depths=(2, 2, 2, 2)).for_inference()) / 1e6:.2f}" == "27.17"
    assert f"another {(count(model) - total) / 1e6:.2f} M in training" in vae_unet.__doc__


def test_learning_rate_falls_by_inverse_time():
    training = VAEUNet.TRAINING
    assert train.learning_rate(4999, training) == 0.01
    assert train.learning_rate(5000, training) == pytest.approx(0.01 / 1.5)
    assert train.learning_rate(59_999, training) == pytest.approx(0.01 / 6.5)


@BOTH
def test_gradient_reaches_every_parameter(backbone):
    model, (image, label) = small(backbone), batch(4, size=(24, 24))
    model(image, label)[0].backward()
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


@BOTH
def test_options_change_something(backbone):
    model, (image, label) = small(backbone, latent_dim=3), batch()
    assert [q.mean.shape[:2] for q in model.encode(image)[1]] == [(2, 3)] * 3
    assert model(image, label)[0].isfinite() and model.sample(image, 2).shape[0] == 2
    with torch.no_grad():
        loss = [small(backbone, beta=beta)(image, label)[1] for beta in (0.0, 1.0)]
    assert loss[0]["kl"] > 0
    if backbone is SWIN:
        assert small(backbone, depths=(1, 1, 1)).backbone.multiple == 8
        assert small(backbone, patch=1).backbone.multiple == 4
        assert small(backbone, window=2).backbone.encoder[0][3].bias.shape == (1, 9)


@pytest.mark.parametrize("fields, message", [
    (dict(dims=4), "dims=4: choose one of 1, 2, 3"),
    (dict(backbone="resnet"), "backbone='resnet': choose one of 'unet', 'swin'"),
    (dict(latent_dim=0), "latent_dim is at least 1"),
    (dict(channels=(4,)), "1 resolution levels"),
    (dict(SWIN, dims=3), "dims is 2"),
    (dict(SWIN, heads=(1, 2)), "of one length"),
    (dict(SWIN, heads=(3, 3, 3)), "heads divide channels")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEUNet(VAEUNetConfig(**UNET | fields))


@BOTH
def test_any_size_and_whoever_pads(backbone):
    model, (image, label) = small(backbone).eval(), batch(size=(13, 18))
    multiple = model.backbone.multiple
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[2:] == {4: (16, 20), 8: (16, 24)}[multiple]
    padded_label = torch.full((2, *padded.shape[2:]), 255)
    center_crop(padded_label, (13, 18)).copy_(label)
    draw = lambda image: model.sample(image, 2, torch.Generator().manual_seed(0))
    same(draw(image), center_crop(draw(padded), (13, 18)))
    same(model.predict(image), center_crop(model.predict(padded), (13, 18)))
    torch.manual_seed(0)
    results = [*model(image, label), model.log_likelihood(image, label, 2)]
    torch.manual_seed(0)
    others = [*model(padded, padded_label), model.log_likelihood(padded, padded_label, 2)]
    for a, b in zip(results, others):
        same(a, b)


@pytest.mark.parametrize("size", [(13,), (5, 6, 7)])
def test_one_and_three_axes(size):
    model, (image, label) = small(dims=len(size)), batch(size=size)
    assert model(image, label)[0].isfinite()
    assert model.sample(image, 2).shape == (2, 2, 3, *size)
    assert model.predict(image).shape == (2, 3, *size)
    assert model.log_likelihood(image, label, 2).shape == (2,)


def test_masked_pixels_have_no_influence():
    model, (image, label) = small(), batch()
    mask = seeded(*label.shape, seed=5) > 0

    def results(label, mask):
        torch.manual_seed(0)
        return torch.stack([model(image, label, mask)[0],
                            model.log_likelihood(image, label, 2, mask).sum()])

    expected = results(label, mask)
    assert torch.equal(results(torch.where(mask, label, (label + 1) % 3), mask), expected)
    assert torch.equal(results(torch.where(mask, label, 255), None), expected)
    assert not torch.isclose(results(label, None), expected).any()
    assert results(torch.full_like(label, 255), None).isfinite().all()


@BOTH
def test_float32_where_it_matters_under_autocast(backbone):
    model, (image, label) = small(backbone), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = model(image, label)
        samples = model.sample(image, 2)
    loss.backward()
    assert {t.dtype for t in (loss, *terms.values())} == {torch.float32}
    assert loss.isfinite() and samples.isfinite().all()


# ------------------------------------------------------------------- training and what follows


def test_a_tiny_batch_overfits():
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(num_classes=3, channels=(8, 16), convs=1))
    image, label = seeded(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, 1:4, 2:7], label[1, 3:, 3:5] = 1, 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(150):
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
    assert terms["cross_entropy"] < 0.05 and terms["dice"] < 0.05
    assert torch.equal(model.predict(image).argmax(1), label)
    assert (model.sample(image, 4).argmax(2) == label).float().mean() > 0.99


def test_inference_export_has_no_mask_encoder(tmp_path):
    model, (image, label) = small().eval(), batch()
    export = model.for_inference()
    state = export.state_dict()
    gone = model.state_dict().keys() - state.keys()
    assert gone == {name for name in model.state_dict() if name.startswith("mask_")} != set()
    again = VAEUNet(model.config).for_inference()
    again.load_state_dict(state)
    draw = lambda model: model.sample(image, 2, torch.Generator().manual_seed(0))
    assert torch.equal(draw(again.eval()), draw(model))
    with pytest.raises(RuntimeError, match="no mask encoder"):
        again(image, label)
    assert model(image, label)[0].isfinite()  # the one exported from is whole
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.save(tmp_path / "full.pt", "vae_unet", model, optimizer, 1, 0.5)
    same(draw(data.load(tmp_path / "full.pt")), draw(model))


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


# ------------------------------------------------------------------------------ windows, Swin


def naive_block(block, x):
    """A Swin block in float64, token by token: windows are spelled out, nothing is rolled."""
    block, x, w = copy.deepcopy(block).double(), x.double(), block.window
    height, width, channels = x.shape[1:]
    size = channels // block.heads
    shift = [block.shift if side > w else 0 for side in (height, width)]
    window = lambda y, x: ((y - shift[0]) // w, (x - shift[1]) // w)
    tokens = list(itertools.product(range(height), range(width)))
    out = torch.zeros_like(x)
    for case in range(len(x)):
        q, k, v = block.qkv(F.layer_norm(x[case], (channels,), block.norms[0].weight,
                                         block.norms[0].bias)).split(channels, -1)
        for y0, x0 in tokens:
            seen = [t for t in tokens if window(*t) == window(y0, x0)]
            for head in range(block.heads):
                part = slice(head * size, (head + 1) * size)
                scores = [q[y0, x0, part] @ k[y1, x1, part] / size**0.5
                          + block.bias[head, (y0 - y1 + w - 1) * (2 * w - 1) + x0 - x1 + w - 1]
                          for y1, x1 in seen]
                weights = torch.stack(scores).softmax(0)
                out[case, y0, x0, part] = sum(a * v[y1, x1, part]
                                              for a, (y1, x1) in zip(weights, seen))
    x = x + block.out(out)
    return x + block.mlp(block.norms[1](x))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (3, 8), (2, 4)], ids=str)
def test_swin_block_is_attention_in_explicit_windows(size, shift):
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 3, shift)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    x = seeded(2, *size, 8)
    expected = naive_block(block, x)
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_shift_and_bias_matter():
    torch.manual_seed(0)
    blocks = [SwinBlock(8, 2, 3, shift) for shift in (0, 1)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = seeded(1, 6, 6, 8)
    assert (blocks[0](x) - blocks[1](x)).abs().max() > 1e-3
    with torch.no_grad():
        blocks[1].bias.normal_()
    assert (blocks[0](x[:, :3, :3]) - blocks[1](x[:, :3, :3])).abs().max() > 1e-3


def test_hidden_keys_by_hand():
    """A line of 4 tokens, windows of 3, shift 1: {1, 2, 3} | {padding 4, 5} and {0} on its own."""
    hidden = backbones.swin_unet.hidden_keys((3, 4), 3, (0, 1), torch.device("cpu"))
    assert hidden.shape == (2, 9, 9)
    row = hidden[:, :3, :3]  # of the window's first row
    assert not row[0].any()
    assert row[1].tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert torch.equal(hidden[:, :3, 6:], row)  # rows of a window see each other


def test_merging_and_expanding_are_inverse_and_the_embedding_a_convolution():
    x = seeded(2, 8, 12, 5)
    for side in (2, 4):
        gathered = backbones.swin_unet.Gather(side)(x)
        assert gathered.shape == (2, 8 // side, 12 // side, side * side * 5)
        assert torch.equal(gathered[1, 1, 2].view(side, side, 5),
                           x[1, side : 2 * side, 2 * side : 3 * side])
        assert torch.equal(backbones.swin_unet.Scatter(side)(gathered), x)
    swin = SwinUNet(VAEUNetConfig(**SWIN, in_channels=3), 3)
    gather, linear = swin.encoder[0][:2]
    image = seeded(2, 3, 8, 12)
    weight = linear.weight.view(4, 2, 2, 3).permute(0, 3, 1, 2)
    same(linear(gather(image.movedim(1, -1))).movedim(-1, 1),
         F.conv2d(image, weight, linear.bias, stride=2))


def test_swin_starts_with_standard_normals():
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(in_channels=2, num_classes=3, **SWIN))
    image, label = batch(size=(24, 24))
    for q in model.encode(image)[1]:
        assert q.mean.abs().max() < 0.05 and (q.std - 1).abs().max() < 0.05
    assert model(image, label)[1]["kl"] < 1e-3


def test_swin_levels_and_alternating_shifts():
    swin = SwinUNet(VAEUNetConfig(**SWIN), 1)
    features = swin.encode(seeded(2, 1, 24, 16))
    assert [f.shape[1:] for f in features] == [(4, 12, 8), (8, 6, 4), (16, 3, 2)]
    shifts = [m.shift for m in swin.encoder.modules() if isinstance(m, SwinBlock)]
    assert shifts == [0, 1, 0, 1, 0]


# ------------------------------------------------------------------------------------ pictures


@BOTH
def test_pictures(backbone, tmp_path):
    model = small(backbone, in_channels=1).eval()
    image = seeded(1, 13, 18)
    analysis.paper_figures.plot_latents(model, image, tmp_path / "latents.png")
    analysis.pictures.plot_samples(model, {"a": image, "b": 2 * image}, tmp_path / "samples.png")
    for name in ("latents", "samples"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
