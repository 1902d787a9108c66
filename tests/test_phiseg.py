"""PHiSeg: its hierarchy against torch.distributions and float64 loops, operations by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import phiseg
from analysis.paper_figures import plot_levels, plot_maps
from common import center_crop, pad_to_multiple
from phiseg import PHiSeg, PHiSegConfig, pyramid


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, train=False, **fields):
    """Four resolution, three latent levels; latents made to matter more than at the start."""
    torch.manual_seed(seed)
    fields = dict(in_channels=2, num_classes=3, channels=(4, 5, 6, 7), latent_levels=3,
                  convs=1) | fields
    model = PHiSeg(PHiSegConfig(**fields))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_var.fill_(0.3)
                module.weight += 0.5 * torch.randn_like(module.weight)
    return model.train(train)


def batch(count=2, size=(8, 16), classes=3, channels=2, seed=0):
    """Images, and labels with some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.1] = 255
    return seeded(count, channels, *size, seed=seed), label


def distribution(normal):
    """A DiagonalNormal of ours as torch's, in float64."""
    return Normal(normal.mean.detach().double(), normal.std.detach().double())


# ------------------------------------------------------------------------- the paper's model


def test_default_is_phiseg_7_5():
    with torch.device("meta"):
        model = PHiSeg()
    for net, inputs in ((model.prior, 1), (model.posterior, 3)):
        assert [len([m for m in block if hasattr(m, "kernel_size")]) for block in net.encoder] \
            == [3] * 7
        assert [block[0].out_channels for block in net.encoder] == [32, 64, 128] + [192] * 4
        assert net.encoder[0][0].in_channels == inputs
        assert [block[-1].out_channels for block in net.join] == [4] * 4
        assert net.top.out_channels == 4  # mean and log std of two channels
        assert [up[0].in_channels for up in net.up] == [2] * 4
        assert [up[0].out_channels for up in net.up] == [64] * 4
    assert [len(level) for level in model.likelihood.finer] == [2] * 5
    assert [block[0].out_channels for block in model.likelihood.join] == [128, 192, 192, 192]
    for name, module in model.named_modules():  # batch norm on all but the outputs
        if hasattr(module, "kernel_size") and module.bias is not None:
            assert module.out_channels in (2, 4) and module.kernel_size == (1, 1), name


def test_counts_are_those_stated():
    with torch.device("meta"):
        model = PHiSeg()

    def millions(*modules):
        return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)

    stated = f"{millions(model)} M parameters, {millions(model.prior, model.likelihood)} M"
    assert stated in PHiSeg.__doc__


def test_latents_stand_where_code_and_text_put_them():
    image = torch.zeros(1, 2, 16, 32)
    for levels, finest in ((3, (8, 16)), (4, (16, 32)), (1, (2, 4))):
        noise = small(latent_levels=levels).noise(image, 5)
        assert len(noise) == levels
        for level, e in enumerate(noise):
            assert e.shape == (5, 1, 2, finest[0] >> level, finest[1] >> level)
    wide = small(latent_channels=3)
    assert wide.noise(image, 5)[0].shape[2] == 3 and wide.predict(image).shape == (1, 3, 16, 32)


# ------------------------------------------------------------------------------- the bound


def test_kl_of_every_level_is_torch_s_at_the_latents_drawn():
    model, (image, label) = small(train=True), batch()
    torch.manual_seed(3)
    loss, terms = model(image, label)
    torch.manual_seed(3)
    noise = [torch.randn(2, 1, 2, 4 >> l, 8 >> l)[:, 0] for l in range(3)]
    seen_q, seen_p, z, kls = model.encode(image, label), model.encode(image), None, {}
    for level in (2, 1, 0):
        q = distribution(model.posterior(level, seen_q[level], z, 1))
        p = distribution(model.prior(level, seen_p[level], z, 1))
        z = (q.mean + q.stddev * noise[level]).float()
        kls[level + 1] = kl_divergence(q, p).flatten(1).sum(1).mean()
        torch.testing.assert_close(terms[f"kl_{level + 1}"].double(), kls[level + 1],
                                   rtol=1e-5, atol=1e-5)
    assert min(kls.values()) > 0.01
    torch.testing.assert_close(terms["kl"].double(), sum(kls.values()), rtol=1e-5, atol=0)


def test_hierarchical_kl_is_the_monte_carlo_estimate():
    """E_q[sum_l KL_l] of Eq. 9 = E_q[log q(z | s, x) - log p(z | x)], by 4000 draws of each."""
    model, (image, label) = small(), batch(1)
    with torch.no_grad():
        seen = model.encode(image, label), model.encode(image)
        torch.manual_seed(0)
        latents, normals = model.descend((model.posterior, model.prior), seen,
                                         model.noise(image, 4000))
    exact = sum(q.kl(p) for q, p in normals).double()
    ratio = sum(distribution(q).log_prob(z.double()).flatten(1).sum(1)
                - distribution(p).log_prob(z.double()).flatten(1).sum(1)
                for z, (q, p) in zip(latents, normals))
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
    model, (image, label) = small(kl_base=kl_base), batch()
    mask = seeded(*label.shape, seed=5) > -1
    torch.manual_seed(3)
    loss, terms = model(image, label, mask)
    label = torch.where(mask, label, 255)
    torch.manual_seed(3)
    latents, _ = model.descend((model.posterior,), (model.encode(image, label),),
                               model.noise(image, 1))
    residuals = model.likelihood(latents)
    total, losses = 0, []
    for level in (2, 1, 0):  # repeat_interleave is nearest-neighbour upsampling
        r = residuals[level].detach().double()
        total = total + r.repeat_interleave(2**level, 2).repeat_interleave(2**level, 3)
        losses.append(cross_entropy_loop(total, label) / 2)
    torch.testing.assert_close(terms["reconstruction"].item(), losses[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["supervision"].item(), sum(losses[:-1]), rtol=1e-6, atol=0)
    expected = sum(losses) + sum(kl_base**l * terms[f"kl_{l + 1}"].item() for l in range(3))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)


def test_importance_bound(monkeypatch):
    model, (image, label) = small(), batch()
    mask = seeded(*label.shape, seed=5) > -1
    whole = PHiSeg._chunk
    monkeypatch.setattr(PHiSeg, "_chunk", lambda *_: 2)
    rows = []
    model.likelihood.register_forward_pre_hook(lambda _, seen: rows.append(len(seen[0][0])))
    torch.manual_seed(4)
    bound = model.log_likelihood(image, label, 5, mask)
    assert rows == [4, 4, 2]
    label = torch.where(mask, label, 255)
    torch.manual_seed(4)
    noise = model.noise(image, 5)
    log_weights = torch.zeros(5, 2, dtype=torch.float64)
    for i in range(5):
        latents, normals = model.descend((model.posterior, model.prior),
                                         (model.encode(image, label), model.encode(image)),
                                         [e[i : i + 1] for e in noise])
        logits = model._decode(latents, label.shape[1:]).detach()
        for case in range(2):
            log_weights[i, case] = -cross_entropy_loop(logits[case, None], label[case, None])
            for z, (q, p) in zip(latents, normals):
                z = z.detach()[case].double()
                log_weights[i, case] += (
                    Normal(p.mean[case].double(), p.std[case].double()).log_prob(z).sum()
                    - Normal(q.mean[case].double(), q.std[case].double()).log_prob(z).sum())
    expected = log_weights.logsumexp(0) - math.log(5)
    torch.testing.assert_close(bound.double(), expected, rtol=1e-5, atol=0)
    monkeypatch.setattr(PHiSeg, "_chunk", whole)
    torch.manual_seed(4)
    again = model.log_likelihood(image, torch.where(mask, label, 255), 5)
    torch.testing.assert_close(again, bound, rtol=1e-5, atol=0)


def test_bound_rises_with_n():
    model, (image, label) = small(), batch(1)
    torch.manual_seed(0)
    image, label = image.expand(200, -1, -1, -1), label.expand(200, -1, -1)  # 200 repeats
    bounds = [model.log_likelihood(image, label, n) for n in (1, 4, 16)]
    high = model.log_likelihood(image[:1], label[:1], 2048).item()
    means = [b.mean().item() for b in bounds] + [high]
    error = max(b.std().item() for b in bounds) / 200**0.5
    assert means[1] - means[0] > 5 * error and means == sorted(means)


# ----------------------------------------------------------------------------------- sampling


def test_each_level_s_prior_sees_the_draw_below_it():
    """A port that draws all levels from one pass of the prior fails here."""
    model, (image, _) = small(), batch(1)
    seen = model.encode(image)
    noise = model.noise(image, 2, torch.Generator().manual_seed(0))
    for level in (1, 2):  # the draws differ at this level and below, and nowhere above it
        parted = [e.clone() for e in noise]
        for finer in parted:
            finer[1] = finer[0]
        parted[level][1] = noise[level][1]
        latents, normals = model.descend((model.prior,), (seen,), parted)
        for l, (normal,) in enumerate(normals):
            same = torch.allclose(normal.mean[0], normal.mean[1], atol=1e-6)
            assert same == (l >= level)
            assert torch.allclose(normal.std[0], normal.std[1], atol=1e-6) == (l >= level)
    # what was drawn is what the next level saw, and what the samples are made of
    given = model.prior(0, seen[0], latents[1], 2)
    torch.testing.assert_close(given.mean, normals[0][0].mean)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_samples_whatever_is_computed_at_once(chunk, monkeypatch):
    monkeypatch.setattr(PHiSeg, "_chunk", lambda *_: chunk)
    model, (image, _) = small(), batch(size=(9, 13))
    rows = []
    hook = model.likelihood.register_forward_pre_hook(lambda _, seen: rows.append(len(seen[0][0])))
    samples = model.sample(image, 3, torch.Generator().manual_seed(0))
    assert rows == {1: [2, 2, 2], 2: [4, 2], 100: [6]}[chunk]
    hook.remove()
    noise = model.noise(image, 3, torch.Generator().manual_seed(0))
    for i in range(3):
        z, residuals, seen = None, [], model.encode(image)
        latents = [None] * 3
        for level in (2, 1, 0):
            normal = model.prior(level, seen[level], z, 1)
            z = latents[level] = normal.mean + normal.std * noise[level][i]
        residuals = model.likelihood(latents)
        total = sum(F.interpolate(r, scale_factor=2**l) for l, r in enumerate(residuals))
        torch.testing.assert_close(samples[i], center_crop(total, (9, 13)), rtol=1e-4, atol=1e-4)
    assert samples.std(0).max() > 0.1 and not samples.requires_grad


def test_memory_of_sampling_is_bounded():
    model = small()
    assert model._chunk(torch.zeros(1, 2, 8, 8)) > 1000
    assert model._chunk(torch.zeros(64, 2, 512, 512)) == 1


def test_same_seed_same_samples():
    model, (image, _) = small(), batch()
    draw = lambda seed: model.sample(image, 2, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_levels_stop_at_coarser_masks():
    model, (image, _) = small(), batch()
    draw = lambda **o: model.sample(image, 2, torch.Generator().manual_seed(0), **o)
    assert torch.equal(draw(levels=3), draw())
    for levels, block in ((1, 4), (2, 2)):
        coarse = draw(levels=levels)
        assert torch.equal(coarse[..., ::block, ::block].repeat_interleave(block, 3)
                           .repeat_interleave(block, 4), coarse)
        assert not torch.allclose(coarse, draw())
    with pytest.raises(ValueError, match="levels=4: 1 .the coarsest. to 3"):
        draw(levels=4)


def test_predict_and_reconstruct_stand_at_the_means():
    model, (image, label) = small(), batch()
    for net, seen, result in (
            (model.prior, model.encode(image), model.predict(image)),
            (model.posterior, model.encode(image, label), model.reconstruct(image, label))):
        z, latents = None, [None] * 3
        for level in (2, 1, 0):
            z = latents[level] = net(level, seen[level], z, 1).mean
        expected = pyramid(model.likelihood(latents))[0]
        expected = expected.softmax(1) if net is model.prior else expected
        torch.testing.assert_close(result, expected)
        assert not result.requires_grad


def test_operations_are_the_encoder_once_and_n_times_the_rest():
    model, (image, _) = small(), batch(1)

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    pixels = 8 * 16
    encoder = 9 * (2 * 4 * pixels + 4 * 5 * pixels // 4 + 5 * 6 * pixels // 16
                   + 6 * 7 * pixels // 64)
    # features of levels 1 and 2 to channels[0] and [1], those of level 3 to two moments of z_3
    once = encoder + 9 * (5 * 4 * pixels // 4 + 6 * 5 * pixels // 16) + 7 * 4 * pixels // 64
    path = 0
    for width, area in ((4, pixels // 4), (5, pixels // 16)):  # up: 2 -> 8 -> 8; 8 -> width; ...
        path += area * (9 * (2 * 8 + 8 * 8 + 8 * width + width * width) + width * 4)
    likelihood = 0
    for width, area in ((4, pixels), (5, pixels // 4), (6, pixels // 16)):  # sizes after doubling
        likelihood += 9 * ((2 * width + width * width) * area // 4 + width * width * area)
    likelihood += pixels * (9 * (6 * 4 + 8 * 5 + 5 * 5) + 5 * 3)  # level 1: up, join, out
    likelihood += pixels // 4 * (9 * (6 * 5 + 10 * 6 + 6 * 6) + 6 * 3)
    likelihood += pixels // 16 * 6 * 3
    assert flops(lambda: model.encode(image)) == 2 * once
    for n in (1, 3):
        assert flops(lambda: model.sample(image, n)) == 2 * (once + n * (path + likelihood))


def test_operations_stated_are_counted():
    with torch.device("meta"):
        model, image = PHiSeg().eval(), torch.zeros(1, 1, 128, 128)

        def giga(function):
            with FlopCounterMode(display=False) as counter:
                function()
            return counter.get_total_flops() / 2e9

        seen = model.encode(image)
        noise = [torch.zeros(1, 1, 2, 32 >> l, 32 >> l) for l in range(5)]
        once = giga(lambda: model.encode(image))
        path = giga(lambda: model.descend((model.prior,), (seen,), noise))
        latents, _ = model.descend((model.prior,), (seen,), noise)
        rest = giga(lambda: model.likelihood(latents))
    doc = " ".join(PHiSeg.__doc__.split())
    assert f"{once:.2f} once" in doc
    assert f"({path:.2f} for the latent path + {rest:.2f} for the likelihood)" in doc


# --------------------------------------------------------------- ignored pixels, sizes, axes


def test_masked_pixels_have_no_influence():
    model, (image, label) = small(), batch()
    mask = seeded(*label.shape, seed=5) > 0

    def results(label, mask):
        torch.manual_seed(0)
        return torch.stack([model(image, label, mask)[0],
                            model.log_likelihood(image, label, 3, mask).sum()])

    expected = results(label, mask)
    assert torch.equal(results(torch.where(mask, label, (label + 1) % 3), mask), expected)
    assert torch.equal(results(torch.where(mask, label, 255), None), expected)
    assert not torch.isclose(results(label, None), expected).any()


def test_any_size_and_whoever_pads():
    model, (image, label) = small(), batch(size=(9, 14))
    padded = pad_to_multiple(image, 8)  # 16 x 16
    padded_label = torch.full((2, 16, 16), 255)
    center_crop(padded_label, (9, 14)).copy_(label)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    draw = lambda image: model.sample(image, 2, torch.Generator().manual_seed(0))
    same(draw(image), center_crop(draw(padded), (9, 14)))
    same(model.predict(image), center_crop(model.predict(padded), (9, 14)))
    same(model.reconstruct(image, label),
         center_crop(model.reconstruct(padded, padded_label), (9, 14)))
    torch.manual_seed(0)
    loss = model(image, label)[0]
    torch.manual_seed(0)
    same(loss, model(padded, padded_label)[0])


@pytest.mark.parametrize("size", [(13,), (5, 6, 7)])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_one_and_three_axes_and_every_layout(size, levels):
    model, (image, label) = small(dims=len(size), latent_levels=levels), batch(size=size)
    loss, terms = model(image, label)
    assert loss.isfinite() and ("kl_2" in terms) == (levels > 1)
    assert model.sample(image, 2).shape == (2, 2, 3, *size)
    assert model.predict(image).shape == model.reconstruct(image, label).shape == (2, 3, *size)
    assert model.log_likelihood(image, label, 2).shape == (2,)


@pytest.mark.parametrize("fields, message", [
    (dict(latent_levels=5), "latent_levels=5: 1 to 4"), (dict(latent_levels=0), "1 to 4"),
    (dict(dims=4), "dims=4: choose one of 1, 2, 3")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


# ----------------------------------------------------------------------------------- training


@pytest.mark.parametrize("levels", [1, 3])
def test_gradient_reaches_every_parameter(levels):
    model, (image, label) = small(train=True, latent_levels=levels), batch(4)
    model(image, label)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_keeps_less_and_changes_nothing():
    results, kept = [], []
    for checkpoint in (False, True):
        model, (image, label) = small(train=True, checkpoint=checkpoint), batch(4, (32, 32))
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(image, label)[0]
        kept.append(saved)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()),
                        *(b for n, b in model.named_buffers() if "running" in n)])
        momenta = {m.momentum for m in model.modules() if hasattr(m, "momentum")}
        assert momenta == {0.1}
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


def test_checkpointing_twice_backwards_and_compiled():
    results = []
    for checkpoint, compiled in ((False, False), (True, False), (True, True)):
        model, (image, label) = small(train=True, checkpoint=checkpoint, latent_levels=1), batch(4)
        loss_of = torch.compile(model, backend="aot_eager") if compiled else model
        torch.manual_seed(0)
        loss = loss_of(image, label)[0]
        if not compiled:
            loss.backward(retain_graph=True)
            model.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()),
                        *(b for n, b in model.named_buffers() if "running" in n)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_tiny_ambiguous_batch_overfits():
    """One image with two readers: samples show both maps, not their mean."""
    torch.manual_seed(0)
    model = PHiSeg(PHiSegConfig(channels=(8, 16, 16), latent_levels=2, convs=1))
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, :, :4], label[1, 2:6, 2:6] = 1, 1
    image = seeded(1, 1, 8, 8).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss, terms = model(image, label.repeat(4, 1, 1))
        loss.backward()
        optimizer.step()
    assert terms["reconstruction"] < 3  # nats, of 64 pixels
    assert terms["kl"] > 0.5  # log 2 would do; 0 is a collapse
    model.eval()
    again = model.reconstruct(image[:2], label).argmax(1)
    assert (again == label).float().mean() > 0.98
    samples = model.sample(image[:1], 100, torch.Generator().manual_seed(0)).argmax(2)[:, 0]
    near = (samples[:, None] == label).flatten(2).float().mean(2)  # (100, 2), share of pixels
    hits = (near > 0.9).float().mean(0)
    assert hits.min() > 0.2 and hits.sum() > 0.7


def test_kl_is_float32_under_autocast(monkeypatch):
    model, (image, label) = small(train=True), batch()
    descend, seen = model.descend, []
    monkeypatch.setattr(model, "descend", lambda *a: seen.append(descend(*a)) or seen[-1])
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = model(image, label)
        samples = model.sample(image, 2)
        assert pyramid(model.likelihood(seen[0][0]))[0].dtype == torch.float32
    exact = sum(kl_divergence(distribution(q), distribution(p)).sum() / 2 for q, p in seen[0][1])
    torch.testing.assert_close(terms["kl"].double(), exact, rtol=1e-5, atol=0)
    assert loss.dtype == terms["kl"].dtype == terms["reconstruction"].dtype == torch.float32
    assert loss.isfinite() and samples.isfinite().all()


# ------------------------------------------------------------------------------------ pictures


def test_pictures(tmp_path, monkeypatch):
    model, (image, label) = small(), batch(1, (16, 16))
    grids = []
    monkeypatch.setattr(phiseg, "save_grid", lambda path, rows, columns, *rest, **options:
                        grids.append((rows, columns, *rest)))
    plot_levels(model, image[0], tmp_path / "levels.png", n=2)
    rows, columns = grids[0]
    assert columns == ["image", "level 3", "level 2", "level 1"]
    assert list(rows) == ["sample 1", "residual 1", "sample 2", "residual 2"]
    coarse = rows["residual 1"][1]
    assert coarse.shape == (16, 16, 3)
    assert torch.equal(coarse[::4, ::4].repeat_interleave(4, 0).repeat_interleave(4, 1), coarse)
    flat = torch.zeros(16, 16)
    plot_maps(tmp_path / "maps.png", [dict(
        name="case", image=image[0], labels=label, samples=label.expand(4, -1, -1),
        error=flat + 2, gamma=flat + 1, ncc=0.25)])
    rows, columns, notes = grids[1]
    assert columns[1:4] == ["reader 1", "E[CE(y, s)]", "gamma map"]
    assert notes == {("case", 3): "NCC 0.25"}
    error, gamma = rows["case"][2:4]
    assert error.mean() > gamma.mean() + 0.1  # one scale for both
