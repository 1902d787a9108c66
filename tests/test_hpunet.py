"""Hierarchical Probabilistic U-Net against plain float64 versions of itself, its objective against
hand derivations, its clustering against a literal transcription."""
import copy
import itertools
import math
import time

import analysis.paper_figures
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import hpunet
from analysis.instances import clean_instances, cluster_instances
from analysis.paper_figures import deviation
from common import center_crop, pad_to_multiple
from hpunet import HPUNet, HPUNetConfig, ResBlock, at_mean, drawn, given, hard_pixels


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **fields):
    """Four levels, latents at the two coarsest."""
    torch.manual_seed(seed)
    fields = dict(in_channels=2, num_classes=3, channels=(4, 6, 8, 8), blocks=2, convs=2,
                  latents=(2, 1), top_k=0.2) | fields
    return HPUNet(HPUNetConfig(**fields))


def batch(count=2, size=(8, 16), classes=3, channels=2, seed=0):
    """Images, and labels with some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.1] = 255
    return seeded(count, channels, *size, seed=seed), label


# ------------------------------------------------------------------------- the paper's model


def conv_shapes(module):
    return [tuple(p.shape) for p in module.parameters() if p.dim() == 4]


def test_default_shapes_are_the_papers():
    with torch.device("meta"):
        model = HPUNet()

    def level(before, after):  # three blocks: three 3x3 convolutions at half width, 1x1 back
        half = after // 2
        rest = [(half, half, 3, 3), (half, half, 3, 3), (after, half, 1, 1)]
        first = [(half, before, 3, 3), *rest, (after, before, 1, 1)]
        if before == after:
            first.pop()  # the identity
        return first + 2 * [(half, after, 3, 3), *rest]

    widths = (24, 48, 96, 192, 192, 192, 192, 192)
    path = [level(a, b) for a, b in zip((1, *widths), widths)]
    assert conv_shapes(model.unet.encoder) == sum(path, [])
    path[0] = level(1 + 2, 24)  # image and one-hot mask
    assert conv_shapes(model.posterior.encoder) == sum(path, [])
    for net in (model.unet, model.posterior):  # a mean and a log std at 1, 2, 4, 8 pixels
        assert conv_shapes(net.heads) == 4 * [(2, 192, 1, 1)]

    def decoder(net):
        return [conv_shapes(join) + conv_shapes(more) for join, more in zip(net.joins, net.decoder)]

    up = 3 * [level(192 + 1 + 192, 192)]  # features, their latents, the skip connection
    assert decoder(model.posterior) == up
    assert decoder(model.unet) == up + [level(192 + 1 + 192, 192), level(192 + 96, 96),
                                        level(96 + 48, 48), level(48 + 24, 24)]
    assert model.out.weight.shape == (2, 24, 1, 1)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert f"{count(model) / 1e6:.2f} M parameters" in HPUNet.__doc__
    assert f"{(count(model) - count(model.posterior)) / 1e6:.2f} M of them for" in HPUNet.__doc__


def test_default_operations_are_those_stated():
    with torch.device("meta"):
        model = HPUNet()
        image = torch.zeros(1, 1, 128, 128)

    def total(n):
        noise = {i: torch.zeros(n, 1, 1, 2**i, 2**i, device="meta") for i in range(4)}
        with FlopCounterMode(display=False) as counter:
            model.out(model.unet(model.encode(image), drawn(noise), n)[0])
        return counter.get_total_flops() / 2e9

    each = total(2) - total(1)
    assert f"thousand millions: {total(1) - each:.2f} + n x {each:.2f}" in HPUNet.__doc__


def test_learning_rate_falls_to_half_of_1e_5_in_four_steps():
    drops = HPUNet.TRAINING["lr_drops"]
    assert len(drops) == 4 and drops[-1][0] < HPUNet.TRAINING["steps"]
    assert HPUNet.TRAINING["lr"] * drops[-1][1] == pytest.approx(0.5e-5)


# ------------------------------------------------------------------- against float64 loops


def plain(net, x, choose, out=None):
    """A net as the paper draws it, in float64: features doubled, concatenated, a block after the
    other. choose: (level, normal) -> latents. Returns features or `out`'s, latents, normals."""
    net, x, skips, latents, normals = copy.deepcopy(net).double(), x.double(), [], {}, {}
    for level, blocks in enumerate(net.encoder):
        x = blocks(F.avg_pool2d(x, 2) if level else x)
        skips.append(x)
    x = skips.pop()
    for level in range(len(net.joins) + 1):
        if str(level) in net.heads:
            mean, log_std = net.heads[str(level)](x).chunk(2, 1)
            normal = Independent(Normal(mean, (10 * (log_std / 10).tanh()).exp()), 3)
            normals[level], latents[level] = normal, choose(level, normal)
            x = torch.cat([x, latents[level]], 1)
        if level < len(net.joins):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = ResBlock.forward(net.joins[level], torch.cat([x, skips.pop()], 1))
            x = net.decoder[level](x)
    return (copy.deepcopy(out).double()(x) if out else x), latents, normals


def from_noise(noise):
    return lambda level, normal: normal.mean + normal.stddev * noise[level].double()


def seen_by_posterior(image, label, classes=3):
    hot = F.one_hot(label.clamp(max=classes), classes + 1)[..., :classes].movedim(-1, 1)
    return torch.cat([image, hot], 1)


def plain_terms(model, image, label, noise):
    """Logits, latents, posterior's and prior's normals in float64."""
    asked = seen_by_posterior(image, label, model.config.num_classes)
    _, latents, posteriors = plain(model.posterior, asked, from_noise(noise))
    logits, _, priors = plain(model.unet, image, given(latents), model.out)
    return logits, latents, posteriors, priors


def log_prob_loop(logits, label):
    """log softmax(logits_i)[label_i] of one case, pixel after pixel."""
    out = torch.zeros(label.shape, dtype=torch.float64)
    for y, x in itertools.product(range(label.shape[0]), range(label.shape[1])):
        k = label[y, x].item()
        if k != 255:
            values = logits[:, y, x].tolist()
            top = max(values)
            out[y, x] = values[k] - top - math.log(sum(math.exp(v - top) for v in values))
    return out


def noise_of(model, image, seed, n=1):
    """What model.noise draws after this seed, of draw number 0, 1, ...: a list of dicts."""
    torch.manual_seed(seed)
    noise = model.noise(image, n)
    return [{level: e[i] for level, e in noise.items()} for i in range(n)]


@pytest.mark.parametrize("latents", [(2, 1), (3,), (0, 1), (1, 0, 2)])
def test_elbo(latents):
    """Eq. 5 over all pixels; kl_<i> against torch.distributions."""
    model, (image, label) = small(objective="elbo", beta=1.7, top_k=1, latents=latents), batch()
    mask = seeded(*label.shape, seed=5) > -1
    torch.manual_seed(3)
    loss, terms = model(image, label, mask)
    label = torch.where(mask, label, 255)
    logits, _, q, p = plain_terms(model, image, label, noise_of(model, image, 3)[0])
    reconstruction = -sum(log_prob_loop(*pair).sum() for pair in zip(logits, label)) / 2
    kl = {level: kl_divergence(q[level], p[level]).mean() for level in q}
    same = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    same(terms["reconstruction"], reconstruction)
    assert set(kl) == {level for level, width in enumerate(latents) if width}
    for level, value in kl.items():
        assert value > 1e-3
        same(terms[f"kl_{level}"], value)
    same(terms["kl"], sum(kl.values()))
    same(loss, reconstruction + 1.7 * sum(kl.values()))
    same(terms["reconstruction_per_pixel"], 2 * reconstruction / (label != 255).sum())
    assert "lambda" not in terms


def test_hierarchical_kl_is_that_of_the_joint_distributions():
    """Eq. 12: the sum of expected KLs is E[log Q - log P], here by Monte Carlo."""
    model, (image, label) = small(), batch(1)
    n = 4000
    torch.manual_seed(0)
    _, z, q = model.posterior(model.encode(image, label), drawn(model.noise(image, n)), n)
    _, _, p = model.unet(model.encode(image), given(z), n)
    analytic = sum(q[level].kl(p[level]) for level in q)
    ratio = sum(q[level].log_prob(z[level]) - p[level].log_prob(z[level]) for level in q)
    assert analytic.std() > 1e-3  # the second KL depends on the first draw
    assert abs(ratio.mean() - analytic.mean()) < 4 * ((ratio - analytic).std() / n**0.5)


def test_importance_bound(monkeypatch):
    model, (image, label) = small(), batch()
    mask = seeded(*label.shape, seed=5) > -1
    monkeypatch.setattr(hpunet, "CHUNK", 2 * 2 * 8 * 16 * 16)  # two samples at a time
    torch.manual_seed(4)
    bound = model.log_likelihood(image, label, 5, mask)
    label = torch.where(mask, label, 255)
    log_weight = []
    for noise in noise_of(model, image, 4, 5):
        logits, z, q, p = plain_terms(model, image, label, noise)
        log_p = torch.stack([log_prob_loop(*pair).sum() for pair in zip(logits, label)])
        log_weight.append(log_p + sum(p[i].log_prob(z[i]) - q[i].log_prob(z[i]) for i in z))
    expected = torch.stack(log_weight).logsumexp(0) - math.log(5)
    torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=0)


def test_bound_rises_with_n_from_the_elbo():
    model, (image, label) = small(objective="elbo", top_k=1).eval(), batch(1)
    torch.manual_seed(0)
    image, label = image.expand(100, -1, -1, -1), label.expand(100, -1, -1)  # 100 repeats
    bounds = {n: model.log_likelihood(image, label, n) for n in (1, 4, 16)}
    means = [b.mean().item() for b in bounds.values()]
    means.append(model.log_likelihood(image[:1], label[:1], 1000).item())
    error = max(b.std().item() for b in bounds.values()) / 100**0.5
    assert means[1] - means[0] > 4 * error and means == sorted(means)
    with torch.no_grad():
        assert abs(-model(image, label)[0].item() - means[0]) < 4 * error


# --------------------------------------------------------------------------------------- GECO


def test_constraint_has_the_averages_value_and_the_batchs_gradient():
    """By hand: C_ma = 0.99 C_ma + 0.01 C, loss lambda C, d loss / dx = lambda dC / dx."""
    model, average = small(), None
    for step, x in enumerate([3.0, -1.0, 2.0, 0.5]):
        rho = model.rho.item()
        x = torch.tensor(x, requires_grad=True)
        constraint, weight = model._constrain(x**2 - 1)
        now = x.item() ** 2 - 1
        average = now if average is None else 0.99 * average + 0.01 * now
        assert constraint.item() == pytest.approx(average, rel=1e-6)
        assert weight.item() == pytest.approx(math.log1p(math.exp(rho)) ** 2, rel=1e-6)
        (weight * constraint).backward()
        assert x.grad.item() == pytest.approx(weight.item() * 2 * x.item(), rel=1e-6)
    assert model.steps_seen == 4


def test_lambda_rises_while_the_constraint_is_violated_and_falls_after():
    model = small(lambda_rate=0.01)
    weights = [model._constrain(torch.tensor(1.0))[1].item() for _ in range(100)]
    assert weights[0] == pytest.approx(1) and weights == sorted(weights)
    assert weights[-1] == pytest.approx(math.log1p(math.exp(math.log(math.e - 1) + 0.99)) ** 2)
    # the average, 2 * 0.99^t - 1, is negative from the 69th step on
    weights = [model._constrain(torch.tensor(-1.0))[1].item() for _ in range(2000)]
    assert weights.index(max(weights)) == 68
    assert weights[68:] == sorted(weights[68:], reverse=True) and 0 < weights[-1] < 1e-4


def test_geco_loss():
    """The whole loss by hand; its gradient is that of lambda C + KL of the batch alone."""
    model, (image, label) = small(kappa=0.3), batch()
    model.rho.fill_(1.0)
    model.constraint.fill_(7.0)
    model.steps_seen.fill_(5)
    alone = copy.deepcopy(model).eval()  # keeps no average
    torch.manual_seed(0)
    loss, terms = model(image, label)
    torch.manual_seed(0)
    own, own_terms = alone(image, label)
    weight = math.log1p(math.e) ** 2
    count = own_terms["reconstruction"] / own_terms["reconstruction_per_pixel"]
    kept = round(0.2 * label.numel())
    assert count.item() == pytest.approx(kept / 2)
    batch_constraint = terms["reconstruction"].item() - 0.3 * kept / 2
    assert terms["constraint"].item() == pytest.approx(0.99 * 7 + 0.01 * batch_constraint)
    assert terms["lambda"].item() == pytest.approx(weight)
    assert loss.item() == pytest.approx(weight * terms["constraint"].item() + terms["kl"].item())
    assert own.item() == pytest.approx(weight * batch_constraint + terms["kl"].item())
    assert alone.steps_seen == 5 and alone.rho == 1 and alone.constraint == 7
    loss.backward()
    own.backward()
    for a, b in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_geco_is_resumed_exactly():
    model, (image, label) = small(lambda_rate=0.1), batch()

    def steps(model, seeds):
        return [[model(image, label)[1][k].item() for k in ("constraint", "lambda")]
                for seed in seeds if torch.manual_seed(seed)]

    steps(model, (0, 1, 2))
    again = small(seed=1, lambda_rate=0.1)
    again.load_state_dict(model.state_dict())
    assert steps(model, (3, 4)) == steps(again, (3, 4)) != steps(small(lambda_rate=0.1), (3, 4))


# -------------------------------------------------------------------------- stochastic top-k


def test_far_apart_the_hardest_pixels_are_kept():
    error = 10 ** (4 * seeded(2, 10, 25)).clamp(max=12)
    top = error.flatten().topk(10).indices  # 2 % of 500
    error.view(-1)[top] *= 1e20
    kept = hard_pixels(error, 0.02)
    assert kept.shape == error.shape
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(top.tolist())
    assert hard_pixels(error, 1).all() and hard_pixels(error, 1e-9).sum() == 1


def test_frequencies_are_those_of_drawing_without_replacement():
    error = torch.tensor([[1.0, 3.0, 0.5, 4.0, 1.5]])
    p = (error / error.sum()).flatten().tolist()
    torch.manual_seed(0)
    times = 3000

    def chi_square(share, expected):
        seen = dict.fromkeys(expected, 0)
        for _ in range(times):
            seen[tuple(hard_pixels(error, share)[0].nonzero().flatten().tolist())] += 1
        return sum((seen[s] - times * e) ** 2 / (times * e) for s, e in expected.items())

    one = {(i,): p[i] for i in range(5)}
    pairs = {(i, j): p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
             for i, j in itertools.combinations(range(5), 2)}
    assert sum(pairs.values()) == pytest.approx(1)
    assert chi_square(0.2, one) < 23.5  # 99.99 % of 4 degrees of freedom
    assert chi_square(0.4, pairs) < 33.7  # of 9
    uniform = dict.fromkeys(one, 0.2)
    assert chi_square(0.2, uniform) > 500  # the test has power


def test_masked_pixels_are_never_kept():
    model, (image, label) = small(top_k=0.5, kappa=0.25), batch()
    mask = torch.zeros_like(label, dtype=torch.bool)
    label[label == 255] = 0
    mask[0, 2, 3] = mask[1, 4, 5:7] = True  # three of 256, of which 128 could be kept
    torch.manual_seed(0)
    _, terms = model(image, label, mask)
    label = torch.where(mask, label, 255)
    logits, *_ = plain_terms(model, image, label, noise_of(model, image, 0)[0])
    total = -sum(log_prob_loop(*pair).sum() for pair in zip(logits, label))
    assert terms["reconstruction"].item() == pytest.approx(total.item() / 2, rel=1e-6)
    assert terms["reconstruction_per_pixel"].item() == pytest.approx(total.item() / 3, rel=1e-6)
    assert terms["constraint"].item() == pytest.approx(total.item() / 2 - 0.25 * 1.5, rel=1e-6)


def test_masked_pixels_have_no_influence():
    model, (image, label) = small(), batch()
    mask = seeded(*label.shape, seed=5) > 0

    def results(label, mask):
        torch.manual_seed(0)
        return torch.stack([copy.deepcopy(model)(image, label, mask)[0],
                            model.log_likelihood(image, label, 3, mask).sum()])

    expected = results(label, mask)
    assert torch.equal(results(torch.where(mask, label, (label + 1) % 3), mask), expected)
    assert torch.equal(results(torch.where(mask, label, 255), None), expected)
    assert not torch.isclose(results(label, None), expected).any()


def test_nothing_but_ignored_pixels_is_no_nan():
    model, (image, label) = small(), batch()
    loss, terms = model(image, torch.full_like(label, 255))
    loss.backward()
    assert all(term.isfinite() for term in terms.values()) and terms["reconstruction"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def one_of_two(rank, folder):
    """Two steps of a model that sees half of the batch; leaves what it has come to in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(small(lambda_rate=0.1))
    half = [tensor.chunk(2)[rank] for tensor in batch(4)]
    torch.save(outcome(model, model.module, *half), folder / f"{rank}.pt")
    del model  # before its group, or it can hang
    dist.destroy_process_group()


def outcome(run, model, image, label):
    for step in range(2):
        torch.manual_seed(step)
        run.zero_grad()
        loss, _ = run(image, label)
        loss.backward()
    return [loss.detach(), model.constraint, model.rho, *(p.grad for p in model.parameters())]


def test_two_processes_do_what_one_does(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=one_of_two,
                                                               args=(1, tmp_path))
    other.start()
    one_of_two(0, tmp_path)
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = small(lambda_rate=0.1)
    expected = outcome(model, model, *batch(4))
    torch.testing.assert_close((first[0] + second[0]) / 2, expected[0])
    for rank in (first, second):
        torch.testing.assert_close(rank[1:], expected[1:], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("latents", [(2, 1), (0, 1)])
@pytest.mark.parametrize("chunk", [1, 2 * 2 * 8 * 16 * 16, 2**30])
def test_samples_are_ancestral_whatever_is_computed_at_once(latents, chunk, monkeypatch):
    monkeypatch.setattr(hpunet, "CHUNK", chunk)
    model, (image, _) = small(latents=latents), batch()
    sizes = []
    model.out.register_forward_hook(lambda module, args, out: sizes.append(len(out) // 2))
    samples = model.sample(image, 5, torch.Generator().manual_seed(0))
    assert sizes == {1: [1] * 5, 2**30: [5]}.get(chunk, [2, 2, 1])
    noise = model.noise(image, 5, torch.Generator().manual_seed(0))
    for i in range(5):
        expected, _, _ = plain(model.unet, image, from_noise({k: e[i] for k, e in noise.items()}),
                               model.out)
        torch.testing.assert_close(samples[i].double(), expected, rtol=1e-5, atol=1e-5)
    assert samples.std(0).max() > 0.1 and not samples.requires_grad


def test_a_finer_prior_depends_on_the_coarser_draw():
    model, (image, _) = small(), batch()
    noise = model.noise(image, 1)
    normals = []
    for shift in (0, 1):
        noise[0] = noise[0] + shift
        normals.append(model.unet(model.encode(image), drawn(noise))[2])
    torch.testing.assert_close(normals[0][0].mean, normals[1][0].mean)
    for moment in ("mean", "std"):
        change = getattr(normals[0][1], moment) - getattr(normals[1][1], moment)
        assert change.abs().max() > 1e-3


def test_scales_are_drawn_or_at_their_mean():
    model, (image, _) = small(), batch()
    draw = lambda scales: model.sample(image, 3, torch.Generator().manual_seed(0), scales=scales)
    noise = model.noise(image, 3, torch.Generator().manual_seed(0))
    for scales in ((0,), (1,), ()):
        quiet = {k: e * (k in scales) for k, e in noise.items()}
        for i in range(3):
            expected, _, _ = plain(model.unet, image,
                                   from_noise({k: e[i] for k, e in quiet.items()}), model.out)
            torch.testing.assert_close(draw(scales)[i].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(draw((0, 1)), draw(None)) and not torch.equal(draw((0,)), draw(None))
    torch.testing.assert_close(draw(())[0].softmax(1), model.predict(image))
    for bad in ((2,), (-1,)):
        with pytest.raises(ValueError, match=r"choose from 0, 1"):
            draw(bad)
    with pytest.raises(ValueError, match="choose from 1"):  # z_0 is not there
        small(latents=(0, 1)).sample(image, 1, scales=(0,))


def test_same_seed_same_samples():
    model, (image, _) = small(), batch()
    draw = lambda seed: model.sample(image, 3, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    assert torch.equal(draw(1), draw(1))


def test_predict_and_reconstruct_stand_at_the_means():
    model, (image, label) = small(), batch()
    mean = lambda level, normal: normal.mean
    expected, _, _ = plain(model.unet, image, mean, model.out)
    torch.testing.assert_close(model.predict(image).double(), expected.softmax(1), rtol=1e-5,
                               atol=1e-5)
    _, latents, _ = plain(model.posterior, seen_by_posterior(image, label), mean)
    expected, _, _ = plain(model.unet, image, given(latents), model.out)
    torch.testing.assert_close(model.reconstruct(image, label).double(), expected, rtol=1e-5,
                               atol=1e-5)
    assert not model.predict(image).requires_grad
    assert not model.reconstruct(image, label).requires_grad


def products(channels, pixels, convs, blocks, latents, classes):
    """Multiplications of the U-Net on `pixels`: (what samples share, what each costs)."""
    def rest(width):
        half = width // 2
        return (convs - 1) * 9 * half * half + half * width

    def block(before, after):
        return 9 * before * (after // 2) + before * after * (before != after) + rest(after)

    once, area = 0, pixels
    for before, after in zip(channels, channels[1:]):  # channels[0]: the image's
        once += area * (block(before, after) + (blocks - 1) * block(after, after))
        area /= 4
    up, area, each = channels[:0:-1], area * 4, 0
    start = next(i for i, width in enumerate(latents) if width)
    for level, (below, after) in enumerate(zip(up, up[1:])):
        z = latents[level] if level < len(latents) else 0
        head = area * below * 2 * z
        join = area * (below + z) * after  # 1-wide, before the size is doubled
        area *= 4
        join += area * (9 * (below + z) * (after // 2) + rest(after))
        join += area * (blocks - 1) * block(after, after)
        once += area * (9 * after * (after // 2) + after * after)  # the skip connection's share
        once += head * (level == start) + join * (level < start)
        each += head * (level > start) + join * (level >= start)
    return once, each + area * up[-1] * classes


@pytest.mark.parametrize("latents", [(2, 1), (0, 1), (3,)])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_operations_are_the_encoder_once_and_the_decoder_n_times(latents, chunk, monkeypatch):
    monkeypatch.setattr(hpunet, "CHUNK", chunk)
    model, (image, _) = small(latents=latents), batch(1)
    once, each = products((2, 4, 6, 8, 8), 8 * 16, 2, 2, latents, 3)
    for n in (1, 2, 7):
        with FlopCounterMode(display=False) as counter:
            model.sample(image, n)
        assert counter.get_total_flops() == 2 * (once + n * each)


# ------------------------------------------------------------------------ settings, sizes, axes


@pytest.mark.parametrize("latents", [(2, 1), (3,), (0, 1), (1, 0, 2)])
@pytest.mark.parametrize("objective", ["geco", "elbo"])
def test_gradient_reaches_every_parameter(latents, objective):
    model, (image, label) = small(latents=latents, objective=objective), batch(4)
    model(image, label)[0].backward()
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


@pytest.mark.parametrize("latents", [(2, 1), (3,), (0, 1), (1, 0, 2)])
def test_latents_are_where_they_should_be(latents):
    model, (image, label) = small(latents=latents), batch()
    noise = model.noise(image, 4)
    sizes = {0: (1, 2), 1: (2, 4), 2: (4, 8)}
    assert {k: tuple(e.shape) for k, e in noise.items()} == {
        k: (4, 2, width, *sizes[k]) for k, width in enumerate(latents) if width}
    assert model.sample(image, 4).shape == (4, 2, 3, 8, 16)


@pytest.mark.parametrize("fields, message", [
    (dict(latents=()), r"latents=\(\): 1 to 2 numbers"),
    (dict(latents=(1, 1, 1)), "1 to 2 numbers"),
    (dict(latents=(1, 0)), "the last one at least 1"),
    (dict(latents=(-1, 1)), "from 0 up"),
    (dict(objective="vae"), "objective='vae': choose one of 'geco', 'elbo'"),
    (dict(dims=4), "dims=4: choose one of 1, 2, 3"),
    (dict(top_k=0), "above 0 and at most 1"),
    (dict(top_k=2), "above 0 and at most 1")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HPUNet(HPUNetConfig(**dict(channels=(2, 2, 2), latents=(1,)) | fields))


def test_any_size_and_whoever_pads():
    model, (image, label) = small(objective="elbo", top_k=1), batch(size=(9, 14))
    padded = pad_to_multiple(image, 8)  # 16 x 16
    padded_label = torch.full((2, 16, 16), 255)
    center_crop(padded_label, (9, 14)).copy_(label)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    draw = lambda image: model.sample(image, 2, torch.Generator().manual_seed(0))
    assert draw(image).shape == (2, 2, 3, 9, 14)
    same(draw(image), center_crop(draw(padded), (9, 14)))
    same(model.predict(image), center_crop(model.predict(padded), (9, 14)))
    same(model.reconstruct(image, label),
         center_crop(model.reconstruct(padded, padded_label), (9, 14)))
    torch.manual_seed(0)
    loss, bound = model(image, label)[0], model.log_likelihood(image, label, 2)
    torch.manual_seed(0)
    same(loss, model(padded, padded_label)[0])
    same(bound, model.log_likelihood(padded, padded_label, 2))


@pytest.mark.parametrize("size", [(13,), (5, 6, 7)])
def test_one_and_three_axes(size):
    model, (image, label) = small(dims=len(size)), batch(size=size)
    assert model(image, label)[0].isfinite()
    assert model.sample(image, 2).shape == (2, 2, 3, *size)
    assert model.predict(image).shape == model.reconstruct(image, label).shape == (2, 3, *size)
    assert model.log_likelihood(image, label, 2).shape == (2,)


# ----------------------------------------------------------------------------------- training


def test_a_tiny_ambiguous_batch_overfits():
    """One image with two readers: GECO reaches its target, and samples hit both maps."""
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(channels=(8, 16, 16), blocks=1, convs=1, latents=(1, 1), kappa=0.2,
                                top_k=0.5, lambda_rate=0.003))
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, :, :4], label[1, 2:6, 2:6] = 1, 1
    image = seeded(1, 1, 8, 8).expand(4, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    weights = []
    for _ in range(300):
        optimizer.zero_grad()
        loss, terms = model(image, label.repeat(2, 1, 1))
        loss.backward()
        optimizer.step()
        weights.append(terms["lambda"].item())
    assert terms["reconstruction_per_pixel"] < 0.2 and terms["constraint"] < 0
    assert weights[-1] < max(weights) > 1.2  # it rose, and fell after
    assert terms["kl"] > 0.5  # log 2 would do; 0 is a collapse
    assert torch.equal(model.reconstruct(image[:2], label).argmax(1), label)
    samples = model.sample(image[:1], 200, torch.Generator().manual_seed(0)).argmax(2)[:, 0]
    hits = (samples[:, None] == label).flatten(2).all(2).float().mean(0)
    assert hits.min() > 0.05 and hits.sum() > 0.3


def test_kl_is_float32_under_autocast():
    model, (image, label) = small(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = model(image, label)
        samples, bound = model.sample(image, 2), model.log_likelihood(image, label, 2)
    loss.backward()
    assert {loss.dtype, bound.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert loss.isfinite() and samples.isfinite().all() and bound.isfinite().all()


# ---------------------------------------------------------------------------------- instances


def algorithm_1(samples, alpha, order):
    """Algorithm 1 to the letter, class 0 the background, on one-hot vectors; a random pixel of U is
    the first of `order` that is in U."""
    classes = int(samples.max()) + 1
    Y = F.one_hot(samples.flatten(1).T, classes).flatten(1).tolist()  # (pixels, n C)
    I = [-1] * len(Y)
    U = set(range(len(Y)))
    p = ([1] + [0] * (classes - 1)) * len(samples)
    c = 0
    while U:
        if c > 0:
            i = next(i for i in order if i in U)
            p = Y[i]
            I[i] = c
            U.remove(i)
        for j in sorted(U):
            d = sum(a != b for a, b in zip(Y[j], p))
            if d <= alpha:
                I[j] = c
                U.remove(j)
        c += 1
    return torch.tensor(I).view(samples.shape[1:])


def cell_samples(size, cells, n, classes, noise, seed=0):
    """n random class numbers of square cells with walls of 2 pixels, some pixels wrong."""
    generator = torch.Generator().manual_seed(seed)
    wide = size // cells
    cell = torch.arange(size) // wide
    truth = 1 + cells * cell[:, None] + cell
    wall = torch.arange(size) % wide < 2
    truth[wall] = 0
    truth[:, wall] = 0
    table = torch.randint(1, classes, (n, cells * cells + 1), generator=generator)
    table[:, 0] = 0
    samples = table[:, truth]
    wrong = torch.rand(samples.shape, generator=generator) < noise
    return torch.where(wrong, torch.randint(classes, samples.shape, generator=generator),
                       samples), truth


@pytest.mark.parametrize("alpha", [None, 0, 4, 100])
def test_clustering_is_algorithm_1(alpha):
    samples, _ = cell_samples(24, 4, 6, 5, 0.15)
    order = torch.randperm(24 * 24, generator=torch.Generator().manual_seed(3)).tolist()
    ids = cluster_instances(samples, alpha, torch.Generator().manual_seed(3))
    expected = algorithm_1(samples, 6 if alpha is None else alpha, order)
    assert torch.equal(ids, expected)
    assert ids.max() == 0 if alpha == 100 else ids.max() > 10
    assert not torch.equal(cluster_instances(samples, 0, torch.Generator().manual_seed(4)),
                           cluster_instances(samples, 0, torch.Generator().manual_seed(3)))


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha=-1: a distance, from 0 up"):
        cluster_instances(torch.zeros(2, 3, 3, dtype=torch.long), -1)


def test_noisy_cells_are_found_in_seconds():
    samples, truth = cell_samples(512, 16, 16, 16, 0.15)
    start = time.process_time()
    ids = clean_instances(cluster_instances(samples, generator=torch.Generator().manual_seed(0)))
    assert time.process_time() - start < 5
    pairs = torch.stack([ids, truth]).flatten(1).unique(dim=1, return_counts=True)
    common = {}  # each cell's most frequent id
    for (found, cell), count in zip(pairs[0].T.tolist(), pairs[1].tolist()):
        common[cell] = max(common.get(cell, (0, 0)), (count, found))
    assert sum(count for count, _ in common.values()) > 0.98 * truth.numel()
    assert len({found for _, found in common.values()}) == 16 * 16 + 1


def test_clean_up_by_hand():
    ids = torch.zeros(20, 20, dtype=torch.long)
    ids[5:10, 5:10] = 1  # 5 x 5 survives
    ids[5:10, 10:14] = 2  # 4 wide does not
    ids[0:3, 17:20] = 4  # in a corner, where it may go on beyond the image
    ids[18, 0] = 5  # nobody within 5 pixels
    cleaned = clean_instances(ids)
    expected = ids.clone()
    expected[ids == 2] = 1
    assert torch.equal(cleaned, expected)
    expected[18, 0] = 0
    assert torch.equal(clean_instances(ids, keep=False), expected)
    expected[ids == 2] = 2
    assert torch.equal(clean_instances(ids, erosion=3, keep=False), expected)
    far = clean_instances(ids, box=3)  # only what touches
    assert (far[5:10, 10] == 1).all() and (far[5:10, 11:14] == 2).all()


def test_an_instance_that_grows_may_survive():
    ids = torch.zeros(9, 12, dtype=torch.long)
    ids[2:7, 2:4] = 1  # beside 2, which takes it over and is 5 wide then
    ids[2:7, 4:7] = 2
    assert (clean_instances(ids)[2:7, 2:7] == 2).all()
    assert (clean_instances(ids, keep=False)[2:7, 2:7] == 2).all()


def clean_loop(ids, erosion, box):
    """Appendix H pixel by pixel."""
    inside = lambda m, y, x, r: m[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
    pixels = list(itertools.product(*map(range, ids.shape)))
    ids = ids.clone()
    for c in sorted(set(ids.unique().tolist()) - {0}):
        if any((inside(ids, *p, erosion // 2) == c).all() for p in pixels if ids[p] == c):
            continue
        before = ids.clone()
        for p in pixels:
            around = inside(before, *p, box // 2).flatten().tolist()
            around = [v for v in around if v not in (0, c)]
            if before[p] == c and around:
                ids[p] = min(set(around), key=lambda v: (-around.count(v), v))
    return ids


def test_clean_up_is_appendix_h():
    samples, _ = cell_samples(32, 4, 4, 4, 0.2)
    ids = cluster_instances(samples, 2, torch.Generator().manual_seed(0))
    assert len(ids.unique()) > 30
    cleaned = clean_instances(ids, 3, 7)
    assert torch.equal(cleaned, clean_loop(ids, 3, 7))
    assert len(cleaned.unique()) < len(ids.unique())


def test_volumes_are_clustered_too():
    samples, truth = cell_samples(16, 2, 8, 9, 0)
    volume = samples[:, None].expand(-1, 6, -1, -1)
    ids = clean_instances(cluster_instances(volume), 3, 5)
    assert ids.shape == (6, 16, 16) and len(ids.unique()) == 5
    assert torch.equal(ids == 0, (truth == 0).expand(6, -1, -1))


# ------------------------------------------------------------------- extrapolation, pictures


def test_deviation():
    samples = torch.randint(2, (9, 4, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(deviation(samples, 2), samples.float().std(0, correction=0))
    assert deviation(torch.arange(4).view(4, 1), 4).item() == pytest.approx((3 / 8) ** 0.5)


def test_pictures(tmp_path, monkeypatch):
    chosen = []
    model, (image, label) = small(in_channels=1), batch(channels=1)
    sample = model.sample
    monkeypatch.setattr(model, "sample",
                        lambda *a, scales=None: chosen.append(scales) or sample(*a, scales=scales))
    analysis.paper_figures.plot_scales(model, image[0], tmp_path / "scales.png")
    assert chosen == [None, [1], [0]]
    seen = torch.cat([image, torch.zeros(2, 4, 8, 16)], 1)
    seen[:, -1, :4] = 1  # hidden
    analysis.paper_figures.plot_extrapolation(small(in_channels=1 + 3 + 1), seen, label, tmp_path / "fill.png")
    case = dict(name="a", image=image[0], truth=label[0], found=label[0], again=label[0],
                samples=label[:1].expand(6, -1, -1))
    analysis.instances.plot_instances(tmp_path / "instances.png", [case])
    for name in ("scales", "fill", "instances"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert at_mean(0, model.unet(model.encode(image), at_mean)[2][0]).shape == (2, 2, 1, 2)
