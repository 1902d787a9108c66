"""The benchmark: what it measures is what it says."""
import json

import pytest
import torch
from torch import nn

import bench


def test_ratio_is_paired():
    """A machine that slows down by ten between rounds leaves the ratio of each round alone."""
    assert bench.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == (0.5, 0.0)
    median, spread = bench.ratio([1, 2, 3, 4, 100], [1] * 5)
    assert median == 3 and spread == 1.0  # quartiles 2 and 4


def test_functions_run_in_turn():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.in_turn(functions, 3)
    assert order == list("ab" * 5)  # two rounds warm up
    assert all(len(t) == 3 and min(t) >= 0 for t in times.values())


@pytest.mark.parametrize("backward", [False, True])
def test_convolutions_alone_are_all_of_a_network_s(backward):
    """Norm, activation and loss cost nothing by torch's counter: both counts are the same."""
    torch.manual_seed(0)
    last = nn.Conv2d(5, 3, 1, bias=False)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def model(x):  # a part of a layer's weights, without its module, is a convolution as well
        return nn.functional.conv2d(layers(x), last.weight[:, :4])

    x = torch.randn(2, 2, 8, 8)

    def run():
        with torch.set_grad_enabled(backward):
            out = model(x).square().sum()
            return out.backward() if backward else out

    alone = bench.convolutions_alone(lambda: model(x), backward)
    assert bench.operations(alone) == bench.operations(run)
    products = 2 * 64 * (2 * 9 * 4 + 4 * 3)  # of the forward pass, in multiply-adds
    if not backward:
        assert bench.operations(alone) == 2 * products
    else:  # and twice that backwards, but for the gradient of the image
        assert bench.operations(alone) == 2 * (3 * products - 2 * 64 * 2 * 9 * 4)


def test_command_line(tmp_path, capsys):
    tiny = ["--device", "cpu", "--batch-size", "2", "--image-size", "16", "--rounds", "1",
            "--samples", "3"]
    file = tmp_path / "b.json"
    assert bench.main(["--models", "unet", *tiny, "--json", str(file)]) == 0
    row, = json.loads(file.read_text())["models"]
    assert row["model"] == "unet" and row["parameters"] == 11_773_602
    assert row["step ms"] > 0 and len(row["/ convs"]) == 2
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1


def test_bf16_is_measured_in_bf16(capsys):
    """Convolutions alone, too: their inputs are of mixed precision."""
    options = bench.parse(["--precision", "bf16", "--batch-size", "1", "--image-size", "32"])
    options.device = torch.device("cpu")
    model = bench.Bench("unet", options)
    for call, backward in ((("loss", model.image, model.label), True),
                           (("predict", model.image), False)):
        bench.convolutions_alone(lambda: model.call(*call), backward, model.autocast)()


@pytest.mark.parametrize("arguments, message", [
    (["--models", "nope"], "choose from ssn, prob_unet"), (["--rounds", "0"], "1 or more"),
    (["--device", "tpu"], "choose auto, cpu, cuda")])
def test_mistakes_are_one_line(capsys, arguments, message):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
