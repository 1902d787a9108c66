import copy
import itertools
import math

import pytest
import torch
from torch import nn

import helpers
from backbones.unet import DetUNet
from baselines import DeterministicUNet, DropoutUNet, EnsembleUNet, MHeads, UNetConfig
from ssn import SSN, SSNConfig

NARROW = dict(channels=(4, 6, 8), convs=1)
SMALL = {  # three outputs where there are several
    DeterministicUNet: NARROW,
    DropoutUNet: NARROW | dict(dropout_blocks=2),
    EnsembleUNet: NARROW | dict(members=3),
    MHeads: NARROW | dict(heads=3),
}
MIXTURES = DeterministicUNet, EnsembleUNet, MHeads


def small(Model, seed=0, **fields):
    """A narrow model whose output depends on the image by much: logits of order 1."""
    torch.manual_seed(seed)
    model = Model(Model.Config(**SMALL[Model] | fields))
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.weight.data *= 1.6
    return model


def case(*size, classes=2, batch=2, seed=0):
    return helpers.batch(batch, size, classes, channels=1, seed=seed, ignored=0)


def log_prob_by_loop(logits, label):
    """sum_i log softmax(logits_i)[label_i] of one case in float64; logits (K, H, W)."""
    total = 0.0
    for i, j in itertools.product(*map(range, label.shape)):
        if label[i, j] != 255:
            scores = logits[:, i, j].double().tolist()
            total += scores[label[i, j]] - math.log(sum(math.exp(s) for s in scores))
    return total


def with_constant_outputs(model, head, probabilities):
    """The model, its output maps made constant: p(1) in `probabilities`, of two classes."""
    nn.init.zeros_(head.weight)
    pairs = [[math.log(1 - p), math.log(p)] for p in probabilities]
    head.bias.data = torch.tensor(pairs).flatten()
    return model


# ------------------------------------------------------------------------------------ defaults


def test_defaults_are_the_papers_lidc_models():
    with torch.device("meta"):
        models = DeterministicUNet(), DropoutUNet(), EnsembleUNet(), MHeads()
    counts = [helpers.count_parameters(m) for m in models]
    assert counts == [11_773_602, 11_773_602, 16 * 11_773_602, 11_773_602 + 15 * 2 * 33]
    for unet in models[0].unet, models[1].unet, models[2].members[7].unet, models[3].unet:
        assert [block[0].out_channels for block in unet.encoder] == [32, 64, 128, 256, 512]
        assert [block[0].out_channels for block in unet.decoder] == [256, 128, 64, 32]
        assert [len(block) for block in unet.encoder] == [6] * 5  # three times conv and ReLU
    assert models[1].config.p == 0.5 and models[1].config.dropout_blocks == 3
    assert models[3].config.epsilon == 0.05
    for model in models:
        rates = [model.TRAINING["lr"] * factor for _, factor in model.TRAINING["lr_drops"]]
        assert len(rates) == 5 and abs(rates[-1] - 1e-6) < 1e-15
        assert all(first < model.TRAINING["steps"] for first, _ in model.TRAINING["lr_drops"])


@pytest.mark.parametrize("Model", SMALL)
def test_weights_are_orthogonal_and_biases_small(Model):
    torch.manual_seed(0)
    for module in Model(Model.Config(**SMALL[Model])).modules():
        if isinstance(module, nn.Conv2d):
            rows = module.weight.detach().flatten(1)
            rows = rows.T if rows.shape[0] > rows.shape[1] else rows
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
            assert 0 < module.bias.abs().max() <= 2e-3


@pytest.mark.parametrize("Model", MIXTURES)
def test_batch_norm_is_ssns_unet(Model):
    """Table 1's U-Net: SSN without the heads of its covariance."""
    fields = dict(channels=(32, 64, 128, 192, 192, 192, 192), norm="batch")
    fields |= {EnsembleUNet: dict(members=2), MHeads: dict(heads=2)}.get(Model, {})
    with torch.device("meta"):
        model = Model(Model.Config(**fields)).eval()
    unet = model.members[1].unet if Model is EnsembleUNet else model.unet
    assert isinstance(unet, DetUNet) and unet.out_channels == 32
    expected = SSN(SSNConfig()).backbone.state_dict()
    assert {k: v.shape for k, v in unet.state_dict().items()} \
        == {k: v.shape for k, v in expected.items()}
    assert model.predict(torch.zeros(1, 1, 64, 64, device="meta")).shape == (1, 2, 64, 64)


DEEPMEDIC = dict(dims=3, backbone="deepmedic", **helpers.DEEPMEDIC)


def test_deterministic_deepmedic_is_ssns_table_2():
    """The network under SSN without its ReLU and heads: the last layer returns the logits."""
    with torch.device("meta"):
        net = DeterministicUNet(UNetConfig(4, 4, dims=3, backbone="deepmedic")).unet
    join = [(m.conv.in_channels, m.conv.out_channels, m.p, m.shortcut) for m in net.join]
    assert join == [(150, 250, 0, False), (250, 250, 0.5, True), (250, 4, 0.5, False)]
    torch.manual_seed(0)
    model = DeterministicUNet(UNetConfig(**DEEPMEDIC)).eval()
    image = helpers.seeded(2, 1, 7, 12, 9)
    logits = model.sample(image, 3)
    assert logits.shape == (3, 2, 2, 7, 12, 9) and torch.equal(logits[0], logits[2])
    assert (logits < 0).any()
    torch.testing.assert_close(logits[0].softmax(1), model.predict(image))
    # a patch's logits are those of the volume there: no border shows
    label = torch.full((2, 7, 12, 9), 255)
    label[:, 3, 6, 3] = 1  # the centre of every patch, whose corner is a multiple of the scale 3
    expected = -logits[0, :, :, 3, 6, 3].log_softmax(1)[:, 1].mean()
    torch.testing.assert_close(model(image, label)[0], expected, rtol=1e-3, atol=1e-4)


def test_an_ensemble_of_deepmedics_and_what_cannot_stand_on_one():
    ensemble = EnsembleUNet(EnsembleUNet.Config(members=2, **DEEPMEDIC))
    image, label = case(7, 8, 9)
    loss, terms = ensemble(image, label)
    loss.backward()
    assert torch.isfinite(loss) and ensemble.sample(image, 2).shape == (2, 2, 2, 7, 8, 9)
    for Model in (MHeads, DropoutUNet):
        with pytest.raises(ValueError, match="backbone='deepmedic': choose one of 'unet'"):
            Model(Model.Config(**DEEPMEDIC))
    with pytest.raises(ValueError, match="dims=2: choose one of 3"):
        DeterministicUNet(UNetConfig(backbone="deepmedic"))


# -------------------------------------------------------------------------------------- losses


def test_cross_entropy_by_hand():
    model = small(DeterministicUNet)
    with_constant_outputs(model, model.head, [3 / 4])
    image, label = case(4, 4)
    label[0], label[1] = 1, 0
    label[0, 0] = 255  # leaves 12 pixels
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 0] = False  # leaves 12 pixels
    expected = (12 * math.log(4 / 3) + 12 * math.log(4)) / 2
    loss, terms = model(image, label, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert terms["cross_entropy"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 0.0])
def test_m_heads_loss_by_hand(epsilon):
    model = small(MHeads, epsilon=epsilon)
    with_constant_outputs(model, model.heads, [3 / 4, 1 / 2, 1 / 4])
    image, label = case(2, 2)
    label[0], label[1] = 1, 0  # head 0 is best in the first case, head 2 in the second
    label[1, 1] = 255
    first = (1 - epsilon) * 4 * math.log(4 / 3) + epsilon / 2 * 4 * (math.log(2) + math.log(4))
    second = (1 - epsilon) * 2 * math.log(4 / 3) + epsilon / 2 * 2 * (math.log(2) + math.log(4))
    loss, terms = model(image, label)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert terms["best"].item() == pytest.approx(3 * math.log(4 / 3), rel=1e-6)
    assert terms["others"].item() == pytest.approx(3 / 2 * math.log(8), rel=1e-6)
    loss.backward()
    # d CE / d logit of class 1 is p(1) - y, over 4 pixels of the one case and 2 of the other
    best, other = 1 - epsilon, epsilon / 2
    slopes = [best * 4 * (3 / 4 - 1) + other * 2 * 3 / 4,
              other * 4 * (1 / 2 - 1) + other * 2 * 1 / 2,
              other * 4 * (1 / 4 - 1) + best * 2 * 1 / 4]
    torch.testing.assert_close(model.heads.bias.grad.view(3, 2)[:, 1], torch.tensor(slopes) / 2,
                               rtol=1e-5, atol=1e-7)


def test_ensemble_members_train_as_if_each_were_alone():
    ensemble = small(EnsembleUNet)
    alone = [DeterministicUNet(UNetConfig(**NARROW)) for _ in range(3)]
    for lone, member in zip(alone, ensemble.members):
        lone.load_state_dict(member.state_dict())
    assert len({member.head.weight.data.sum().item() for member in ensemble.members}) == 3
    together, *apart = [torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
                        for model in (ensemble, *alone)]
    for step in range(3):
        image, label = case(8, 8, seed=step)
        together.zero_grad()
        loss, terms = ensemble(image, label)
        loss.backward()
        together.step()
        losses = []
        for lone, optimizer in zip(alone, apart):
            optimizer.zero_grad()
            losses.append(lone(image, label)[0])
            losses[-1].backward()
            optimizer.step()
        assert loss.item() == pytest.approx(sum(one.item() for one in losses), rel=1e-6)
        assert terms["cross_entropy"].item() == pytest.approx(loss.item() / 3, rel=1e-6)
    for lone, member in zip(alone, ensemble.members):
        for mine, theirs in zip(lone.parameters(), member.parameters()):
            assert torch.equal(mine, theirs) and torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("changes", [dict(norm="batch"), dict(backbone="deepmedic")])
def test_an_ensemble_runs_members_that_would_not_repeat_themselves_only_once(changes):
    dims = 3 if "backbone" in changes else 2
    config = EnsembleUNet.QUICK_CONFIG | dict(members=3, in_channels=1, dims=dims) | changes
    ensemble, calls = EnsembleUNet(EnsembleUNet.Config(**config)), []
    alone = copy.deepcopy(ensemble.members[0])
    for member in ensemble.members:
        member.register_forward_hook(lambda *_: calls.append(1))
    image, label = case(*[32] * dims)
    ensemble(image, label)[0].backward()
    assert len(calls) == 3
    if changes == dict(norm="batch"):
        alone(image, label)
        for (name, mine), theirs in zip(alone.named_buffers(), ensemble.members[0].buffers()):
            assert torch.equal(mine, theirs), name


def test_dropout_loss_is_the_cross_entropy_of_one_random_mask():
    model = small(DropoutUNet)
    image, label = case(6, 7)
    torch.manual_seed(3)
    loss, terms = model(image, label)
    torch.manual_seed(3)
    logits = model.sample(image, 1)[0]
    expected = -sum(log_prob_by_loop(*pair) for pair in zip(logits, label)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() != model(image, label)[0].item()
    assert torch.equal(terms["cross_entropy"], loss)


# ------------------------------------------------------------------- samples and probabilities


@pytest.mark.parametrize("Model", MIXTURES)
def test_samples_cycle_through_the_outputs(Model):
    model = small(Model)
    image, _ = case(5, 6)
    outputs = model.outputs(image, model.count)
    if Model is EnsembleUNet:
        for output, member in zip(outputs, model.members):
            assert torch.equal(output, member.head(member.unet(image)))
    expected = [0, 1, 2, 0, 1] if model.count == 3 else [0] * 5
    for n in (1, 2, 5):
        assert torch.equal(model.sample(image, n), outputs[expected[:n]])
    assert model.count == 1 or not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("Model", MIXTURES)
def test_prediction_and_likelihood_of_a_mixture(Model):
    model = small(Model, num_classes=3)
    image, label = case(5, 6, classes=3)
    label[0, 0] = 255
    outputs = model.sample(image, model.count).double()
    torch.testing.assert_close(model.predict(image).double(), outputs.softmax(2).mean(0),
                               rtol=1e-5, atol=1e-7)
    nats = model.log_likelihood(image, label, 1)
    for b in range(2):
        likelihoods = [math.exp(log_prob_by_loop(output[b], label[b])) for output in outputs]
        expected = math.log(sum(likelihoods) / len(likelihoods))
        assert nats[b].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(nats, model.log_likelihood(image, label, 50))  # exact: n does not matter


@pytest.mark.parametrize("Model", MIXTURES)
def test_likelihoods_of_all_label_maps_sum_to_one(Model):
    model = small(Model)
    labels = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 2, 2)
    image = torch.randn(1, 1, 2, 2).expand(16, -1, -1, -1)
    total = model.log_likelihood(image, labels, 1).double().exp().sum().item()
    assert total == pytest.approx(1, rel=1e-6)


def test_dropout_likelihood_against_a_float64_loop():
    model = small(DropoutUNet)
    image, label = case(5, 6)
    torch.manual_seed(1)
    nats = model.log_likelihood(image, label, 4)
    torch.manual_seed(1)
    samples = model.sample(image, 4)
    for b in range(2):
        likelihoods = [math.exp(log_prob_by_loop(sample[b], label[b])) for sample in samples]
        assert nats[b].item() == pytest.approx(math.log(sum(likelihoods) / 4), rel=1e-6)


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("blocks, expected", [
    # (channels, side) of what enters: the coarsest encoder blocks, then the coarsest decoder blocks
    (3, [(3, 4), (4, 2), (5, 1), (6 + 5, 2), (5 + 4, 4), (4 + 3, 8)]),
    (1, [(5, 1), (6 + 5, 2)])])
def test_dropout_acts_on_the_input_of_the_innermost_blocks(monkeypatch, blocks, expected):
    model = small(DropoutUNet, channels=(2, 3, 4, 5, 6), dropout_blocks=blocks)
    seen = []
    monkeypatch.setattr("baselines.dropout",
                        lambda x, p, g: seen.append(tuple(x.shape[1:3])) or x)
    image, label = case(16, 16)
    model.loss(image, label)
    assert seen == expected


def test_without_masks_the_two_halves_are_the_unet(monkeypatch):
    model = small(DropoutUNet)
    image, _ = case(7, 9)
    monkeypatch.setattr("baselines.dropout", lambda x, p, g: x)
    logits = model.sample(image, 1)[0]
    assert torch.equal(logits.softmax(1), model.predict(image))


def test_dropout_is_on_in_samples_and_off_in_predictions():
    model = small(DropoutUNet).eval()
    image = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)  # one image twice
    assert torch.equal(*model.predict(image))
    samples = model.sample(image, 3, torch.Generator().manual_seed(0))
    flat = samples.flatten(0, 1)
    for a, b in itertools.combinations(flat, 2):  # differ between samples, and between cases
        assert not torch.allclose(a, b)
    longer = model.sample(image, 5, torch.Generator().manual_seed(0))
    assert torch.equal(samples, longer[:3])


def test_what_the_samples_share_is_computed_once():
    model = small(DropoutUNet)
    calls = [0, 0]
    for i, block in enumerate((model.unet.encoder[0], model.unet.encoder[1])):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model.sample(case(8, 8)[0], 6)
    assert calls == [1, 6]


# ------------------------------------------------------------------------- training, settings


def test_m_heads_share_out_two_readers():
    model = small(MHeads, heads=2)
    image = torch.randn(1, 1, 4, 4).expand(2, -1, -1, -1)
    label = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).long()  # they disagree everywhere
    with torch.no_grad():
        model.heads.bias.copy_(torch.tensor([0.1, 0, 0, 0.1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(image, label)[0].backward()
        optimizer.step()
    drawn = model.sample(image[:1], 2).argmax(2)[:, 0]
    assert torch.equal(drawn.sort(0).values, label)  # one head a reader, whichever it is


@pytest.mark.parametrize("Model, fields, message", [
    (DeterministicUNet, dict(dims=4), "dims=4"),
    (EnsembleUNet, dict(members=0), "members=0"),
    (MHeads, dict(heads=1), "heads=1"),
    (MHeads, dict(epsilon=1.0), "epsilon=1.0"),
    (DropoutUNet, dict(p=0.0), "p=0.0"),
    (DropoutUNet, dict(norm="batch"), "norm='batch'"),
    (DeterministicUNet, dict(norm="layer"), "norm='layer': choose one of 'none', 'batch'"),
    (DropoutUNet, dict(dropout_blocks=3, channels=(4, 6, 8)), "dropout_blocks 1 to 2"),
])
def test_refused_settings_are_named(Model, fields, message):
    with pytest.raises(ValueError, match=message):
        Model(Model.Config(**fields))
