import pytest
import torch

import train
from helpers import undraw

# The tests' tensors are tiny: a second thread only waits for the first, and two runs beside each
# other slow one another down tenfold.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out by -m 'not slow'")


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that look at no picture."""
    undraw(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on small `shapes`; a test that changes it copies it first."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", "shapes", "--data-args", "n=20", "size=32", "--model-args",
                 "channels=(4,6)", "convs=1", "mc_samples=4", "--batch-size", "4",
                 "--device", "cpu", "--steps", "1", "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        assert train.main([*map(str, arguments)]) == 0
    return folder
