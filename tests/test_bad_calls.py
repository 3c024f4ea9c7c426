"""Random broken calls of every public function: each returns what the oracle does, or raises one of our errors."""

import os
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as examples
from hypothesis import strategies as st

import polyfuse
from polyfuse import BackendError, SpecError, Unsupported
from polyfuse.conformance import cases, make_inputs, place
from polyfuse.conformance.checks.values import as_tuple, verdict
from polyfuse.dispatch import family_of, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import OPS, bind

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


EXAMPLES = int(os.environ.get("BAD_CALLS", "1000"))  # more of them by hand, before a release


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions deprecate such tensors
        return torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.quint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(4, 8)])


SCALARS = [None, 3, 2.5, True, -1, 0, 3 + 1j, float("nan"), float("inf"), np.float32(1), np.int64(2), np.bool_(True)]
TEXTS = ["x", "", b"x", "auto", "float32", torch.float32, np.float32, np.dtype("int8")]
CONTAINERS = [
    [],
    (),
    {},
    {1},
    [1, 2],
    [[1, 2, 3]],
    [[1, 2, 2]],
    [[]],
    [None],
    [["a", "b", "c"]],
    [[1.5, 2, 2]],
    range(3),
]
OBJECTS = [object(), type, len]
TENSORS = [
    torch.ones(3),
    torch.ones(()),
    torch.tensor(2),
    torch.tensor([2]),
    torch.ones(0, 4),
    torch.ones(4, 4).to_sparse(),
    torch.ones(4, 8, device="meta"),
    torch.ones(1, 8).expand(4, 8),
    quantised(),
    nested(),
    torch.ones(4, 8, dtype=torch.complex64),
    torch.ones(4, 8, dtype=torch.bool),
    torch.ones((2, 3), dtype=torch.int64),
    torch.zeros((0, 3), dtype=torch.int64),
    torch.ones((1, 3), dtype=torch.int64, device="meta"),
]
ARRAYS = [
    np.ones(3),
    np.array(2),
    np.ones((0,)),
    np.ones((1, 3), np.int64),
    np.ma.masked_array(np.ones((4, 8), np.float32)),
    np.arange(6)[::2],
]
JUNK: list[Any] = [*SCALARS, *TEXTS, *CONTAINERS, *OBJECTS, *TENSORS, *ARRAYS]
BACKENDS: list[Any] = [
    3,
    "",
    [],
    "torch",
    ["torch"],
    ("numpy",),
    "nope",
    ["torch", 3],
    b"torch",
    {},
    "numpy",
    "jax",
    ["jax"],
]
CHANGES: list[Any] = [
    lambda t: t[..., :-1],
    lambda t: t.double(),
    lambda t: t.T,
    lambda t: t[None],
    lambda t: t.reshape(-1),
    lambda t: t.to(torch.int32),
    lambda t: t.numpy() if t.dtype == torch.float32 else t,
    lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t: t.to("meta"),
]


@cache
def small_cases(op: str) -> list[Any]:
    found = []
    for case in cases(op):
        if case.repeat == 1 and all(np.prod(size) < 1000 for size in case.dims.values()):
            found.append(case)
    return found


@st.composite
def calls(draw: Any) -> tuple[str, dict[str, Any], Any]:
    op = draw(st.sampled_from(sorted(OPS)))
    case = draw(st.sampled_from(small_cases(op)))
    arguments = place(make_inputs(OPS[op], case), draw(st.sampled_from(["torch", "torch", "numpy"])), "cpu")
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(arguments)))
        value = arguments[name]
        if any(value is tensor for tensor in given) and draw(st.booleans()):
            arguments[name] = draw(st.sampled_from(CHANGES))(value)
        else:
            arguments[name] = JUNK[draw(st.integers(0, len(JUNK) - 1))]
    backend = draw(st.none() | st.sampled_from(range(len(BACKENDS))))
    return op, arguments, None if backend is None else BACKENDS[backend]


def is_readable(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    return value.device.type != "meta" and value.layout is torch.strided and not value.is_nested


def bits(arguments: dict[str, Any]) -> dict[str, bytes]:
    arrays = {name: value for name, value in arguments.items() if family_of(value) and is_readable(value)}
    return {
        name: to_numpy(value).tobytes()
        for name, value in arrays.items()
        if not (isinstance(value, torch.Tensor) and value.is_quantized)
    }


def in_place(op: str, arguments: dict[str, Any]) -> list[str]:
    """The tensors that a right call writes."""
    return [name for name in OPS[op].updated if isinstance(arguments[name], torch.Tensor)]


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@examples(calls())
@pytest.mark.filterwarnings("ignore")
def test_a_call_is_right_or_raises_one_line(call: tuple[str, dict[str, Any], Any]) -> None:
    op, arguments, backend = call
    before, written = bits(arguments), in_place(op, arguments)
    found = {name: arguments[name].clone() for name in written if name in before}
    try:
        with np.errstate(all="ignore"):
            result = getattr(polyfuse, op)(**arguments, backend=backend)
    except (SpecError, Unsupported, BackendError) as error:
        message = str(error)
    else:
        message = ""
        if all(map(is_readable, arguments.values())):
            given = arguments | found
            plain = {name: to_numpy(value) if family_of(value) else value for name, value in given.items()}
            returned = (*as_tuple(result), *(arguments[name] for name in written))
            assert verdict(returned, bind(OPS[op], plain), oracle(op).intervals(**plain)) is None
        before |= bits({name: arguments[name] for name in written})
    assert "\n" not in message
    assert bits(arguments) == before


@pytest.mark.parametrize("op", OPS)
def test_every_array_is_refused_where_it_is_no_dense_tensor(op: str) -> None:
    case = small_cases(op)[0]
    arguments = place(make_inputs(OPS[op], case), "torch", "cpu")
    arrays = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in arrays:
        for junk in (nested(), quantised(), torch.ones(4, 4).to_sparse()):
            with pytest.raises(SpecError, match=f"^{op}: .*dense tensor"):
                getattr(polyfuse, op)(**arguments | {name: junk})


def test_a_sparse_tensor_is_refused_after_a_dense_one_of_its_shape() -> None:
    x = torch.ones(4, 8)
    polyfuse.gated_rms_norm(x, x, x[0])
    with pytest.raises(SpecError, match=r"gate: expected a dense tensor, got a tensor that is torch\.sparse_coo"):
        polyfuse.gated_rms_norm(x, x.to_sparse(), x[0])
