"""Settings of the whole run: hypothesis made reproducible, CUDA tests only where there is CUDA."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

import cli

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")
torch.set_num_threads(1)  # a second thread makes tiny tensors several times slower


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def outcome(capsys):
    """Run a script, as a module, in this process: its exit code, stdout and stderr."""

    def run(script, *argv):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: script.main([str(x) for x in argv]), f"{script.__name__}.py")
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return run
