"""How every kernel of this backend is launched.

Triton looks at each argument of a call to find what it has compiled for it, so that a launch takes 9 to 11 us of host
time. The compiled kernel alone takes 6 us: a `Launcher` remembers it for each kind of call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.accelerator import current_device_index

from polyfuse.spec import Unsupported
from polyfuse.triton_impl._common import INTERPRETED

# Elsewhere Triton specialises a kernel on more of a tensor, such as the size of its storage.
ONLY_DTYPE_AND_ALIGNMENT = torch.version.cuda is not None
MOST_KINDS = 1024  # that a launcher remembers

Grid = tuple[int, int, int]
Inputs = tuple[torch.Tensor | None, ...]
Numbers = tuple[int | float | None, ...]


class Launch:
    """Launches a kernel for the calls of one kind on one device; Triton is asked for the first of them only."""

    __slots__ = ("compiled", "device", "index", "kernel", "op", "options")

    def __init__(self, op: str, kernel: Any, device: torch.device, options: dict[str, int]) -> None:
        self.op, self.kernel, self.device, self.options = op, kernel, device, options
        self.index = device.index
        self.compiled: Any = None

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """kernel[grid](*arguments), which are in the order of the kernel's parameters."""
        if self.compiled is not None and self.index == current_device_index():
            self.compiled[grid](*arguments)
            return
        with _on_device(self.op, self.device):
            if self.compiled is not None:
                self.compiled[grid](*arguments)
                return
            compiled = self.kernel[grid](*arguments, **self.options)
            if ONLY_DTYPE_AND_ALIGNMENT:
                self.compiled = compiled  # the interpreter gives None


class Launcher:
    """Launches `kernel`, whose parameters come in this order: inputs, outputs, numbers, fixed.

    - inputs are tensors, or None for one that is absent; the first one is there, and says on which device.
    - outputs are new tensors, which begin at a multiple of 16 bytes, and whose dtypes follow from the other arguments.
    - numbers are floats, and the integers that the kernel names in `do_not_specialize`, of any value.
    - fixed are the `tl.constexpr` and all other integers: each value of theirs is another kind of call.

    `options` go to every launch, such as num_stages.
    """

    def __init__(self, op: str, kernel: Any, **options: int) -> None:
        self.op, self.kernel, self.options = op, kernel, options
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


class Plan:
    """How the calls of one kind launch a kernel: on which grid, and with what behind their tensors.

    `copied` are the places of inputs that the kernel takes only where their elements lie behind one another, and that
    do not: they are copied first.
    """

    __slots__ = ("copied", "fixed", "grid", "launch", "numbers")

    def __init__(
        self,
        launcher: Launcher,
        grid: Grid,
        inputs: Inputs,
        numbers: Numbers,
        fixed: tuple[Any, ...],
        warps: int,
        contiguous: tuple[int, ...] = (),
    ) -> None:
        """`contiguous` are the places of all inputs that have to be so."""
        self.grid, self.numbers, self.fixed = grid, numbers, fixed
        self.copied = tuple(i for i in contiguous if (x := inputs[i]) is not None and not x.is_contiguous())
        self.launch = launcher.find(self._ready(inputs), numbers, fixed, warps)

    def __call__(self, inputs: Inputs, *outputs: torch.Tensor) -> None:
        """Launch the kernel for a call of this kind."""
        if self.copied:
            inputs = self._ready(inputs)
        self.launch(self.grid, *inputs, *outputs, *self.numbers, *self.fixed)

    def _ready(self, inputs: Inputs) -> Inputs:
        return tuple(x.contiguous() if i in self.copied else x for i, x in enumerate(inputs))  # type: ignore[union-attr]


class Plans:
    """The plans of an op's calls, found by what their tensors are like: `make(inputs, settings)` is asked once a kind.

    Calls are of one kind if their `settings` are equal, and their tensors in shape, strides, dtype, device, and in
    whether they begin at a multiple of 16 bytes.
    """

    def __init__(self, make: Callable[..., Plan]) -> None:
        self.make = make
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def __call__(self, inputs: Inputs, *settings: Any) -> Plan:
        """The plan of a call, whose first input is there."""
        key = (
            settings,
            inputs[0].device,  # type: ignore[union-attr]
            *[x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in inputs],
        )
        plan = self.plans.get(key)
        if plan is None:
            if len(self.plans) >= MOST_KINDS:
                self.plans.clear()
            plan = self.plans[key] = self.make(inputs, *settings)
        return plan


def _on_device(op: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context to launch in, so that the device is the current one."""
    if device.type == "cpu":
        if not INTERPRETED.value:
            raise Unsupported(f"{op}: triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1")
        return nullcontext()
    return nullcontext() if device.index == current_device_index() else torch.accelerator.device_index(device.index)
