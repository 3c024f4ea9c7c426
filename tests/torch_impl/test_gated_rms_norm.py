"""`gated_rms_norm` in PyTorch: every case against the oracle, gradients, rows that nothing around them changes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.conformance import Case, Trial, cases, make_inputs, place
from polyfuse.conformance.cases import model_cases
from polyfuse.dispatch import registry, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import OPS, bind
from polyfuse.spec.gated_rms_norm import ACTIVATIONS, NAME
from polyfuse.torch_impl.gated_rms_norm import gated_rms_norm

SPEC = OPS[NAME]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEADS = {"...": (7, 3, 2), "V": 24}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


CASES = [case for case in (*cases(NAME), *model_cases(NAME)) if case.repeat == 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, device: str) -> None:
    assert Trial(NAME, case, 0).on(registry().get("torch"), device) == ("passed", "")


def test_a_row_computed_by_hand() -> None:
    # A mean square of 6 and eps 3: the root is 3. silu(0) = 0 and sigmoid(0) = 1/2.
    x, gate = torch.tensor([2.0, 2.0, 4.0, 0.0]), torch.zeros(4)
    weight = torch.tensor([0.5, 2.0, -0.25, 9.0])
    y = gated_rms_norm(x, gate, weight, eps=3.0, activation="sigmoid", weight_offset=1.0)
    assert y.tolist() == pytest.approx([0.5, 1.0, 0.5, 0.0], rel=1e-6)
    assert gated_rms_norm(x, gate, weight, eps=3.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("width", [24, 72, 128])
def test_rows_do_not_depend_on_batch_or_layout(width: int) -> None:
    args = place(make_inputs(SPEC, Case("rows", {"...": (70,), "V": width})), "torch", "cpu")
    want = gated_rms_norm(**args)
    turned = {name: args[name].t().contiguous().t() for name in ("x", "gate")}
    assert turned["x"].stride() == (1, 70)
    for rows in (slice(0, 70), slice(0, 1), slice(17, 18), slice(40, 70)):
        for source in (args, args | turned):
            part = gated_rms_norm(**source | {name: source[name][rows] for name in ("x", "gate")})
            assert part.is_contiguous()
            assert bits(part) == bits(want[rows])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences_of_the_oracle(activation: str, offset: float) -> None:
    attrs = {"activation": activation, "weight_offset": offset, "eps": 0.1}
    values = make_inputs(SPEC, Case("gradient", HEADS, attrs, layout={"gate": "sliced"}))
    rng = np.random.default_rng(0)
    upstream = rng.standard_normal(values["x"].shape)
    args = place(values, "torch", "cpu")
    arrays = {name: args[name].requires_grad_() for name in ("x", "gate", "weight")}
    gated_rms_norm(**args).backward(torch.from_numpy(upstream).float())

    def loss(changed: dict[str, Any]) -> float:
        return float((oracle(NAME).exact(changed)["y"] * upstream).sum())

    for name, tensor in arrays.items():
        direction = rng.standard_normal(values[name].shape)
        step, wide = 1e-5 * direction, values[name].astype(np.float64)
        slope = (loss(values | {name: wide + step}) - loss(values | {name: wide - step})) / 2e-5
        np.testing.assert_allclose((to_numpy(tensor.grad) * direction).sum(), slope, rtol=1e-4)


@pytest.mark.parametrize(("activation", "slopes"), [("silu", [0, 0.5, 1]), ("sigmoid", [0, 0.25, 0])])
def test_the_gradient_of_a_gate_far_from_zero_is_a_number(activation: str, slopes: list[float]) -> None:
    gate = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    gated_rms_norm(torch.ones(3), gate, torch.ones(3), activation=activation).sum().backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == pytest.approx(slopes, abs=1e-6)


def test_the_gradient_of_a_zero_row_is_a_number() -> None:
    x = torch.zeros(4, requires_grad=True)
    gated_rms_norm(x, torch.zeros(4), torch.ones(4), activation="sigmoid").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([500.0] * 4)  # half of 1 / sqrt(eps)


def test_the_result_shares_no_memory() -> None:
    x = torch.ones(1, 4)
    assert gated_rms_norm(x, x, torch.ones(4)).data_ptr() != x.data_ptr()


def test_nothing_is_read_back() -> None:
    """A fake tensor has no values: reading one back raises."""
    values = make_inputs(SPEC, Case("fake", HEADS, {}, {"T": "bfloat16"}))
    with FakeTensorMode() as mode:
        args = place(values, "torch", "cpu")
        args |= {k: mode.from_tensor(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
        y = gated_rms_norm(**args)
    [output] = bind(SPEC, values).outputs
    assert (tuple(y.shape), str(y.dtype).removeprefix("torch.")) == (output.shape, output.dtype)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(gated_rms_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        args = place(make_inputs(SPEC, Case("compiled", {"...": (rows, 2), "V": 24})), "torch", "cpu")
        assert bits(compiled(**args)) == bits(gated_rms_norm(**args))


def test_the_cases_hold_what_hurts() -> None:
    """A gate whose three strides of rows no single dimension could have, and rows of no power of two."""
    [sliced] = [case for case in cases(NAME) if case.name == "gate_sliced-bfloat16"]
    gate = place(make_inputs(SPEC, sliced), "torch", "cpu")["gate"]
    (rows, heads, groups, width), strides = gate.shape, gate.stride()
    assert min(rows, heads, groups) > 1
    assert strides[2] >= width
    assert strides[1] > groups * strides[2]
    assert strides[0] > heads * strides[1]
