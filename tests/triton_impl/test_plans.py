"""Plans: one for each kind of call, found again, and forgotten in the end.

Every op of the backend is held to it: whatever its calls were before, a call launches what it launches alone.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from polyfuse.conformance import make_inputs, place
from polyfuse.conformance.cases import cases
from polyfuse.dispatch import registry, to_numpy
from polyfuse.spec import OPS, bind
from polyfuse.triton_impl import _plans
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken
from tests.triton_impl.helpers import DEVICE

TRITON = registry().get("triton")
LONG = dict.fromkeys(("gdn_conv_prep", "gated_delta_rule"), pytest.mark.slow)
HELD = [op for op in OPS if not TRITON.missing(op)]
X = torch.zeros(64, device=DEVICE)

Arguments = dict[str, Any]
Launched = tuple[Any, ...]
Way = Callable[[torch.Tensor], torch.Tensor]


def arguments_of(op: str, names: tuple[str, ...] | None = None) -> Iterator[Arguments]:
    """The arguments of the op's cases, or of those with these names, that the backend takes."""
    implementation = TRITON.load(op)
    for case in cases(op):
        if case.repeat == 1 and (names is None or case.name in names):
            values = make_inputs(OPS[op], case)
            if implementation.capability.refusal(bind(OPS[op], values), "cuda", (9, 0)) is None:
                yield place(values, "torch", DEVICE) | ({"strategy": "fused"} if "strategy" in values else {})


def shifted(x: torch.Tensor) -> torch.Tensor:
    """It begins one element after a multiple of 16 bytes."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def shifted_on(x: torch.Tensor) -> torch.Tensor:
    """It begins three elements after a multiple of 16 bytes."""
    return torch.zeros(x.numel() + 3, dtype=x.dtype, device=x.device)[3:].view(x.shape).copy_(x)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Its elements are apart."""
    if not x.ndim:
        return x.clone()
    wide = torch.zeros(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype, device=x.device)
    return wide[..., ::3].copy_(x)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Its last dimension but one is contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x.clone()


def other_layouts(
    arguments: Arguments, ways: tuple[Way, ...] = (shifted, spread, turned, shifted_on)
) -> list[Arguments]:
    """The same call, with one array in another layout."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.numel()}
    return [arguments | {name: way(value)} for name, value in arrays.items() for way in ways]


def arrays_of(arguments: Arguments) -> list[torch.Tensor]:
    return [x for x in arguments.values() if isinstance(x, torch.Tensor)]


def with_most_arrays(op: str) -> Arguments:
    """Arguments of the core case of the op that has the most arrays, each with elements, and of these the fewest."""
    return max(
        (x for x in arguments_of(op, OPS[op].core) if all(array.numel() for array in arrays_of(x))),
        key=lambda x: (len(arrays_of(x)), -sum(array.numel() for array in arrays_of(x))),
    )


class NotedLaunch:
    """In place of a `Launch`: notes the launches, once the first has happened of addresses where there may be such.

    It fails for arguments of another kind than those that it was found for.
    """

    def __init__(self, kernel: Any, inputs: Any, numbers: Any, fixed: Any, warps: int, seen: list[Launched]) -> None:
        self.kernel, self.warps, self.seen, self.start = kernel, warps, seen, None
        self.inputs = [self.kind(x) for x in inputs]
        self.dtypes = [None if x is None else x.dtype for x in inputs]
        self.numbers, self.fixed = [self.kind(x) for x in numbers], fixed

    @staticmethod
    def kind(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.data_ptr() % 16 == 0
        return (type(x), isinstance(x, int) and x >= 2**31)

    def __call__(self, grid: Any, *passed: Any) -> None:
        behind = len(passed) - len(self.numbers) - len(self.fixed)
        arrays, numbers = passed[:behind], passed[behind : behind + len(self.numbers)]
        assert passed[behind + len(self.numbers) :] == tuple(self.fixed)
        assert [self.kind(x) for x in numbers] == self.numbers
        for x, kind, dtype in zip(arrays, self.inputs, self.dtypes, strict=False):
            assert (x is None) == (dtype is None)
            if isinstance(x, torch.Tensor):
                assert (self.kind(x), x.dtype) == (kind, dtype)
            elif x is not None:
                assert (x % 16 == 0) == kind
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arrays]
        given, outputs = addresses[: len(self.inputs)], addresses[len(self.inputs) :]
        assert all(x % 16 == 0 or x in given for x in outputs)
        self.seen.append((self.kernel.__name__, self.warps, grid, arrays, len(self.inputs), numbers, self.fixed))
        self.start = lambda *_: None  # type: ignore[assignment]


@pytest.fixture
def noted(forget: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What is launched, of which nothing runs."""
    seen: list[Launched] = []

    def find(self: Launcher, inputs: Any, numbers: Any, fixed: Any, warps: int) -> NotedLaunch:
        return NotedLaunch(self.kernel, inputs, numbers, fixed, warps, seen)

    monkeypatch.setattr(Launcher, "find", find)
    return seen


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes an op forget its plans, until the test ends."""

    def forget(op: str) -> None:
        module = __import__(f"polyfuse.triton_impl.{op}", fromlist=["_plans"])
        monkeypatch.setattr(module, "_plans", Plans(module._plan, module._plans.free))

    return forget


class New:
    """Memory that is no argument's, and its elements where these are known: of a copy, but not of an address."""

    def __init__(self, x: torch.Tensor | None) -> None:
        self.elements = None if x is None or not x.numel() else to_numpy(x.contiguous()).tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, New) and (None in (self.elements, other.elements) or self.elements == other.elements)

    __hash__ = None  # type: ignore[assignment]


def launched(op: str, arguments: Arguments, seen: list[Launched]) -> list[Launched]:
    """What a call launches, with what its addresses are: in which argument and how far from its memory's beginning.

    Of what is in none, the elements if it is among a kernel's inputs: a copy.
    """
    del seen[:]
    TRITON.load(op).function(**arguments)
    memory = [(name, x.untyped_storage()) for name, x in arguments.items() if isinstance(x, torch.Tensor)]

    def described(x: Any, is_input: bool) -> Any:
        if x is None:
            return None
        address = x.data_ptr() if isinstance(x, torch.Tensor) else x
        for name, storage in memory:
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return name, address - storage.data_ptr()
        return New(x if is_input and isinstance(x, torch.Tensor) else None)

    return [
        (*launch, *[described(x, i < inputs) for i, x in enumerate(arrays)], numbers, fixed)
        for *launch, arrays, inputs, numbers, fixed in seen
    ]


@pytest.mark.parametrize("op", HELD)
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_a_call_launches_what_it_does_alone(op: str, noted: list[Launched], forget: Callable[[str], None]) -> None:
    """Calls that differ in one array's layout, in dtypes, attributes and arrays; each several times among others."""
    calls = list(arguments_of(op))
    calls += other_layouts(with_most_arrays(op))
    alone = []
    for arguments in calls:
        forget(op)
        alone.append(launched(op, arguments, noted))
    assert sum(map(bool, alone)) > len(calls) / 2
    forget(op)
    numbers = [*range(len(calls))]
    for order in (numbers, numbers[::-1], sorted(numbers * 2)):
        for i in order:
            assert launched(op, calls[i], noted) == alone[i]


@pytest.mark.skipif(not INTERPRETED.value, reason="for other strides a compiler may sum in another order")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", [pytest.param(op, marks=LONG.get(op, ())) for op in HELD])
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_layouts_change_no_bit(op: str) -> None:
    """One call after the other, of which each has another array in another layout than the first one."""
    function = TRITON.load(op).function

    def results(arguments: Arguments) -> list[bytes]:
        updated = {name: arguments[name].clone() for name in OPS[op].updated if arguments.get(name) is not None}
        found = function(**arguments | updated)
        found = [*(found if isinstance(found, tuple) else (found,)), *updated.values()]
        return [to_numpy(x.contiguous()).tobytes() for x in found if x is not None]

    first = with_most_arrays(op)
    want = results(first)
    for other in [*other_layouts(first, (spread, turned)), first]:
        assert results(other) == want


@pytest.mark.parametrize("op", HELD)
@torch.no_grad()
def test_no_tensor_is_kept(op: str, noted: list[Launched], forget: Callable[[str], None]) -> None:
    forget(op)
    arguments = with_most_arrays(op)
    arguments |= {name: spread(x) for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.ndim > 1}
    for _ in range(2):
        TRITON.load(op).function(**arguments)
    assert noted
    left = [weakref.ref(x) for x in arrays_of(arguments)]
    del noted[:], arguments
    gc.collect()
    assert [x() for x in left] == [None] * len(left)


@pytest.fixture
def made() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def plans(made: list[tuple[Any, ...]]) -> Plans:
    """Plans that launch nothing; each keeps its number, from 1."""

    def make(inputs: Any, *settings: Any) -> Plan:
        made.append(settings)
        return Plan(Taken(inputs), kept=len(made))

    return Plans(make)


def test_calls_of_another_kind_have_another_plan(plans: Plans, made: list[tuple[Any, ...]]) -> None:
    """Absent inputs in other places, other strides, beginnings and settings; and the first kind again."""
    square = torch.zeros(8, 8, device=DEVICE)
    kinds: list[tuple[Any, ...]] = [
        ((X, X, None), ()),
        ((X, None, X[4:36]), ()),
        ((X, X[4:36], None), ()),
        ((X[4:], X[4:], None), ()),
        ((X.half(), X, None), ()),
        ((X[1:33], X, None), ()),
        ((X[2:34], X, None), ()),
        ((square, None, None), ()),
        ((square.t(), None, None), ()),
        ((X, X, None), (1,)),
    ]
    found = [
        plans(inputs, *settings)[0].kept for inputs, settings in [kind for kind in kinds for _ in range(2)] + kinds
    ]
    numbers = range(1, len(kinds) + 1)
    assert found == [n for n in numbers for _ in range(2)] + [*numbers]
    assert len(made) == len(kinds)


@pytest.mark.parametrize("change", ["requires_grad", "autocast", "inference"])
def test_modes_of_pytorch_change_no_plan(change: str, plans: Plans, made: list[tuple[Any, ...]]) -> None:
    """The plan is found again by its key, as what PyTorch dispatches on is not what a kernel depends on."""
    modes: dict[str, Any] = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference": torch.inference_mode()}
    first = plans((X,))[0]
    if change == "requires_grad":
        assert plans((X.clone().requires_grad_(),))[0] is first
    else:
        with modes[change]:
            assert plans((X,))[0] is first
            assert plans((X.clone(),))[0] is first
    assert plans((X,))[0] is first
    assert len(made) == 1


def test_a_tensor_in_two_places_has_a_plan(plans: Plans, made: list[tuple[Any, ...]]) -> None:
    assert plans((X, X))[0] is plans((X, X.clone()))[0] is plans((X, X))[0]
    assert len(made) == 1


def test_plans_are_forgotten(plans: Plans, made: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plans, "MOST_KINDS", 2)
    for i in range(5):
        plans((X,), i)
        assert len(plans.kinds) <= 2
    assert made == [(i,) for i in range(5)]


def test_calls_that_take_turns_find_their_guards(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """And make another one where PyTorch dispatches on something else than before."""
    other, recorded = torch.zeros(8, device=DEVICE), X.clone().requires_grad_()
    for x in (X, other):
        plans((x,))
    made: list[Any] = []
    guard = Plans._guard

    def noted_guard(self: Plans, inputs: Any) -> Callable[..., bool]:
        made.append(inputs)
        return guard(self, inputs)

    monkeypatch.setattr(Plans, "_guard", noted_guard)
    for x in (X, other, X, X, other):
        plans((x,))
    assert made == []
    for _ in range(3):
        plans((other.requires_grad_(),))
    assert len(made) == 1
    assert plans((recorded,))[0] is plans((X,))[0]


def test_a_first_dimension_may_be_free() -> None:
    plans = Plans(lambda inputs: Plan(Taken(inputs)), free=(1,))
    rows = torch.zeros(7, 4, device=DEVICE)
    plan = plans((X, rows))[0]
    assert plans((X, rows[:4]))[0] is plan
    assert plans((X, rows[4:]))[0] is plan
    assert plans((X[:8], rows))[0] is not plan
    assert plans((X, rows[:, :2]))[0] is not plan
    assert len(plans.kinds) == 3


def test_a_plan_passes_parts_and_copies_and_numbers_of_the_call(noted: list[Launched]) -> None:
    """A view that begins elsewhere, a copy, and the grid and the numbers that a call brings."""

    class Kernel:
        __name__ = "kernel"

    launcher = Launcher("op", Kernel())

    def make(inputs: Any) -> Plan:
        taken = Taken(inputs, {1: torch.Tensor.contiguous}, [(0, lambda x: x[8:])])
        steps = (Step(launcher, (n, 1, 1), taken, (n,), ("fixed",), 4, takes=(2, 1), gives=(0,)) for n in (1, 2))
        return Plan(taken, *steps)

    plans, out = Plans(make), (X.clone(), X.clone())
    apart = torch.arange(8, device=DEVICE)[::2]
    inputs = X, apart
    for changed in ({}, {}, {"grid": (9, 1, 1), "numbers": (7,)}):
        del noted[:]
        plan, addresses = plans(inputs)
        plan(inputs, addresses, out, **changed)
        grids, numbers = ([(9, 1, 1)] * 2, [(7,)] * 2) if changed else ([(1, 1, 1), (2, 1, 1)], [(1,), (2,)])
        assert [launch[2] for launch in noted] == grids
        assert [launch[5] for launch in noted] == numbers
        for *_, (part, copy, result), _, _, fixed in noted:
            assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (part, result)] == [
                X[8:].data_ptr(),
                out[0].data_ptr(),
            ]
            assert copy.tolist() == [0, 2, 4, 6]
            assert copy.is_contiguous()
            assert fixed == ("fixed",)
