import torch

# The tests' tensors are tiny: a second thread only waits for the first, and two runs beside each
# other slow one another down tenfold.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out by -m 'not slow'")
