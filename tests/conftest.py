"""Settings of the whole run: hypothesis made reproducible, CUDA tests only where there is CUDA."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")
torch.set_num_threads(1)  # a second thread makes tiny tensors several times slower


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
