"""How every kernel of this backend is launched.

Triton looks at each argument of a call to find what it has compiled for it, so that a launch takes 9 to 11 us of host
time. A `Launcher` remembers the compiled kernel for each kind of call, and starts it as Triton would, but without
what Triton prepares for hooks where there are none, and with addresses in place of tensors where a plan has them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch.accelerator import current_device_index

from polyfuse.spec import Unsupported
from polyfuse.triton_impl._common import INTERPRETED, interpreting

# Elsewhere Triton specialises a kernel on more of a tensor, such as the size of its storage.
ONLY_DTYPE_AND_ALIGNMENT = torch.version.cuda is not None
MOST_KINDS = 1024  # that a launcher remembers
# Whose compiled kernels were seen to take (x, y, z, stream, function, metadata, launch metadata, hooks, arguments).
STARTED_DIRECTLY = triton.__version__.startswith("3.6.") and torch.version.cuda is not None
_HOOKS: Any = triton.knobs.runtime

Grid = tuple[int, int, int]
Inputs = Sequence[torch.Tensor | None]
Numbers = tuple[int | float | None, ...]


class Launch:
    """Launches a kernel for the calls of one kind on one device; Triton is asked for the first of them only.

    `start` is what starts the compiled kernel, which takes addresses as well as tensors, once that is known.
    """

    __slots__ = ("compiled", "device", "index", "kernel", "op", "options", "start")

    def __init__(self, op: str, kernel: Any, device: torch.device, options: dict[str, int]) -> None:
        self.op, self.kernel, self.device, self.options = op, kernel, device, options
        self.index = device.index
        self.compiled: Any = None
        self.start: Callable[..., None] | None = None

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """kernel[grid](*arguments), which are in the order of the kernel's parameters."""
        if self.compiled is not None and self.index == current_device_index():
            if self.start is not None and not _hooked():
                self.start(grid, arguments)
            else:
                self.compiled[grid](*arguments)
            return
        with _on_device(self.op, self.device):
            if self.compiled is not None:
                self.compiled[grid](*arguments)
                return
            compiled = self.kernel[grid](*arguments, **self.options)
            if ONLY_DTYPE_AND_ALIGNMENT:
                self.compiled = compiled  # the interpreter gives None
                if STARTED_DIRECTLY:
                    self.start = _start(compiled, self.index)


def _start(compiled: Any, device: int) -> Callable[..., None]:
    """What starts a compiled kernel on the current stream of its device, which is the current one, without hooks."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream = triton.runtime.driver.active.get_current_stream

    def start(grid: Grid, arguments: Sequence[Any]) -> None:
        run(*grid, stream(device), function, metadata, None, None, None, *arguments)

    return start


def _hooked() -> bool:
    """Whether somebody, such as a profiler, wants to hear of launches."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launcher:
    """Launches `kernel`, whose parameters come in this order: inputs, outputs, numbers, fixed.

    - inputs are tensors, or None for one that is absent; the first one is there, and says on which device.
    - outputs are new tensors, which begin at a multiple of 16 bytes, and whose dtypes follow from the other arguments.
    - numbers are floats, and the integers that the kernel names in `do_not_specialize`, of any value.
    - fixed are the `tl.constexpr` and all other integers: each value of theirs is another kind of call.

    `options` go to every launch, such as num_stages. Products and sums are fused unless they say otherwise, whatever
    the default of an installed Triton is.
    """

    def __init__(self, op: str, kernel: Any, **options: int) -> None:
        self.op, self.kernel, self.options = op, kernel, {"enable_fp_fusion": True, **options}
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __call__(
        self,
        grid: Grid,
        inputs: Inputs,
        outputs: tuple[torch.Tensor, ...],
        numbers: Numbers,
        fixed: tuple[Any, ...],
        warps: int,
    ) -> None:
        """kernel[grid](*inputs, *outputs, *numbers, *fixed)."""
        self.find(inputs, numbers, fixed, warps)(grid, *inputs, *outputs, *numbers, *fixed)

    def find(self, inputs: Inputs, numbers: Numbers, fixed: tuple[Any, ...], warps: int) -> Launch:
        """The launch for all calls for which Triton would compile the kernel just as for this one."""
        device = inputs[0].device  # type: ignore[union-attr]
        kind = (
            device,
            warps,
            fixed,
            # A tuple around a dtype: the tensor does not begin at a multiple of 16 bytes.
            *[x if x is None else x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,) for x in inputs],
            # A tuple around a type: the integer takes 64 bits.
            *[x.__class__ if x is None or x < 2**31 else (x.__class__,) for x in numbers],
        )
        launch = self.launches.get(kind)
        if launch is None:
            if len(self.launches) >= MOST_KINDS:
                self.launches.clear()
            launch = Launch(self.op, self.kernel, device, {"num_warps": warps, **self.options})
            self.launches[kind] = launch
        return launch


def _on_device(op: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context to launch in: so that the device is the current one, or interpreted."""
    if device.type == "cpu":
        if not INTERPRETED.value:
            raise Unsupported(f"{op}: triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1")
        return interpreting
    return nullcontext() if device.index == current_device_index() else torch.accelerator.device_index(device.index)
