"""Which tiles a kernel runs a call with: as measured on the device, else by a rule that was measured on an H200.

No choice here changes a bit of a result, so that calls of different sizes may run with different ones: `polyfuse tune`
takes none that does.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.configs import tuned_ranges, tuning_is_frozen
from polyfuse.spec import SpecError
from polyfuse.triton_impl._launch import Launcher

Values = tuple[int, ...]
Ranges = Sequence[tuple[int, Values]]


class Tiles:
    """Values of `names` for calls up to a size, in `ranges` of ascending sizes; `choices` are what to try of each.

    What the size is says the op's module. The ranges are the rule for a device on which nothing was measured.
    """

    def __init__(
        self, launcher: Launcher, names: tuple[str, ...], ranges: Ranges, choices: tuple[tuple[int, ...], ...]
    ) -> None:
        self.op, self.kernel = launcher.op, launcher.kernel
        self.names, self.ranges, self.choices = names, ranges, choices
        self.forced: Callable[[int], Values] | None = None
        self.tables: dict[torch.device, Ranges] = {}

    def choose(self, size: int, device: torch.device) -> Values:
        """The values for a call of a size. Raises `SpecError` if only measured ones may be used and there are none."""
        if self.forced is not None:
            return self.forced(size)
        table = self.tables.get(device)
        if table is None:
            table = self.tables[device] = self._measured(device) or self.ranges
        return next(values for limit, values in table if size <= limit)

    @contextmanager
    def using(self, choose: Callable[[int], Values]) -> Iterator[None]:
        """Take what `choose` gives for a size, in all threads."""
        outer, self.forced = self.forced, choose
        try:
            yield
        finally:
            self.forced = outer

    def source(self) -> str:
        """What the kernel is made of, in 16 digits: its code, that of the functions it calls, and their constants."""
        text = sha256()
        for part in sorted(_parts(self.kernel, {})):
            text.update(part.encode())
        return text.hexdigest()[:16]

    def _measured(self, device: torch.device) -> Ranges | None:
        if device.type == "cpu":
            return None  # interpreted
        found = tuned_ranges(device_name(device), self.op, self.source(), triton.__version__, architecture(device))
        if found is None and tuning_is_frozen():
            raise SpecError(
                f"{self.op}: POLYFUSE_TUNING=frozen: expected tiles measured on {device_name(device)} with Triton "
                f"{triton.__version__} for kernel {self.source()}, got none; try polyfuse tune --op {self.op}"
            )
        if found is None:
            return None
        return [(limit or 2**63, tuple(values[name] for name in self.names)) for limit, values in found]


def device_name(device: torch.device) -> str:
    """The device by its own name, which its file is called after."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def architecture(device: torch.device) -> str:
    """What kernels are compiled for."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def _parts(kernel: Any, seen: dict[str, str]) -> set[str]:
    """The source of a kernel and of what it mentions."""
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name not in seen:
        seen[name] = inspect.getsource(function)
        for mentioned in function.__code__.co_names:
            value = function.__globals__.get(mentioned)
            if isinstance(value, tl.constexpr):
                seen[f"{name}: {mentioned}"] = repr(value.value)
            elif hasattr(value, "fn"):
                _parts(value, seen)
    return {f"{name}\n{text}" for name, text in seen.items()}
