from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import polyfuse
from polyfuse.conformance import Case, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import OPS, bind
from polyfuse.torch_impl.gdn_conv_prep import gdn_conv_prep
from tests import interleaved

exact = oracle("gdn_conv_prep").intervals

SPEC = OPS["gdn_conv_prep"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEADS = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128, "output_final_state": True}
ODD = {"num_k_heads": 3, "head_k_dim": 25, "head_v_dim": 41, "output_final_state": True}
SMALL = {"num_k_heads": 2, "head_k_dim": 6, "head_v_dim": 4, "output_final_state": True}
BF16: dict[str, str] = dict.fromkeys(("T", "initial_state", "weight", "a", "b", "A_log", "dt_bias"), "bfloat16")
TOKENS_ADJACENT: dict[str, str] = dict.fromkeys(("x", "a", "b"), "token_stride_1")
STATE, PACKED = ("bias", "initial_state"), ("bias", "initial_state", "cu_seqlens")
FILL = {"cu_seqlens": "cu_seqlens"}
CASES = [
    *(case for case in cases(SPEC.name) if case.repeat == 1),
    Case("qwen3_5_35b", {"L": 3, "HV": 32, "W": 4, "S": 1}, HEADS, BF16, present=STATE),
    Case("qwen3_5_397b", {"L": 2, "HV": 64, "W": 4, "S": 1}, HEADS, BF16, present=STATE),
    Case("qwen3_next_80b-as_transformers", {"L": 37, "HV": 32, "W": 4}, HEADS, BF16, layout=TOKENS_ADJACENT),
]
ROWS = ("x", "a", "b")


def arguments(values: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """What the dispatcher passes."""
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays}


def packed(length: int, heads_v: int, dtype: str, attrs: dict[str, Any], width: int = 4) -> dict[str, Any]:
    """A call with 8 sequences of 2, 0, 5, 3, 1, 6, 4, 2 rows, and rows past the last."""
    dims = {"L": length, "HV": heads_v, "W": width, "N": 9, "S": 8}
    dtypes = {"T": dtype, "initial_state": dtype}
    return make_inputs(SPEC, Case("packed", dims, attrs, dtypes, present=PACKED, fill=FILL))


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


def assert_right(args: dict[str, Any], values: dict[str, Any]) -> None:
    results, wanted, call = gdn_conv_prep(**args), exact(**values), bind(SPEC, values)
    for output, result in zip(call.outputs, results, strict=True):
        assert compare(output.name, to_numpy(result), wanted[output.name], output.dtype) is None
        assert result.stride() == (output.strides or result.contiguous().stride())
    for output in call.updated:
        assert compare(output.name, to_numpy(args[output.name]), wanted[output.name], output.dtype) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_and_leaves_its_inputs(case: Case, device: str) -> None:
    values = make_inputs(SPEC, case)
    args = arguments(values, device)
    before = {k: bits(v) for k, v in args.items() if isinstance(v, torch.Tensor) and k not in SPEC.updated}
    assert_right(args, values)
    assert {k: bits(args[k]) for k in before} == before


@pytest.mark.parametrize("cu_seqlens", [[2, 2, 5, 5, 9, 10, 10, 12, 12], [23] * 9, [0] * 9])
def test_rows_outside_all_sequences(cu_seqlens: list[int]) -> None:
    values = packed(23, 4, "bfloat16", SMALL) | {"cu_seqlens": np.array(cu_seqlens)}
    assert_right(arguments(values), values)


@pytest.mark.parametrize("case", interleaved.CASES, ids=lambda case: case.name)
def test_interleaved_is_the_op_on_columns_in_order(case: Case) -> None:
    values = make_inputs(SPEC, case)
    wanted = gdn_conv_prep(**arguments(interleaved.in_order(values)))
    for result, want in zip(gdn_conv_prep(**arguments(values)), wanted, strict=True):
        assert bits(result) == bits(want)


@pytest.mark.parametrize("case", interleaved.CASES[:4], ids=lambda case: case.name)
def test_gradients_of_interleaved_columns(case: Case) -> None:
    """Those of the columns in order, and zeros for z."""
    values = make_inputs(SPEC, case)
    gradients = []
    for given in (values, interleaved.in_order(values)):
        args = arguments(given)
        floats = [name for name, x in args.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for name in floats:
            args[name].requires_grad_()
        torch.autograd.backward([part.sum() for part in gdn_conv_prep(**args)])
        gradients.append({name: to_numpy(args[name].grad) for name in floats})
    mine, wanted = gradients
    columns = mine["x"].reshape(len(values["x"]), values["num_k_heads"], -1)
    of_z = len(values["A_log"]) // values["num_k_heads"] * values["head_v_dim"]
    assert not columns[:, :, -of_z:].any()
    ordered = interleaved.in_order(values | {name: mine[name] for name in ("x", "a", "b")})
    for name, want in wanted.items():
        assert (ordered if name in ("x", "a", "b") else mine)[name].tobytes() == want.tobytes(), name


def test_interleaved_compiles_as_one_node() -> None:
    compiled = torch.compile(polyfuse.gdn_conv_prep, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in interleaved.CASES[:2]:
        args = arguments(make_inputs(SPEC, case))
        wanted = gdn_conv_prep(**args)
        for result, want in zip(compiled(**args), wanted, strict=True):
            assert result.stride() == want.stride()
            assert bits(result) == bits(want)


def test_no_value_heads() -> None:
    args = arguments(packed(23, 4, "bfloat16", SMALL))
    columns = {name: args[name][:24] for name in ("weight", "bias")}
    heads = {name: args[name][..., :0] for name in ("a", "b", "A_log", "dt_bias")}
    less = {"x": args["x"][:, :24], "initial_state": args["initial_state"][:, :24]}
    q, k, v, g, beta, state = gdn_conv_prep(**args | columns | heads | less)
    want_q, want_k, _, _, _, want_state = gdn_conv_prep(**args)
    assert (v.shape, g.shape, beta.shape) == ((23, 0, 4), (23, 0), (23, 0))
    for result, want in ((q, want_q), (k, want_k), (state, want_state[:, :24])):
        assert bits(result) == bits(want)


def test_a_strided_cu_seqlens() -> None:
    args = arguments(packed(23, 4, "float32", SMALL))
    strided: dict[str, Any] = {"cu_seqlens": torch.stack([args["cu_seqlens"]] * 2, dim=1)[:, 0]}
    for result, want in zip(gdn_conv_prep(**args | strided), gdn_conv_prep(**args), strict=True):
        assert bits(result) == bits(want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "device"),
    [
        (ODD, "cpu"),  # a GPU may sum the squares of fewer than 16 vectors in another order
        *((ODD | {"l2norm": False}, device) for device in DEVICES),
        *((HEADS, device) for device in DEVICES),
    ],
)
def test_packed_sequences_equal_separate_ones(heads: dict[str, Any], device: str, dtype: str) -> None:
    """Bit for bit, so a row does not depend on the batch either; nor on the layout of x."""
    args = arguments(packed(23, 2 * heads["num_k_heads"], dtype, heads), device)
    columns_first: dict[str, Any] = {name: args[name].t().contiguous().t() for name in (*ROWS, "weight")}
    *whole, state = gdn_conv_prep(**args)
    ends = args["cu_seqlens"].tolist()
    for i, (start, end) in enumerate(pairwise(ends)):
        for source in (args, args | columns_first):
            some: dict[str, Any] = {name: source[name][start:end] for name in ROWS}
            alone = {"cu_seqlens": None, "initial_state": args["initial_state"][i : i + 1]}
            *rows, last = gdn_conv_prep(**source | some | alone)
            assert bits(last[0]) == bits(state[i])
            for result, want in zip(rows, whole, strict=True):
                assert bits(result) == bits(want[start:end])


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 19, 22, 23])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_sequence_goes_on_from_its_final_state(width: int, cut: int) -> None:
    dims = {"L": 23, "HV": 6, "W": width, "S": 1}
    args = arguments(make_inputs(SPEC, Case("whole", dims, ODD, BF16, present=STATE)))
    first: dict[str, Any] = {name: args[name][:cut] for name in ROWS}
    *head, state = gdn_conv_prep(**args | first)
    second: dict[str, Any] = {name: args[name][cut:] for name in ROWS} | {"initial_state": state}
    *tail, last = gdn_conv_prep(**args | second)
    *whole, want_last = gdn_conv_prep(**args)
    assert bits(last) == bits(want_last)
    for *parts, want in zip(head, tail, whole, strict=True):
        assert bits(torch.cat(parts)) == bits(want)


def test_nan_stays_in_its_sequence() -> None:
    args = arguments(packed(23, 4, "float32", SMALL))
    clean = gdn_conv_prep(**args)
    for i, (start, end) in enumerate([(0, 2), (2, 2), (2, 7), (7, 10), (10, 11), (11, 17), (17, 21), (21, 23)]):
        spoiled: dict[str, Any] = {name: args[name].clone() for name in (*ROWS, "initial_state")}
        for name in ROWS:
            spoiled[name][start:end] = torch.nan
        spoiled["initial_state"][i] = torch.nan
        results = gdn_conv_prep(**args | spoiled)
        for result, want in zip(results[:5], clean[:5], strict=True):
            assert result[start:end].isnan().all()
            assert bits(result[:start]) == bits(want[:start])
            assert bits(result[end:]) == bits(want[end:])
        others = [number for number in range(8) if number != i]
        assert bits(results[5][others]) == bits(clean[5][others])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("l2norm", [True, False])
def test_results_share_no_memory(l2norm: bool, dtype: str) -> None:
    """With one row and a state of one input every part is contiguous: still none may be a view of another."""
    dims = {"L": 1, "HV": 2, "W": 2, "S": 1}
    dtypes = {"T": dtype, "initial_state": dtype}
    args = arguments(make_inputs(SPEC, Case("one", dims, SMALL | {"l2norm": l2norm}, dtypes, present=STATE)))
    everything = [x for x in args.values() if isinstance(x, torch.Tensor)] + list(gdn_conv_prep(**args))
    assert len({x.untyped_storage().data_ptr() for x in everything}) == 14


@pytest.mark.parametrize("present", [(), PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("l2norm", [False, True])
def test_gradients_agree_with_finite_differences_of_the_oracle(l2norm: bool, present: tuple[str, ...]) -> None:
    dims = {"L": 9, "HV": 4, "W": 4} | ({"N": 5, "S": 4} if present else {})
    case = Case("gradient", dims, SMALL | {"l2norm": l2norm}, present=present, fill=FILL if present else {})
    values = make_inputs(SPEC, case)
    if present:
        values["cu_seqlens"] = np.array([0, 2, 2, 7, 8])
    rng = np.random.default_rng(0)
    upstream = {name: rng.standard_normal(result.value.shape) for name, result in exact(**values).items()}
    args = arguments(values)
    floats = [name for name, x in args.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for name in floats:
        args[name].requires_grad_()
    torch.autograd.backward(gdn_conv_prep(**args), [torch.from_numpy(u).float() for u in upstream.values()])

    def loss(changed: dict[str, Any]) -> float:
        return sum(float((oracle(SPEC.name).exact(changed)[name] * u).sum()) for name, u in upstream.items())

    for name in floats:
        direction = rng.standard_normal(values[name].shape)
        step = 1e-5 * direction
        wide = values[name].astype(np.float64)
        slope = (loss(values | {name: wide + step}) - loss(values | {name: wide - step})) / 2e-5
        np.testing.assert_allclose((to_numpy(args[name].grad) * direction).sum(), slope, rtol=1e-4)


def test_gradients_at_the_ends_of_the_line() -> None:
    x = torch.tensor([[0, 0, -1000.0], [0, 0, 0.0], [0, 0, 1000.0]], requires_grad=True)
    weight, zero = torch.tensor([[0.0, 1.0]]).expand(3, 2), torch.zeros(3, 1)
    v = gdn_conv_prep(x, weight, zero, zero, zero[0], zero[0], num_k_heads=1, head_k_dim=1, head_v_dim=1)[2]
    v.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0], [0, 0, 0.5], [0, 0, 1]]


def test_nothing_is_read_back() -> None:
    """A fake tensor has no values: reading one back raises."""
    values = packed(23, 4, "bfloat16", SMALL)
    with FakeTensorMode() as mode:
        args = arguments(values)
        args |= {k: mode.from_tensor(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
        results = gdn_conv_prep(**args)
    described = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in results]
    assert described == [(output.shape, output.dtype) for output in bind(SPEC, values).outputs]


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(gdn_conv_prep, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (23, 25):
        args = arguments(packed(length, 4, "bfloat16", SMALL))
        for result, want in zip(compiled(**args), gdn_conv_prep(**args), strict=True):
            assert bits(result) == bits(want)
