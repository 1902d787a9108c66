"""Swin-Unet: attention against windows spelled out, layers by hand, DropPath."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from backbones.swin_unet import (DropPath, Gather, Scatter, SwinBlock, SwinUNet, dropping_paths,
                                 hidden_keys)

SWIN = dict(width=4, depths=(2, 2, 1), heads=(1, 2, 4), patch=2, window=3)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
            keys = [t for t in tokens if window(*t) == window(y0, x0)]
            for head in range(block.heads):
                part = slice(head * size, (head + 1) * size)
                scores = [q[y0, x0, part] @ k[y1, x1, part] / size**0.5
                          + block.bias[head, (y0 - y1 + w - 1) * (2 * w - 1) + x0 - x1 + w - 1]
                          for y1, x1 in keys]
                weights = torch.stack(scores).softmax(0)
                out[case, y0, x0, part] = sum(a * v[y1, x1, part]
                                              for a, (y1, x1) in zip(weights, keys))
    x = x + block.out(out)
    return x + block.mlp(block.norms[1](x))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (3, 8), (2, 4), (1, 2)], ids=str)
def test_block_is_attention_in_explicit_windows(size, shift):
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 3, shift)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    x = seeded(2, *size, 8)
    torch.testing.assert_close(block(x).double(), naive_block(block, x), rtol=1e-5, atol=1e-5)


def test_a_small_map_is_one_window():
    """4 x 4 tokens and windows of 7 x 7: attention among 16 tokens, not among 49."""
    sizes, attention = [], F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda q, *rest: sizes.append(q.shape[2]) or attention(q, *rest))
        SwinBlock(4, 2, 7, 3)(seeded(1, 4, 4, 4))
    assert sizes == [16]


def test_hidden_keys_by_hand():
    """A line of 4 tokens, windows of 3, shift 1: {1, 2, 3} | {padding 4, 5} and {0} on its own."""
    hidden = hidden_keys((3, 4), (3, 3), (0, 1), torch.device("cpu"))
    assert hidden.shape == (2, 9, 9)
    row = hidden[:, :3, :3]  # of the window's first row
    assert not row[0].any()
    assert row[1].tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert torch.equal(hidden[:, :3, 6:], row)  # rows of a window attend to each other


def test_gather_by_hand_and_its_inverse():
    x = seeded(2, 8, 12, 5)
    for side in (2, 4):
        gathered = Gather(side)(x)
        assert gathered.shape == (2, 8 // side, 12 // side, side * side * 5)
        square = x[1, side : 2 * side, 2 * side : 3 * side]
        assert torch.equal(gathered[1, 1, 2].view(5, side, side), square.movedim(-1, 0))
        assert torch.equal(Scatter(side)(gathered), x)


def test_skip_connections_leave_before_the_blocks():
    torch.manual_seed(0)
    swin, image = SwinUNet(1, **SWIN), seeded(2, 1, 24, 16)
    features = swin.encode(image)
    assert [f.shape[1:] for f in features] == [(4, 12, 8), (8, 6, 4), (16, 3, 2)]
    tokens = swin.enter[0](image.movedim(1, -1))
    assert torch.equal(features[0].movedim(1, -1), tokens)
    assert torch.equal(features[1].movedim(1, -1), swin.enter[1](swin.encoder[0](tokens)))
    coarsest = swin.encoder[2](swin.enter[2](swin.encoder[1](features[1].movedim(1, -1))))
    assert torch.equal(features[2].movedim(1, -1), coarsest)
    assert coarsest.mean(-1).abs().max() < 1e-6  # the last layer of all is a layer norm


def test_shifts_alternate_and_rates_grow():
    blocks = [m for m in SwinUNet(1, **SWIN, drop_path=0.2).encoder.modules()
              if isinstance(m, SwinBlock)]
    assert [block.shift for block in blocks] == [0, 1, 0, 1, 0]
    rates = [block.drop_path.rate for block in blocks]
    torch.testing.assert_close(rates, [0.0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6, atol=1e-8)


def test_initial_weights_are_truncated_normals():
    torch.manual_seed(0)
    swin = SwinUNet(1, width=32, depths=(2, 2), heads=(2, 2))
    for weight in (swin.decoder[0]["join"].weight, swin.encoder[0][0].bias):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15) and weight.abs().max() < 2
    assert not swin.encoder[1][1].qkv.bias.any()


@pytest.mark.parametrize("fields, message", [(dict(heads=(1, 2)), "of one length"),
                                             (dict(heads=(3, 3, 3)), "heads divide channels"),
                                             (dict(drop_path=1.0), "below 1")])
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SwinUNet(1, **SWIN | fields)


# ------------------------------------------------------------------------------------ DropPath


def test_drop_path_skips_whole_cases_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 2, 3, 1))
    kept = out.flatten(1)
    assert (kept == kept[:, :1]).all()
    assert set(kept[:, 0].tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs((kept[:, 0] > 0).float().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    x = seeded(4, 2, 3, 1)
    assert torch.equal(layer.eval()(x), x) and torch.equal(DropPath(0.0)(x), x)


def test_dropping_paths_is_eval_mode_but_for_drop_path():
    torch.manual_seed(0)
    swin, image = SwinUNet(1, **SWIN, drop_path=0.8).eval(), seeded(8, 1, 16, 16)
    still = swin.encode(image)[-1]

    def dropped(seed):
        with dropping_paths(swin, torch.Generator().manual_seed(seed)):
            return swin.encode(image)[-1]

    first = dropped(0)
    assert torch.equal(first, dropped(0)) and not torch.equal(first, dropped(1))
    assert not torch.equal(first, still) and torch.equal(swin.encode(image)[-1], still)
