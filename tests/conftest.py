"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import properties
import pytest
import skips

# Two test processes on two cores: more threads would only compete for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
if "TRITON_INTERPRET" not in os.environ and not any(
    Path(name).exists() for name in ("/proc/driver/nvidia", "/dev/nvidiactl")
):
    os.environ["TRITON_INTERPRET"] = "1"

# With this variable torch.cuda.is_available() queries the driver's library and does not initialise CUDA. A process that
# has initialised CUDA cannot fork one that uses it, and tests/distributed.py forks every worker from one server.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# A shell's background job ignores Ctrl-C, and every process that a test starts and interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # after the settings above: torch and triton read them when they are imported

REPO = Path(__file__).resolve().parent.parent

properties.load_profile()


def pytest_addoption(parser: pytest.Parser) -> None:
    skips.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    if skips.is_active(config):
        # Registered as a plugin, because the hooks of this file do not see the doctests outside of tests/.
        config.pluginmanager.register(skips.NoSkips(), "no-skips")


@pytest.fixture(scope="module", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of a test's runs; each test that uses it runs on the CPU, and again on CUDA if a device is visible."""
    return str(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real text and vocabularies, next to a developer's checkout; tests that need it are skipped without it."""
    for parent in REPO.parents:
        folder = parent / "shared" / "data"
        if folder.is_dir():
            return folder
    pytest.skip("no ../shared/data beside the checkout: this test needs real text and vocabularies")
