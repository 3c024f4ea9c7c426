"""Settings that the frameworks read when they are first imported, and what the tests do without a compiler."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

for name in [name for name in os.environ if name.startswith("POLYFUSE_")]:
    del os.environ[name]

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
# torch, JAX and the other test processes share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip a test for which PyTorch finds no C++ compiler, where there is none."""
    try:
        return (yield)
    except Exception as error:
        if "InvalidCxxCompiler" in str(error) and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++"))):
            pytest.skip("torch.compile on a CPU needs a C++ compiler, such as g++")
        raise
