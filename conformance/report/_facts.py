"""Facts about a run's surroundings: versions, device, chip, commit, and what each backend says of itself."""

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from polyfuse.conformance.report._result import STRICT
from polyfuse.dispatch import Backend, Support, support

PACKAGES = (
    *("polyfuse", "numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "transformers"),
    *("flash-linear-attention", "flash-qla", "causal-conv1d"),
)


@dataclass(frozen=True)
class BackendFacts:
    """A backend under test: its kind of arrays, where it comes from, what it claims of each op, and its waivers."""

    __pydantic_config__: ClassVar = STRICT

    family: str
    origin: str = ""
    distribution: str = ""
    version: str = ""
    claims: Mapping[str, Support] = field(default_factory=dict)
    waivers: Mapping[str, str] = field(default_factory=dict)


def backend_facts(backend: Backend, ops: Iterable[str]) -> BackendFacts:
    """What a report says of a backend on the ops of the run."""
    top = backend.module.partition(".")[0]
    distribution = _distributions().get(top, ("",))[0]
    found = version(distribution) if distribution else ""
    claims = {op: support(op, backend.name) for op in ops}
    return BackendFacts(backend.family, backend.origin, distribution, found, claims, dict(backend.waivers))


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def versions() -> dict[str, str]:
    """Versions of everything that decides a result."""
    found = {"python": platform.python_version(), "system": f"{sys.platform} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The device's own name, for reports: the device as the command line has it comes first."""
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    if not _torch_knows(device):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def chip(device: str) -> dict[str, str]:
    """The chip of a device: its name, driver, CUDA or ROCm version and architecture, as far as they are known."""
    if not _torch_knows(device):
        name = _processor() if device == "cpu" else device
        return {"name": name, "arch": platform.machine()} if device == "cpu" else {"name": name}
    import torch

    facts = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    runtime = {"rocm": torch.version.hip} if torch.version.hip else {"cuda": torch.version.cuda}
    arch = getattr(facts, "gcnArchName", "") if torch.version.hip else f"sm_{major}{minor}"
    found = {"name": facts.name, "driver": _driver(), **runtime, "arch": arch}
    return {key: str(value) for key, value in found.items() if value}


def _torch_knows(device: str) -> bool:
    """Whether torch is there to say what the device is; JAX may run on it alone."""
    return device.startswith("cuda") and find_spec("torch") is not None


def _processor() -> str:
    """The processor's model, which Python itself does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _driver() -> str:
    """The version of the GPU's kernel driver, or nothing."""
    for module in ("nvidia", "amdgpu"):
        path = Path(f"/sys/module/{module}/version")
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return ""


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` behind it if files differ; None outside one."""
    folder = Path(__file__).resolve().parent
    revision = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not revision or _git(folder, "ls-files", Path(__file__).name) is None:
        return None
    return f"{revision}+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else revision


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it says nothing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
