"""HPU-Net against a plain float64 version of itself, its objective against hand derivations, its
bound against an integral."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

import analysis.instances as instances
import analysis.paper_figures as figures
import data
import train
from backbones.res_blocks import ResBlock
from common import bounded_log_std, cross_entropy
from helpers import batch, count_parameters, generator, run_two, seeded
from hpunet import HPUNet, HPUNetConfig, hard_pixels


def small(seed=0, **fields):
    """Four levels, latents at the two coarsest."""
    torch.manual_seed(seed)
    fields = dict(in_channels=2, num_classes=3, channels=(4, 6, 8, 8), blocks=2, convs=2,
                  latents=(2, 1), top_k=0.2) | fields
    return HPUNet(HPUNetConfig(**fields))


def small_batch(count=2, size=(8, 16)):
    return batch(count, size)


def noise_of(model, image, n, seed):
    """What model.noise yields for all n draws after this seed."""
    torch.manual_seed(seed)
    chunks = list(model.noise(image, n))
    return {l: torch.cat([chunk[l] for chunk in chunks]) for l in chunks[0]}


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
    assert round(count_parameters(model) / 1e6, 2) == 20.58
    assert round((count_parameters(model) - count_parameters(model.posterior)) / 1e6, 2) == 11.18


def test_learning_rate_falls_to_half_of_1e_5_in_four_steps():
    drops = HPUNet.TRAINING["lr_drops"]
    assert len(drops) == 4 and drops[-1][0] < HPUNet.TRAINING["steps"]
    assert HPUNet.TRAINING["lr"] * drops[-1][1] == pytest.approx(0.5e-5)


# ------------------------------------------------------------------- against float64 loops


def plain(net, x, choose, out=None):
    """A net as the paper draws it, in float64: features doubled, concatenated, a block after the
    other. choose: (i, normal) -> z_i. Returns latents, normals, features or `out`'s logits."""
    net, x, skips, latents, normals = copy.deepcopy(net).double(), x.double(), [], {}, {}
    for level, blocks in enumerate(net.encoder):
        x = blocks(F.avg_pool2d(x, 2) if level else x)
        skips.append(x)
    x = skips.pop()
    for i in range(len(net.joins) + 1):
        if i > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = ResBlock.forward(net.joins[i - 1], torch.cat([x, skips.pop()], 1))
            x = net.decoder[i - 1](x)
        if str(i) in net.heads:
            mean, log_std = net.heads[str(i)](x).chunk(2, 1)
            bounded = bounded_log_std(log_std.detach()).double()
            normals[i] = Independent(Normal(mean, bounded.exp()), 3)
            latents[i] = choose(i, normals[i])
            x = torch.cat([x, latents[i]], 1)
    return latents, normals, copy.deepcopy(out).double()(x) if out else x


def from_noise(noise):
    return lambda i, normal: normal.mean + normal.stddev * noise[i].double()


def at_mean(i, normal):
    return normal.mean


def seen_by_posterior(image, label, classes=3):
    hot = F.one_hot(label.clamp(max=classes), classes + 1)[..., :classes].movedim(-1, 1)
    return torch.cat([image, hot], 1)


def plain_terms(model, image, label, noise):
    """Logits, latents, posterior's and prior's normals in float64."""
    latents, q, _ = plain(model.posterior, seen_by_posterior(image, label), from_noise(noise))
    _, p, logits = plain(model.unet, image, lambda i, normal: latents[i], model.out)
    return logits, latents, q, p


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


@pytest.mark.parametrize("latents", [(2, 1), (3,), (0, 1), (1, 0, 2)])
def test_elbo(latents):
    """Eq. 5 over all pixels; kl_<i> against torch.distributions."""
    model = small(objective="elbo", beta=1.7, top_k=1, latents=latents)
    image, label = small_batch()
    torch.manual_seed(3)
    loss, terms = model(image, label)
    noise = noise_of(model, image, 1, 3)
    sizes = {0: (1, 2), 1: (2, 4), 2: (4, 8)}
    assert {i: tuple(e.shape) for i, e in noise.items()} == {
        i: (2, width, *sizes[i]) for i, width in enumerate(latents) if width}
    logits, _, q, p = plain_terms(model, image, label, noise)
    reconstruction = -sum(log_prob_loop(*pair).sum() for pair in zip(logits, label)) / 2
    kl = {i: kl_divergence(q[i], p[i]).mean() for i in q}
    same = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    same(terms["reconstruction"], reconstruction)
    assert set(kl) == {i for i, width in enumerate(latents) if width}
    for i, value in kl.items():
        assert value > 1e-3
        same(terms[f"kl_{i}"], value)
    same(terms["kl"], sum(kl.values()))
    same(loss, reconstruction + 1.7 * sum(kl.values()))
    same(terms["reconstruction_per_pixel"], 2 * reconstruction / (label != 255).sum())
    assert "lambda" not in terms


def test_hierarchical_kl_is_that_of_the_joint_distributions():
    """Eq. 12: the sum of expected KLs is E[log Q - log P], here by Monte Carlo."""
    model, (image, label) = small(), small_batch(1)
    with torch.no_grad():
        z, q, _ = model.posterior(model.encode(image, label), noise=noise_of(model, image, 4000, 0))
        _, p, _ = model.unet(model.encode(image), latents=z)
    analytic = sum(q[i].kl(p[i]) for i in q)
    ratio = sum(q[i].log_prob(z[i]) - p[i].log_prob(z[i]) for i in q)
    assert analytic.std() > 1e-3  # the second KL depends on the first draw
    assert abs(ratio.mean() - analytic.mean()) < 4 * ((ratio - analytic).std() / 4000**0.5)


# ----------------------------------------------------------------------------- log-likelihood


def test_importance_bound_by_a_loop():
    """Five draws, three of them the posterior's, with the density of the mixture."""
    model, (image, label) = small(), small_batch()
    torch.manual_seed(4)
    bound = model.log_likelihood(image, label, 5)
    torch.manual_seed(4)
    log_weights = []
    for of_q, count in ((True, 3), (False, 2)):
        (noise,) = model.noise(image, count)
        for k in range(count):
            choose = from_noise({i: e[2 * k : 2 * k + 2] for i, e in noise.items()})
            asked = seen_by_posterior(image, label)
            z, *_ = plain(model.posterior, asked, choose) if of_q else \
                plain(model.unet, image, choose)
            _, q, _ = plain(model.posterior, asked, lambda i, normal: z[i])
            _, p, logits = plain(model.unet, image, lambda i, normal: z[i], model.out)
            log_q, log_p = (sum(normals[i].log_prob(z[i]) for i in z) for normals in (q, p))
            log_mix = torch.logaddexp(log_q + math.log(3 / 5), log_p + math.log(2 / 5))
            log_y = torch.stack([log_prob_loop(*pair).sum() for pair in zip(logits, label)])
            log_weights.append(log_y + log_p - log_mix)
    expected = torch.stack(log_weights).logsumexp(0) - math.log(5)
    torch.testing.assert_close(bound.double(), expected.detach(), rtol=1e-6, atol=0)


def test_bound_of_one_latent_number_against_its_integral():
    """A single z: p(y | x) is a sum over a fine grid. The estimate of it is without bias for every
    n, so its logarithm is a lower bound on average, and it is exact for many draws."""
    model = small(in_channels=1, dims=1, channels=(4, 6), latents=(1,)).eval()
    image, label = torch.tensor([[[0.7, -0.4]]]), torch.tensor([[2, 0]])
    z = torch.linspace(-40, 40, 80_001).view(-1, 1, 1)
    with torch.no_grad():
        _, p, x = model.unet(model.encode(image), latents={0: z})
        density = Normal(p[0].mean[0].double(), p[0].std[0].double()).log_prob(z.double()).exp()
        prob = (-cross_entropy(model.out(x), label.expand(len(z), -1))).double().exp()
    exact = (density.flatten() * prob).sum().item() * 1e-3
    torch.manual_seed(0)
    for n in (1, 2, 5):
        bounds = model.log_likelihood(image.expand(20_000, 1, 2), label.expand(20_000, 2), n)
        estimate = bounds.double().exp()
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / 20_000**0.5
        assert bounds.mean() < math.log(exact)
    many = model.log_likelihood(image, label, 100_000).item()
    assert many == pytest.approx(math.log(exact), abs=0.01)


def test_a_map_it_was_never_taught_keeps_a_likelihood():
    """That of the 16 draws from the prior less one nat, however wrong the posterior is."""
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(channels=(4, 8, 8), blocks=1, convs=1, latents=(1, 1), top_k=0.2))
    image = seeded(2, 1, 32, 32)
    label = torch.zeros(2, 32, 32, dtype=torch.long)
    label[:, 12:20, 12:20] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(image, label)[0].backward()
        optimizer.step()
    for untaught in (torch.ones_like(label), (seeded(2, 32, 32) > 0).long()):
        torch.manual_seed(1)
        bound = model.log_likelihood(image, untaught, 32)
        torch.manual_seed(1)
        list(model.noise(image, 16))  # of the posterior's draws; then the same 16 of the prior
        error = cross_entropy(model.sample(image, 16), untaught)
        by_prior = (-error).logsumexp(0) - math.log(16)
        assert bound.min() > -1e5
        assert (bound >= by_prior - 1).all()


# --------------------------------------------------------------------------------------- GECO


def test_constraint_has_the_averages_value_and_the_batchs_gradient():
    """By hand: C_ma = 0.99 C_ma + 0.01 C; its gradient is that of C."""
    model, average = small(), None
    for x in (3.0, -1.0, 2.0, 0.5):
        x = torch.tensor(x, requires_grad=True)
        constraint = model._averaged(x**2 - 1)
        now = x.item() ** 2 - 1
        average = now if average is None else 0.99 * average + 0.01 * now
        assert constraint.item() == pytest.approx(average, rel=1e-6)
        constraint.backward()
        assert x.grad.item() == pytest.approx(2 * x.item(), rel=1e-6)
    assert model.steps_seen == 4


def test_geco_loss_and_its_gradients():
    """Eq. 6 by hand. The weights descend along lambda C + KL of the batch, rho ascends in
    lambda C."""
    model, (image, label) = small(kappa=0.3), small_batch()
    with torch.no_grad():
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
    kept = int(0.2 * label.numel())
    assert count.item() == pytest.approx(kept / 2)
    batch_constraint = terms["reconstruction"].item() - 0.3 * kept / 2
    average = 0.99 * 7 + 0.01 * batch_constraint
    assert terms["constraint"].item() == pytest.approx(average)
    assert terms["lambda"].item() == pytest.approx(weight)
    assert loss.item() == pytest.approx(weight * average + terms["kl"].item())
    assert own.item() == pytest.approx(weight * batch_constraint + terms["kl"].item())
    assert alone.steps_seen == 5 and alone.constraint == 7
    loss.backward()
    own.backward()
    slope = 2 * math.log1p(math.e) / (1 + math.exp(-1))  # d lambda / d rho
    assert model.rho.grad.item() == pytest.approx(-slope * average, rel=1e-5)
    assert alone.rho.grad.item() == pytest.approx(-slope * batch_constraint, rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), alone.parameters()):
        if name != "rho":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_lambda_starts_at_1_rises_while_the_constraint_is_violated_and_falls_after():
    model, (image, label) = small(kappa=0.0), small_batch()
    optimizer = torch.optim.Adam([model.rho], lr=0.01, weight_decay=1e-5)
    weights = []
    for step in range(40):
        if step == 20:
            model.config = HPUNetConfig(**vars(model.config) | dict(kappa=100.0))
            model.steps_seen.zero_()  # forget the average
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
        weights.append(terms["lambda"].item())
    assert weights[0] == pytest.approx(1)
    assert weights[:21] == sorted(weights[:21]) and weights[20] > 1.2
    assert weights[-1] < weights[20]


# -------------------------------------------------------------------------- stochastic top-k


def test_far_apart_the_hardest_pixels_are_kept():
    error = 10 ** (4 * seeded(2, 10, 25)).clamp(max=12)
    top = error.flatten().topk(10).indices  # 2 % of 500
    error.view(-1)[top] *= 1e20
    kept = hard_pixels(error, 0.02)
    assert kept.shape == error.shape
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(top.tolist())
    assert hard_pixels(error, 1).all() and hard_pixels(error, 1e-9).sum() == 1
    assert hard_pixels(error, 0.0199).sum() == 9  # of 9.95: rounded down


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
    model, (image, label) = small(top_k=0.5, kappa=0.25), small_batch()
    mask = torch.zeros_like(label, dtype=torch.bool)
    label[label == 255] = 0
    mask[0, 2, 3] = mask[1, 4, 5:7] = True  # three of 256, of which 128 could be kept
    torch.manual_seed(0)
    _, terms = model(image, label, mask)
    label = torch.where(mask, label, 255)
    logits, *_ = plain_terms(model, image, label, noise_of(model, image, 1, 0))
    total = -sum(log_prob_loop(*pair).sum() for pair in zip(logits, label))
    assert terms["reconstruction"].item() == pytest.approx(total.item() / 2, rel=1e-6)
    assert terms["reconstruction_per_pixel"].item() == pytest.approx(total.item() / 3, rel=1e-6)
    assert terms["constraint"].item() == pytest.approx(total.item() / 2 - 0.25 * 1.5, rel=1e-6)
    assert model(image, torch.full_like(label, 255))[1]["reconstruction"] == 0


def one_of_two(rank, folder):
    """Two steps of a model that is given half of the batch; leaves its state in a file."""
    model = torch.nn.parallel.DistributedDataParallel(small())
    half = [tensor.chunk(2)[rank] for tensor in batch(4, (8, 16))]
    torch.save(outcome(model, model.module, *half), folder / f"{rank}.pt")
    if rank == 0:  # alone and outside training, it waits for nobody
        assert model.module.eval()(*half)[0].isfinite()


def outcome(run, model, image, label):
    for step in range(2):
        torch.manual_seed(step)
        run.zero_grad()
        loss, _ = run(image, label)
        loss.backward()
    return [loss.detach(), model.constraint, *(p.grad for p in model.parameters())]


def test_two_processes_do_what_one_does(tmp_path):
    run_two(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = small()
    expected = outcome(model, model, *batch(4, (8, 16)))
    torch.testing.assert_close((first[0] + second[0]) / 2, expected[0])
    for rank in (first, second):
        torch.testing.assert_close(rank[1:], expected[1:], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("latents", [(2, 1), (0, 1)])
@pytest.mark.parametrize("chunk, rows", [(1, [2] * 5), (2 * 2 * 8 * 16 * 16, [4, 4, 2]),
                                         (2**30, [10])])
def test_samples_are_ancestral_and_the_encoder_runs_once(latents, chunk, rows, monkeypatch):
    model, (image, _) = small(latents=latents), small_batch()
    noise = noise_of(model, image, 5, 0)
    monkeypatch.setattr("common.CHUNK_CPU", chunk)
    seen, encoded = [], []
    model.out.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model.unet.encoder[0].register_forward_hook(lambda m, args, out: encoded.append(len(out)))
    torch.manual_seed(0)
    samples = model.sample(image, 5)
    assert seen == rows and encoded == [2]
    for k in range(5):
        choose = from_noise({i: e[2 * k : 2 * k + 2] for i, e in noise.items()})
        _, _, expected = plain(model.unet, image, choose, model.out)
        torch.testing.assert_close(samples[k].double(), expected, rtol=1e-5, atol=1e-5)
    assert samples.std(0).max() > 0.1


def test_a_finer_prior_depends_on_the_coarser_draw():
    model, (image, _) = small(), small_batch()
    noise, normals = noise_of(model, image, 1, 0), []
    for shift in (0, 1):
        normals.append(model.unet(model.encode(image), noise=noise | {0: noise[0] + shift})[1])
    torch.testing.assert_close(normals[0][0].mean, normals[1][0].mean)
    for moment in ("mean", "std"):
        change = getattr(normals[0][1], moment) - getattr(normals[1][1], moment)
        assert change.abs().max() > 1e-3


def test_scales_are_drawn_or_at_their_mean():
    model, (image, _) = small(), small_batch()
    draw = lambda scales: model.sample(image, 2, generator(), scales=scales)
    (noise,) = model.noise(image, 2, generator())
    for scales in ((0,), (1,), ()):
        choose = from_noise({i: e[:2] * (i in scales) for i, e in noise.items()})
        _, _, expected = plain(model.unet, image, choose, model.out)
        torch.testing.assert_close(draw(scales)[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(draw((0, 1)), draw(None)) and not torch.equal(draw((0,)), draw(None))
    torch.testing.assert_close(draw(())[0].softmax(1), model.predict(image))
    with pytest.raises(ValueError, match="scales=2: choose one of 0, 1"):
        draw((2,))
    with pytest.raises(ValueError, match="choose one of 1"):  # z_0 is not there
        small(latents=(0, 1)).sample(image, 1, scales=(0,))


def test_predict_and_reconstruct_stand_at_the_means():
    model, (image, label) = small(), small_batch()
    same = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    _, _, expected = plain(model.unet, image, at_mean, model.out)
    same(model.predict(image), expected.softmax(1))
    latents, _, _ = plain(model.posterior, seen_by_posterior(image, label), at_mean)
    _, _, expected = plain(model.unet, image, lambda i, normal: latents[i], model.out)
    same(model.reconstruct(image, label), expected)


# -------------------------------------------------------------------------- settings, training


@pytest.mark.parametrize("latents", [(2, 1), (3,), (0, 1), (1, 0, 2)])
def test_gradient_reaches_every_parameter(latents):
    model, (image, label) = small(latents=latents), small_batch(4)
    model(image, label)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("fields, message", [
    (dict(latents=()), r"latents=\(\): 1 to 2 numbers"),
    (dict(latents=(1, 1, 1)), "1 to 2 numbers"),
    (dict(latents=(1, 0)), "the last one at least 1"),
    (dict(latents=(-1, 1)), "from 0 up"),
    (dict(objective="vae"), "objective='vae': choose one of 'geco', 'elbo'"),
    (dict(objective="elbo"), r"objective='elbo' with top_k=0.02: Eq. 5 needs top_k=1"),
    (dict(dims=4), "dims=4: choose one of 1, 2, 3"),
    (dict(top_k=0), "above 0 and at most 1"),
    (dict(top_k=2), "above 0 and at most 1")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HPUNet(HPUNetConfig(**dict(channels=(2, 2, 2), latents=(1,)) | fields))


@pytest.mark.slow
def test_a_tiny_ambiguous_batch_overfits():
    """One image with two annotators: GECO reaches its target, and samples hit both maps."""
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(channels=(8, 16, 16), blocks=1, convs=1, latents=(1, 1), kappa=0.2,
                                top_k=0.5))
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
    samples = model.sample(image[:1], 200, generator()).argmax(2)[:, 0]
    hits = (samples[:, None] == label).flatten(2).all(2).float().mean(0)
    assert hits.min() > 0.05 and hits.sum() > 0.3


# ------------------------------------------------------------------------------------ pictures


def test_pictures(tmp_path, monkeypatch):
    chosen = []
    model, (image, label) = small(in_channels=1), batch(size=(8, 16), channels=1)
    sample = model.sample
    monkeypatch.setattr(model, "sample",
                        lambda *a, scales=None: chosen.append(scales) or sample(*a, scales=scales))
    figures.plot_scales(model, image[0], tmp_path / "scales.png")
    assert chosen == [None, [1], [0]]
    seen = torch.cat([image, torch.zeros(2, 4, 8, 16)], 1)
    seen[:, -1, :4] = 1  # hidden
    figures.plot_extrapolation(small(in_channels=1 + 3 + 1), seen, label, tmp_path / "fill.png")
    case = dict(name="a", image=image[0], truth=label[0], found=label[0], again=label[0],
                samples=label[:1].expand(6, -1, -1))
    instances.plot_instances(tmp_path / "instances.png", [case])
    for name in ("scales", "fill", "instances"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, of_instances", [("cells", True), ("shapes", False)])
def test_quick_settings_know_sets_with_instances(name, of_instances):
    settings, _ = train.settle(train.parse(["--model", "hpunet", "--data", name, "--quick",
                                            "--model-args", "beta=7"]))
    config = train.first_model(settings, data.load(name, "train", n=10, size=48)).config
    recipe = HPUNet.QUICK_CONFIG | (HPUNet.QUICK_INSTANCES if of_instances else {}) | dict(beta=7)
    assert vars(config) | recipe == vars(config)
    assert (config.objective == "elbo") == of_instances
