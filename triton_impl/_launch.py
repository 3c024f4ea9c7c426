"""How every kernel of this backend is launched.

Triton looks at each argument of a call to find what it has compiled for it, so that a launch takes 9 to 11 us of host
time. A `Launcher` remembers the compiled kernel for each kind of call, and starts it as Triton would, but without
what Triton prepares for hooks where there are none, and with addresses in place of tensors where a plan has them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch._C._dynamo.guards import TensorGuards
from torch.accelerator import current_device_index

from polyfuse.spec import Unsupported
from polyfuse.triton_impl._common import INTERPRETED

# Elsewhere Triton specialises a kernel on more of a tensor, such as the size of its storage.
ONLY_DTYPE_AND_ALIGNMENT = torch.version.cuda is not None
MOST_KINDS = 1024  # that a launcher remembers
# Whose compiled kernels were seen to take (x, y, z, stream, function, metadata, launch metadata, hooks, arguments).
STARTED_DIRECTLY = triton.__version__.startswith("3.6.") and torch.version.cuda is not None
_HOOKS: Any = triton.knobs.runtime

Grid = tuple[int, int, int]
Inputs = tuple[torch.Tensor | None, ...]
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

    __slots__ = ("copied", "grid", "launch", "rest")

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
        self.grid, self.rest = grid, (*numbers, *fixed)
        self.copied = tuple(i for i in contiguous if (x := inputs[i]) is not None and not x.is_contiguous())
        self.launch = launcher.find(self._ready(inputs), numbers, fixed, warps)

    def __call__(self, inputs: Inputs, addresses: Sequence[int | None], outputs: tuple[torch.Tensor, ...]) -> None:
        """Launch the kernel for a call of this kind, whose inputs begin at these addresses."""
        if self.copied or self.launch.start is None:
            self.launch(self.grid, *self._ready(inputs), *outputs, *self.rest)
        else:
            self.launch(self.grid, *addresses, *[x.data_ptr() for x in outputs], *self.rest)

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
        self.last: tuple[Any, Any, Any] = None, None, None  # of a call: what it is like, its tensors' guard, its plan

    def __call__(self, inputs: Inputs, outputs: tuple[torch.Tensor, ...], *settings: Any) -> None:
        """Launch the kernel for a call, whose first input is there."""
        addresses = [None if x is None else x.data_ptr() for x in inputs]
        given = [x for x in inputs if x is not None]
        aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0
        like = settings, [x is None for x in inputs], aligned
        last_like, same, last = self.last
        if like == last_like and same(*given):  # as most calls are
            last(inputs, addresses, outputs)
            return
        plan = self._find(inputs, addresses, settings)
        if aligned:
            self.last = like, _same(given), plan
        plan(inputs, addresses, outputs)

    def _find(self, inputs: Inputs, addresses: Sequence[int | None], settings: tuple[Any, ...]) -> Plan:
        """The plan of a call, which is made if there is none."""
        key = (
            settings,
            inputs[0].device,  # type: ignore[union-attr]
            *[x if x is None else (x.shape, x.stride(), x.dtype) for x in inputs],
            *[x if x is None else x % 16 == 0 for x in addresses],
        )
        plan = self.plans.get(key)
        if plan is None:
            if len(self.plans) >= MOST_KINDS:
                self.plans.clear()
            plan = self.plans[key] = self.make(inputs, *settings)
        return plan


def _same(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether others are like these tensors in shape, strides, dtype, device and all that PyTorch dispatches on.

    It is what guards PyTorch's compiled graphs, one call for all tensors: a quarter of the time that Python takes.
    """
    shapes: Any = [list(x.shape) for x in tensors]
    strides: Any = [list(x.stride()) for x in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    return check


def _on_device(op: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context to launch in, so that the device is the current one."""
    if device.type == "cpu":
        if not INTERPRETED.value:
            raise Unsupported(f"{op}: triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1")
        return nullcontext()
    return nullcontext() if device.index == current_device_index() else torch.accelerator.device_index(device.index)
