"""PHiSeg: its hierarchy against torch.distributions and float64 loops, its bound against integrals."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import analysis.paper_figures as figures
import phiseg
from common import DiagonalNormal, center_crop
from helpers import batch, count_parameters, generator, seeded
from phiseg import PHiSeg, PHiSegConfig


def small(seed=0, train=False, **fields):
    """Four resolution, three latent levels; latents made to matter more than at the start."""
    torch.manual_seed(seed)
    fields = dict(in_channels=2, num_classes=3, channels=(4, 5, 6, 7), latent_levels=3,
                  convs=1) | fields
    model = PHiSeg(PHiSegConfig(**fields))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_var.fill_(0.3)
                module.weight += 0.5 * torch.randn_like(module.weight)
    return model.train(train)


def small_batch(count=2, size=(8, 16)):
    return batch(count, size)


def distribution(normal):
    """A DiagonalNormal of ours as torch's, in float64."""
    return Normal(normal.mean.detach().double(), normal.std.detach().double())


def noise_of(model, image, n, seed):
    """What model.noise yields for all n draws after this seed."""
    torch.manual_seed(seed)
    chunks = list(model.noise(image, n))
    return {l: torch.cat([chunk[l] for chunk in chunks]) for l in chunks[0]}


# ------------------------------------------------------------------------- the paper's model


def test_default_is_phiseg_7_5():
    with torch.device("meta"):
        model = PHiSeg()
    for net, inputs in ((model.prior, 1), (model.posterior, 3)):
        assert [len([m for m in block if hasattr(m, "kernel_size")]) for block in net.encoder] \
            == [3] * 7
        assert [block[0].out_channels for block in net.encoder] == [32, 64, 128] + [192] * 4
        assert net.encoder[0][0].in_channels == inputs
        joins = [net.join[str(l)][0] for l in (1, 2, 3, 4)]
        assert [join.in_channels for join in joins] == [128 + 64] + [192 + 64] * 3
        assert [join.out_channels for join in joins] == [32, 64, 128, 192]
        heads = [net.heads[str(l)].out_channels for l in (1, 2, 3, 4, 5)]
        assert heads == [4] * 5  # mean, log std of two channels
        assert [up[0].in_channels for up in net.up.values()] == [2] * 4
    assert [len(level) for level in model.likelihood.finer.values()] == [2] * 5
    assert [model.likelihood.join[str(l)][0].out_channels for l in (1, 2, 3, 4)] \
        == [128, 192, 192, 192]
    for name, module in model.named_modules():  # batch norm on all but the outputs
        if hasattr(module, "kernel_size") and module.bias is not None:
            assert module.out_channels in (2, 4) and module.kernel_size == (1, 1), name
    assert round(count_parameters(model) / 1e6, 2) == 17.81
    assert round((count_parameters(model) - count_parameters(model.posterior)) / 1e6, 2) == 11.83
    assert model.config.kl_base == 4


@pytest.mark.parametrize("levels, finest", [(3, (8, 16)), (4, (16, 32)), (1, (2, 4))])
def test_latents_stand_where_code_and_text_put_them(levels, finest):
    model, image = small(latent_levels=levels), torch.zeros(1, 2, 16, 32)
    noise, features = noise_of(model, image, 5, 0), model.encode(image)
    assert list(noise) == list(features) == list(range(levels, 0, -1))
    for l, e in noise.items():
        assert e.shape == (5, 2, finest[0] >> l - 1, finest[1] >> l - 1)
        assert features[l].shape[2:] == e.shape[2:]
    wide = small(latent_channels=3)
    assert noise_of(wide, image, 5, 0)[1].shape[1] == 3
    assert wide.predict(image).shape == (1, 3, 16, 32)


@pytest.mark.parametrize("fields, message", [
    (dict(latent_levels=5), "latent_levels=5: 1 to 4"), (dict(latent_levels=0), "1 to 4"),
    (dict(dims=4), "dims=4: choose one of 1, 2, 3")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


# ------------------------------------------------------------------------------- the objective


def walk(net, features, choose):
    """({l: z_l}, {l: its normal}) level by level; choose: (l, normal) -> z_l."""
    latents, normals = {}, {}
    for l in sorted(features, reverse=True):
        x = features[l]
        if l < max(features):
            up = F.interpolate(latents[l + 1], scale_factor=2, mode="bilinear")
            x = net.join[str(l)](torch.cat([x, net.up[str(l)](up)], 1))
        normals[l] = DiagonalNormal(*net.heads[str(l)](x).chunk(2, 1))
        latents[l] = choose(l, normals[l])
    return latents, normals


def test_kl_of_every_level_is_torch_s_at_the_latents_drawn():
    model, (image, label) = small(train=True), small_batch()
    torch.manual_seed(3)
    _, terms = model(image, label)
    noise = noise_of(model, image, 1, 3)
    latents, q = walk(model.posterior, model.encode(image, label),
                      lambda l, normal: normal.mean + normal.std * noise[l])
    _, p = walk(model.prior, model.encode(image), lambda l, normal: latents[l])
    kls = {l: kl_divergence(distribution(q[l]), distribution(p[l])).sum() / 2 for l in (1, 2, 3)}
    for l, kl in kls.items():
        torch.testing.assert_close(terms[f"kl_{l}"].double(), kl, rtol=1e-5, atol=1e-5)
    assert min(kls.values()) > 0.01
    torch.testing.assert_close(terms["kl"].double(), sum(kls.values()), rtol=1e-5, atol=0)


def test_hierarchical_kl_is_the_monte_carlo_estimate():
    """E_q[sum_l KL_l] of Eq. 9 = E_q[log q(z | s, x) - log p(z | x)], by 4000 draws of each."""
    model, (image, label) = small(), small_batch(1)
    with torch.no_grad():
        latents, q = model.posterior(model.encode(image, label),
                                     noise=noise_of(model, image, 4000, 0))
        _, p = model.prior(model.encode(image), latents=latents)
    exact = sum(q[l].kl(p[l]) for l in latents).double()
    ratio = sum((distribution(q[l]).log_prob(z.double()) - distribution(p[l]).log_prob(z.double()))
                .flatten(1).sum(1) for l, z in latents.items())
    difference = ratio - exact  # of mean 0, where the factorisation is right
    assert exact.mean() > 1 and ratio.std() > 0.3
    assert abs(difference.mean()) < 3 * difference.std() / 4000**0.5


def cross_entropy_loop(logits, label):
    total = 0.0
    for index in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        k = label[tuple(index)].item()
        if k != 255:
            values = logits[(index[0], slice(None), *index[1:])].double().tolist()
            top = max(values)
            total -= values[k] - top - math.log(sum(math.exp(v - top) for v in values))
    return total


@pytest.mark.parametrize("kl_base", [1.0, 2.0, 4.0])
def test_loss_is_eq_2_and_deep_supervision(kl_base):
    model, (image, label) = small(kl_base=kl_base), small_batch()
    torch.manual_seed(3)
    loss, terms = model(image, label)
    latents, _ = model.posterior(model.encode(image, label), noise=noise_of(model, image, 1, 3))
    total, losses = 0, []
    for l, residual in model.likelihood(latents).items():
        block = 2 ** (l - 1)  # repeat_interleave is nearest-neighbour upsampling
        total = total + residual.detach().double().repeat_interleave(block, 2) \
            .repeat_interleave(block, 3)
        losses.append(cross_entropy_loop(total, label) / 2)
    torch.testing.assert_close(terms["reconstruction"].item(), losses[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["supervision"].item(), sum(losses[:-1]), rtol=1e-6, atol=0)
    expected = sum(losses) + sum(kl_base ** (l - 1) * terms[f"kl_{l}"].item() for l in (1, 2, 3))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)


def test_running_statistics_are_of_posterior_and_prior_draws():
    """A norm of the likelihood that follows a convolution: its mean moves twice a step."""
    model, (image, label) = small(train=True), small_batch()
    seen = []
    model.likelihood.enter["1"][0].register_forward_hook(
        lambda module, args, out: seen.append(out.detach().mean((0, 2, 3))))
    norm = model.likelihood.enter["1"][1]
    expected = norm.running_mean.clone()
    model(image, label)
    assert len(seen) == 2 and not torch.allclose(*seen, atol=1e-3)
    for mean in seen:
        expected.lerp_(mean, norm.momentum)
    torch.testing.assert_close(norm.running_mean, expected)
    model.eval()(image, label)
    assert len(seen) == 3


# ----------------------------------------------------------------------------- log-likelihood


def test_importance_bound_by_a_loop():
    """Five draws, three of them the posterior's, with the density of the mixture."""
    model, (image, label) = small(), small_batch()
    torch.manual_seed(4)
    bound = model.log_likelihood(image, label, 5)
    torch.manual_seed(4)
    p_features, q_features = model.encode(image), model.encode(image, label)
    log_weights = []
    for net, features, count in ((model.posterior, q_features, 3), (model.prior, p_features, 2)):
        (noise,) = model.noise(image, count)
        for i in range(count):
            part = {l: e[2 * i : 2 * i + 2] for l, e in noise.items()}
            latents, _ = walk(net, features, lambda l, normal: normal.mean + normal.std * part[l])
            densities = []
            for other, given in ((model.posterior, q_features), (model.prior, p_features)):
                _, normals = walk(other, given, lambda l, normal: latents[l])
                densities.append(sum(distribution(normals[l]).log_prob(z.double()).flatten(1).sum(1)
                                     for l, z in latents.items()))
            log_q, log_p = densities
            log_mix = torch.logaddexp(log_q + math.log(3 / 5), log_p + math.log(2 / 5))
            logits = model.level_logits(latents, label.shape[1:])[1].detach()
            error = [cross_entropy_loop(logits[k, None], label[k, None]) for k in range(2)]
            log_weights.append(log_p - log_mix - torch.tensor(error, dtype=torch.float64))
    expected = torch.stack(log_weights).logsumexp(0) - math.log(5)
    torch.testing.assert_close(bound.double(), expected.detach(), rtol=1e-5, atol=0)


def test_bound_of_one_latent_number_against_its_integral():
    """A single z: p(y | x) is a sum over a fine grid. The estimate of it is without bias for every
    n, so its logarithm is a lower bound on average, and it is exact for many draws."""
    model = small(in_channels=1, dims=1, channels=(6,), latent_levels=1, latent_channels=1)
    image, label = torch.full((1, 1, 1), 0.7), torch.tensor([[2]])
    z = torch.linspace(-40, 40, 80_001).view(-1, 1, 1)
    with torch.no_grad():
        _, p = model.prior(model.encode(image))
        density = distribution(p[1]).log_prob(z.double()).flatten().exp()
        prob = model.level_logits({1: z}, (1,))[1].softmax(1)[:, 2].flatten().double()
    exact = (density * prob).sum().item() * 1e-3
    torch.manual_seed(0)
    for n in (1, 2, 5):
        bounds = model.log_likelihood(image.expand(20_000, 1, 1), label.expand(20_000, 1), n)
        estimate = bounds.double().exp()
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / 20_000**0.5
        assert bounds.mean() < math.log(exact)
    many = model.log_likelihood(image, label, 100_000).item()
    assert many == pytest.approx(math.log(exact), abs=0.01)


def test_a_map_it_was_never_taught_keeps_a_likelihood():
    """That of the 16 draws from the prior less one nat, however wrong the posterior is."""
    torch.manual_seed(0)
    model = PHiSeg(PHiSegConfig(channels=(4, 6, 8), latent_levels=2, convs=1))
    image = seeded(2, 1, 32, 32)
    label = torch.zeros(2, 32, 32, dtype=torch.long)
    label[:, 12:20, 12:20] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(image, label)[0].backward()
        optimizer.step()
    model.eval()
    for untaught in (torch.ones_like(label), (seeded(2, 32, 32) > 0).long()):
        torch.manual_seed(1)
        bound = model.log_likelihood(image, untaught, 32)
        torch.manual_seed(1)
        list(model.noise(image, 16))  # of the posterior's draws; then the same 16 of the prior
        error = phiseg.cross_entropy(model.sample(image, 16), untaught)
        by_prior = (-error).logsumexp(0) - math.log(16)
        assert bound.min() > -1e5
        assert (bound >= by_prior - 1).all()


# ----------------------------------------------------------------------------------- sampling


def test_each_level_s_prior_sees_the_draw_of_the_coarser_level():
    """A port that draws all levels from one pass of the prior fails here."""
    model, (image, _) = small(), small_batch(1)
    features, noise = model.encode(image), noise_of(model, image, 2, 0)
    for level in (2, 3):  # two draws that differ at this level alone
        parted = {l: e[:1].repeat(2, 1, 1, 1) for l, e in noise.items()}
        parted[level] = noise[level]
        _, normals = model.prior(features, noise=parted)
        for l, normal in normals.items():
            for moment in (normal.mean, normal.std):
                assert torch.allclose(moment[0], moment[1], atol=1e-6) == (l >= level)


@pytest.mark.parametrize("chunk", [1, 2**30])
def test_samples_are_ancestral_and_the_encoder_runs_once(chunk, monkeypatch):
    monkeypatch.setattr("common.CHUNK_CPU", chunk)
    model, (image, _) = small(), small_batch(size=(9, 13))
    rows, encoded = [], []
    hook = model.likelihood.out["1"].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    model.prior.encoder[0].register_forward_hook(lambda m, args, out: encoded.append(len(out)))
    samples = model.sample(image, 3, generator())
    assert rows == {1: [2, 2, 2], 2**30: [6]}[chunk] and encoded == [2]
    hook.remove()
    monkeypatch.setattr("common.CHUNK_CPU", 2**30)
    (noise,) = model.noise(image, 3, generator())
    for i in range(3):
        latents, _ = walk(model.prior, model.encode(image),
                          lambda l, normal: normal.mean + normal.std * noise[l][2 * i : 2 * i + 2])
        residuals = model.likelihood(latents)
        total = sum(F.interpolate(r, scale_factor=2 ** (l - 1)) for l, r in residuals.items())
        torch.testing.assert_close(samples[i], center_crop(total, (9, 13)), rtol=1e-4, atol=1e-4)
    assert samples.std(0).max() > 0.1


def test_predict_and_reconstruct_stand_at_the_means():
    model, (image, label) = small(), small_batch()
    for net, features, result in (
            (model.prior, model.encode(image), model.predict(image)),
            (model.posterior, model.encode(image, label), model.reconstruct(image, label))):
        latents, _ = walk(net, features, lambda l, normal: normal.mean)
        expected = model.level_logits(latents, (8, 16))[1]
        expected = expected.softmax(1) if net is model.prior else expected
        torch.testing.assert_close(result, expected)


def test_masks_are_summed_in_float32():
    model, (image, _) = small(train=True), small_batch()
    with torch.autocast("cpu", torch.bfloat16):
        latents, _ = model.prior(model.encode(image))
        residuals, masks = model.likelihood(latents), model.level_logits(latents, (8, 16))
    assert {r.dtype for r in residuals.values()} == {torch.bfloat16}
    assert {m.dtype for m in masks.values()} == {z.dtype for z in latents.values()} \
        == {torch.float32}


@pytest.mark.slow
def test_a_tiny_ambiguous_batch_overfits():
    """One image with two annotators: samples show both maps, not their mean."""
    torch.manual_seed(0)
    model = PHiSeg(PHiSegConfig(channels=(8, 16, 16), latent_levels=2, convs=1))
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, :, :4], label[1, 2:6, 2:6] = 1, 1
    image = seeded(1, 1, 8, 8).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss, terms = model(image, label.repeat(4, 1, 1))
        loss.backward()
        optimizer.step()
    assert terms["reconstruction"] < 3  # nats, of 64 pixels
    assert terms["kl"] > 0.5  # log 2 would do; 0 is a collapse
    model.eval()
    again = model.reconstruct(image[:2], label).argmax(1)
    assert (again == label).float().mean() > 0.98
    samples = model.sample(image[:1], 100, generator()).argmax(2)[:, 0]
    near = (samples[:, None] == label).flatten(2).float().mean(2)  # (100, 2), share of pixels
    hits = (near > 0.9).float().mean(0)
    assert hits.min() > 0.2 and hits.sum() > 0.7


# ------------------------------------------------------------------------------------ pictures


def test_pictures(tmp_path, monkeypatch):
    model, (image, label) = small(), batch(1, (16, 16))
    grids = []
    monkeypatch.setattr(figures, "save_grid", lambda path, rows, columns, *rest, **options:
                        grids.append((rows, columns, *rest)))
    figures.plot_levels(model, image[0], tmp_path / "levels.png", n=2)
    rows, columns = grids[0]
    assert columns == ["image", "level 3", "level 2", "level 1"]
    assert list(rows) == ["sample 1", "residual 1", "sample 2", "residual 2"]
    coarse = rows["residual 1"][1]
    assert coarse.shape == (16, 16, 3)
    assert torch.equal(coarse[::4, ::4].repeat_interleave(4, 0).repeat_interleave(4, 1), coarse)
    flat = torch.zeros(16, 16)
    figures.plot_maps(tmp_path / "maps.png", [SimpleNamespace(
        name="case", image=image[0], labels=label, samples=label.expand(4, -1, -1), weights=None,
        drawn_by={0: "anna"}, error=flat + 2, gamma=flat + 1, ncc=0.25)])
    rows, columns, notes = grids[1]
    assert columns[2:4] == ["E[CE(y, s)]", "gamma map"]
    assert notes == {("case", 3): "NCC 0.25"}
    error, gamma = rows["case"][2:4]
    assert error.mean() > gamma.mean() + 0.1  # one scale for both
