"""What holds for every test: one thread (so that sums are added in one order), and a global RNG that no test shares with the next."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_random_state():
    """Modules built in a test take their first weights from the same generator state whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(torch.Generator().get_state())
        yield
