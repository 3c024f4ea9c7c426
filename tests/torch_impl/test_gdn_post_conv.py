from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.conformance import Case, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.reference.gdn_post_conv import sigmoid, softplus
from polyfuse.spec import OPS, bind
from polyfuse.torch_impl.gdn_post_conv import gdn_post_conv

exact = oracle("gdn_post_conv").intervals

SPEC = OPS["gdn_post_conv"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEADS = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
SMALL = {"num_k_heads": 2, "head_k_dim": 6, "head_v_dim": 4}
BF16: dict[str, str] = dict.fromkeys(("T", "a", "b", "A_log", "dt_bias"), "bfloat16")
TOKENS_ADJACENT: dict[str, str] = dict.fromkeys(("conv_out", "a", "b"), "token_stride_1")
CASES = [
    *(case for case in cases(SPEC.name) if case.repeat == 1),
    Case("qwen3_5_35b", {"L": 3, "HV": 32}, HEADS, BF16),
    Case("qwen3_5_397b", {"L": 2, "HV": 64}, HEADS, BF16),
    Case("qwen3_next_80b-as_transformers", {"L": 37, "HV": 32}, HEADS, BF16, layout=TOKENS_ADJACENT),
    Case("no_value_heads", {"L": 5, "HV": 0}, SMALL, BF16),
    Case("least_eps", {"L": 5, "HV": 2}, SMALL | {"l2norm_eps": 1e-60}, fill={"conv_out": "zeros"}),
]


def arguments(values: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """What the dispatcher passes."""
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_and_leaves_its_inputs(case: Case, device: str) -> None:
    values = make_inputs(SPEC, case)
    args = arguments(values, device)
    before = {k: bits(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
    results = gdn_post_conv(**args)
    wanted = exact(**values)
    for output, result in zip(bind(SPEC, values).outputs, results, strict=True):
        assert compare(output.name, to_numpy(result), wanted[output.name], output.dtype) is None
        assert result.is_contiguous()
    assert {k: bits(args[k]) for k in before} == before


@pytest.mark.parametrize("l2norm", [True, False])
def test_rows_do_not_depend_on_batch_or_layout(l2norm: bool) -> None:
    case = Case("rows", {"L": 70, "HV": 6}, {"num_k_heads": 3, "head_k_dim": 96, "head_v_dim": 64, "l2norm": l2norm})
    args = arguments(make_inputs(SPEC, case))
    tokens = ("conv_out", "a", "b")
    want = gdn_post_conv(**args)
    columns_first: dict[str, Any] = {name: args[name].t().contiguous().t() for name in tokens}
    assert columns_first["conv_out"].stride() == (1, 70)
    for rows in (slice(0, 70), slice(0, 1), slice(17, 18), slice(40, 70)):
        for source in (args, args | columns_first):
            some: dict[str, Any] = {name: source[name][rows] for name in tokens}
            part = gdn_post_conv(**source | some)
            for result, whole in zip(part, want, strict=True):
                assert bits(result) == bits(whole[rows])


@pytest.mark.parametrize("l2norm", [True, False])
def test_results_share_no_memory(l2norm: bool) -> None:
    """With one row every part of conv_out is contiguous: still none may be a view of it."""
    args = arguments(make_inputs(SPEC, Case("one", {"L": 1, "HV": 2}, SMALL | {"l2norm": l2norm})))
    everything = [x for x in args.values() if isinstance(x, torch.Tensor)] + list(gdn_post_conv(**args))
    assert len({x.untyped_storage().data_ptr() for x in everything}) == 10


@pytest.mark.parametrize("device", DEVICES)
def test_gates_are_accurate_on_the_whole_line(device: str) -> None:
    """Relative error within 2**-24 * (8 + 2 * |x|): the rounding of x * log2(e) in an exponential grows with |x|."""
    x = np.linspace(-87, 87, 64 * 4096, dtype=np.float32)
    a = torch.from_numpy(x).view(-1, 64).to(device)
    conv_out, zero = torch.zeros(len(a), 66, device=device), torch.zeros(64, device=device)
    *_, g, beta = gdn_post_conv(conv_out, a, a, zero, zero, num_k_heads=1, head_k_dim=1, head_v_dim=1)
    wide = x.astype(np.float64)
    for got, want in ((g, -softplus(wide)), (beta, sigmoid(wide))):
        error = np.abs(to_numpy(got).astype(np.float64).ravel() / want - 1)
        assert np.max(error / (8 + 2 * np.abs(wide))) < 2.0**-24


@pytest.mark.parametrize("output_g_exp", [False, True])
@pytest.mark.parametrize("l2norm", [False, True])
def test_gradients_agree_with_finite_differences_of_the_oracle(l2norm: bool, output_g_exp: bool) -> None:
    flags = {"l2norm": l2norm, "output_g_exp": output_g_exp}
    values = make_inputs(SPEC, Case("gradient", {"L": 4, "HV": 4}, SMALL | flags))
    rng = np.random.default_rng(0)
    upstream = {name: rng.standard_normal(result.value.shape) for name, result in exact(**values).items()}
    args = arguments(values)
    for x in args.values():
        if isinstance(x, torch.Tensor):
            x.requires_grad_()
    results = gdn_post_conv(**args)
    torch.autograd.backward(results, [torch.from_numpy(u).float() for u in upstream.values()])

    def loss(changed: dict[str, Any]) -> float:
        return sum(float((oracle(SPEC.name).exact(changed)[name] * u).sum()) for name, u in upstream.items())

    for name in ("conv_out", "a", "b", "A_log", "dt_bias"):
        direction = rng.standard_normal(values[name].shape)
        step = 1e-5 * direction
        wide = values[name].astype(np.float64)
        slope = (loss(values | {name: wide + step}) - loss(values | {name: wide - step})) / 2e-5
        np.testing.assert_allclose((to_numpy(args[name].grad) * direction).sum(), slope, rtol=1e-4)


def test_the_gradient_of_softplus_at_zero_is_a_half() -> None:
    a, zero = torch.zeros(1, 1, requires_grad=True), torch.zeros(1)
    g = gdn_post_conv(torch.zeros(1, 3), a, a, zero, zero, num_k_heads=1, head_k_dim=1, head_v_dim=1)[3]
    g.sum().backward()
    assert a.grad is not None
    assert a.grad.item() == -0.5


def test_nothing_is_read_back() -> None:
    """A fake tensor has no values: reading one back raises."""
    values = make_inputs(SPEC, Case("fake", {"L": 5, "HV": 4}, SMALL, BF16))
    with FakeTensorMode() as mode:
        args = arguments(values)
        args |= {k: mode.from_tensor(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
        results = gdn_post_conv(**args)
    described = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in results]
    assert described == [(output.shape, output.dtype) for output in bind(SPEC, values).outputs]


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(gdn_post_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        args = arguments(make_inputs(SPEC, Case("compiled", {"L": length, "HV": 4}, SMALL, BF16)))
        for result, want in zip(compiled(**args), gdn_post_conv(**args), strict=True):
            assert bits(result) == bits(want)
