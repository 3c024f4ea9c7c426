"""How the calls of an op find what all calls of their kind have in common: by one look at their tensors.

An op's `Plans` are asked at each call for its `Plan`. Only the first call of a kind computes strides, tiles and grids,
and finds the compiled kernels; the others allocate their outputs and start these.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

from polyfuse.triton_impl._launch import Grid, Inputs, Launcher, Numbers

MOST_KINDS = 1024  # of calls that an op remembers

Change = Callable[[torch.Tensor], torch.Tensor]
Addresses = list[Any]  # None for an input that is absent
Arrays = Sequence[Any]  # tensors or their addresses


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose elements lie behind one another."""
    return x if x.is_contiguous() else x.contiguous()


def rows_together(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns]: the tensor with one leading dimension."""
    return x if x.ndim <= 2 else x.flatten(0, -2)


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if the elements of its last dimension do not lie behind one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Taken:
    """The inputs of a call, and as `ready` what its kernels take in their places, with parts of inputs behind them.

    `changes` say for a place how that is made of the input: as a view that begins where it does, or as a copy. `parts`
    say of which places there are views that begin elsewhere, and how these are made. Both may depend on what calls of
    one kind have in common, and hold no tensor, as a plan keeps them.
    """

    __slots__ = ("changes", "inputs", "parts", "ready")

    def __init__(
        self, inputs: Inputs, changes: Mapping[int, Change] | None = None, parts: Sequence[tuple[int, Change]] = ()
    ) -> None:
        self.inputs, self.parts = inputs, parts
        self.changes = {i: change for i, change in (changes or {}).items() if inputs[i] is not None}
        ready: list[Any] = [*inputs]
        for i, change in self.changes.items():
            ready[i] = change(ready[i])
        ready += [change(ready[i]) for i, change in parts]
        self.ready = tuple(ready)

    def at(self, places: Sequence[int]) -> tuple[Any, ...]:
        """What the kernels take in these places."""
        return tuple(self.ready[i] for i in places)


class Step:
    """One launch of a plan: on which grid, with which arrays, and with what behind them.

    The kernel takes the inputs at the places `takes`, by default all, and of the call's outputs those at the places
    `gives`, by default all.
    """

    __slots__ = ("fixed", "gives", "grid", "launch", "numbers", "takes")

    def __init__(
        self,
        launcher: Launcher,
        grid: Grid,
        taken: Taken,
        numbers: Numbers,
        fixed: tuple[Any, ...],
        warps: int,
        *,
        takes: Sequence[int] | None = None,
        gives: Sequence[int] | None = None,
    ) -> None:
        self.grid, self.numbers, self.fixed, self.takes, self.gives = grid, numbers, fixed, takes, gives
        self.launch = launcher.find(taken.ready if takes is None else taken.at(takes), numbers, fixed, warps)


class Plan:
    """How the calls of one kind launch their kernels, in the order of `steps`; of no tensor it is more than a size.

    `kept` is what else the op wants to know of calls of this kind.
    """

    __slots__ = ("changes", "copied", "direct", "distances", "kept", "parts", "steps")

    def __init__(self, taken: Taken, *steps: Step, kept: Any = None) -> None:
        self.steps, self.kept = steps, kept
        self.direct = False  # whether all kernels are known to take addresses
        self.changes, self.parts = taken.changes, taken.parts
        given: list[Any] = [*taken.inputs]
        self.copied = [(i, x) for i, x in taken.changes.items() if taken.ready[i].data_ptr() != given[i].data_ptr()]
        views = zip(taken.parts, taken.ready[len(given) :], strict=True)
        self.distances = [(i, x.data_ptr() - given[i].data_ptr() if x.numel() else 0) for (i, _), x in views]

    def __call__(
        self,
        inputs: Inputs,
        addresses: Addresses,
        outputs: tuple[torch.Tensor, ...],
        *,
        grid: Grid | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        """Launch the kernels for a call of this kind, whose inputs begin at these addresses.

        A kernel may take another grid and other numbers than for the first call, if these need no other kernel.
        """
        arrays: Arrays = addresses
        written: Arrays = outputs
        if self.direct or self._is_direct():
            for i, distance in self.distances:
                addresses.append(addresses[i] + distance)
            for i, change in self.copied:
                addresses[i] = change(inputs[i])  # type: ignore[arg-type]
            written = [x.data_ptr() for x in outputs]
        else:
            arrays = Taken(inputs, self.changes, self.parts).ready
        for step in self.steps:
            step.launch(
                step.grid if grid is None else grid,
                *(arrays if step.takes is None else [arrays[i] for i in step.takes]),
                *(written if step.gives is None else [written[i] for i in step.gives]),
                *(step.numbers if numbers is None else numbers),
                *step.fixed,
            )

    def _is_direct(self) -> bool:
        self.direct = all(step.launch.start is not None for step in self.steps)
        return self.direct


# Settings and where the inputs begin; whether tensors are like the inputs; and the plan.
Kind = tuple[tuple[tuple[Any, ...], list[int | None]], Callable[..., bool], Plan]


class Plans:
    """The plans of an op's calls, found by what their tensors are like: `make(inputs, *settings)` is asked once a kind.

    Calls are of one kind if their `settings` are equal, and their tensors in shape, strides, dtype, device, and in
    where they begin between two multiples of 16 bytes. In the places `free` the first dimension may have any size, if
    that is part of nothing that `make` gives. No tensor is kept.
    """

    def __init__(self, make: Callable[..., Plan], free: tuple[int, ...] = ()) -> None:
        self.make, self.free = make, free
        self.kinds: dict[tuple[Any, ...], Kind] = {}
        self.last: Any = None, None, None  # the kind of the last call

    def __call__(self, inputs: Inputs, *settings: Any) -> tuple[Plan, Addresses]:
        """The plan of a call, whose first input is there, and where its inputs begin."""
        addresses: Addresses = [None if x is None else x.data_ptr() for x in inputs]
        # Whether an input is there, and where it begins between two multiples of 16 bytes.
        begins = [None if x is None else x & 15 for x in addresses]
        last_like, same, last = self.last
        if (settings, begins) == last_like and same(*[x for x in inputs if x is not None]):  # as most calls are
            return last, addresses
        kind = self.last = self._find(inputs, begins, settings)  # another thread may replace the last one at once
        return kind[2], addresses

    def _find(self, inputs: Inputs, begins: list[int | None], settings: tuple[Any, ...]) -> Kind:
        """The kind of a call, whose plan is made if there is none."""
        key = (
            settings,
            inputs[0].device,  # type: ignore[union-attr]
            *begins,
            *[
                x if x is None else (x.shape[1:] if i in self.free else x.shape, x.stride(), x.dtype)
                for i, x in enumerate(inputs)
            ],
        )
        kind = self.kinds.get(key)
        if kind is None:
            if len(self.kinds) >= MOST_KINDS:
                self.kinds.clear()
            kind = self.kinds[key] = (settings, begins), self._guard(inputs), self.make(inputs, *settings)
        elif kind is self.last:  # what PyTorch dispatches on is not what it was: to a kernel it is all one
            kind = self.kinds[key] = kind[0], self._guard(inputs), kind[2]
        return kind

    def _guard(self, inputs: Inputs) -> Callable[..., bool]:
        """Whether others are like these tensors in shape, strides, dtype, device and all that PyTorch dispatches on.

        It is what guards PyTorch's compiled graphs, one call for all tensors: a quarter of the time that Python takes.
        """
        given = [(i, x) for i, x in enumerate(inputs) if x is not None]
        shapes: Any = [[None, *x.shape[1:]] if i in self.free else list(x.shape) for i, x in given]
        strides: Any = [list(x.stride()) for _, x in given]
        guards = TensorGuards(*[x for _, x in given], dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
        return check
