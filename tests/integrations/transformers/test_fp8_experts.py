"""FP8 experts: fused to the bit of the written-out path, and left alone where they cannot be."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("transformers")

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts

import polyfuse
from polyfuse.integrations.transformers import _fp8_experts, accelerate, report, restore
from polyfuse.integrations.transformers._fp8_experts import NAME, _why_not, fp8_experts, why_not
from tests.integrations.transformers.fp8_experts_models import (
    CHOSEN,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    build,
    experts_of,
    patched,
    run,
    sample,
    written_out,
)
from tests.triton_impl.helpers import DEVICE

pytestmark = pytest.mark.usefixtures("fp8_calls")

GEMM = "written-out products on the CPU, expert by expert"


def fused(**options: Any) -> Any:
    """The experts of the first layer of a model whose experts are fused."""
    return experts_of(patched(build(**options)))


def part_of(experts: Any) -> Any:
    """What the report says of experts alone."""
    (part,) = report(experts).parts
    return part


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_bitwise_equal_to_transformers_and_to_the_written_out_path(
    family: str, tokens: int, fp8_calls: list[int]
) -> None:
    model, call = build(family), sample(tokens)
    experts = experts_of(model)
    want = run(experts, *call)
    assert want.abs().amax() > 0.01
    assert torch.equal(want, written_out(experts, *call))
    patched(model)
    fp8_calls.clear()
    got = run(experts, *call)
    assert torch.equal(got, want)
    assert (got.dtype, got.shape) == (torch.bfloat16, (tokens, HIDDEN))
    assert fp8_calls == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    call = sample(5, dtype=dtype)
    assert torch.equal(run(fused(), *call), written_out(experts_of(build()), *call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 37])
def test_on_triton_only_the_order_of_sums_differs(tokens: int, dtype: torch.dtype) -> None:
    """A last bit of either product may differ, and with it a value between the two by a step of e4m3."""
    pytest.importorskip("triton")
    x, chosen, weights = sample(tokens, dtype=dtype)
    chosen[0, 1] = EXPERTS  # is on another device
    experts = fused().to(DEVICE)
    with polyfuse.use_backend("triton"):
        got = run(experts, *(tensor.to(DEVICE) for tensor in (x, chosen, weights))).cpu()
        assert part_of(experts).gemm == "a Triton kernel, all experts in one launch"
    want = written_out(experts.cpu(), x, chosen, weights)
    assert want.abs().amax() > 0.01
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * float(want.abs().amax()))
    assert part_of(experts).fused_calls == 1


def test_a_float32_routing_is_rounded_as_the_model_rounds_it() -> None:
    x, chosen, weights = sample(9)
    call = x, chosen, weights.float() * 1.001
    assert torch.equal(run(fused(), *call), run(experts_of(build()), *call))


def test_more_experts_to_a_token_are_summed_in_the_order_of_the_implementation() -> None:
    x, chosen, weights = sample(64, chosen=EXPERTS, dtype=torch.float32)  # where the order shows
    by_number = run(fused(), x, chosen, weights)
    assert torch.equal(by_number, run(experts_of(build()), x, chosen, weights))
    by_rank = run(fused(implementation="grouped_mm"), x, chosen, weights)
    assert torch.equal(by_rank, written_out(experts_of(build()), x, chosen, weights))
    assert not torch.equal(by_number, by_rank)


def test_empty_experts_and_one_that_has_all() -> None:
    x, chosen, weights = sample(6)
    experts = fused()
    for chosen_now in (torch.full_like(chosen, 3), chosen.clamp(max=0), torch.full_like(chosen, EXPERTS - 1)):
        call = x, chosen_now, weights
        assert torch.equal(run(experts, *call), written_out(experts, *call))


def test_experts_of_other_devices_add_nothing() -> None:
    """Expert parallelism gives them the number after the last."""
    x, chosen, weights = sample(6)
    chosen[2, 1], chosen[4] = EXPERTS, EXPERTS
    experts = fused()
    got = run(experts, x, chosen, weights)
    assert torch.equal(got, written_out(experts, x, chosen, weights))
    assert torch.equal(got, run(experts_of(build()), x, chosen, weights))
    assert not got[4].any()
    assert not run(experts, x, torch.full_like(chosen, EXPERTS), weights).any()


def test_nan_and_infinity_stay_with_their_tokens() -> None:
    x, chosen, weights = sample(6)
    x[1, 3], x[4, 7] = float("nan"), float("inf")
    got = run(fused(), x, chosen, weights)
    torch.testing.assert_close(got, run(experts_of(build()), x, chosen, weights), rtol=0, atol=0, equal_nan=True)
    assert got.isfinite().all(-1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-8])
def test_small_activations_have_no_floor(size: float) -> None:
    x, chosen, weights = sample(4)
    call = x * size, chosen, weights
    assert torch.equal(run(fused(), *call), run(experts_of(build()), *call))


def test_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is quantised once, and only rows that an expert has are quantised after the first product."""
    seen: list[tuple[str, int]] = []
    for name in ("block_quant", "silu_mul_block_quant"):
        real = getattr(polyfuse, name)

        def recorded(x: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            seen.append((name, len(x)))
            assert name == "block_quant" or (options["materialize"] and options["expert_ends"][-1] == len(x))
            return real(x, **options)

        monkeypatch.setattr(polyfuse, name, recorded)
    x, chosen, weights = sample(7)
    run(fused(), x, chosen, weights)
    assert seen == [("block_quant", 7), ("silu_mul_block_quant", chosen.numel())]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models(family: str) -> None:
    model, ids = build(family), torch.arange(1, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        patched(model)
        assert torch.equal(model(ids).logits, want)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    parts = report(model).parts
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(4)]
    assert [part.name for part in parts if part.kind == "fp8_experts"] == names
    for part in parts:
        if part.kind == "fp8_experts":
            assert (part.fused, part.reason, part.unfused_calls, part.gemm) == (True, "", {}, GEMM)
            assert part.fused_calls == 1 + 4
    assert GEMM.split(",")[0] in " ".join(str(report(model)).split())


def test_accelerate_takes_them_where_they_are_one_launch() -> None:
    model = accelerate(build())
    assert {part.kind for part in report(model).parts if part.fused} == {"gated_delta_net"}
    assert part_of(experts_of(model)).reason == f"products are {GEMM} on cpu: parts has to name it"
    accelerate(model, parts=["fp8_experts"])
    assert {part.kind for part in report(model).parts if part.fused} == {"gated_delta_net", "fp8_experts"}
    pytest.importorskip("triton")
    with polyfuse.use_backend("triton"):
        model = accelerate(build().to(DEVICE))
    assert {part.kind for part in report(model).parts if part.fused} == {"gated_delta_net", "fp8_experts"}


def test_a_model_whose_kernel_is_not_there_runs_fused() -> None:
    """Transformers takes the kernel of its default from the hub."""
    model, call = build(implementation="grouped_mm"), sample(3)
    experts = experts_of(model)
    with pytest.raises(ImportError, match="kernel"):
        run(experts, *call)
    patched(model)
    assert torch.equal(run(experts, *call), written_out(experts, *call))


def test_restore_undoes_it(fp8_calls: list[int]) -> None:
    model = build()
    experts, call = experts_of(model), sample(1)
    attributes, settings = set(vars(experts)), dict(vars(model.config))
    want = run(patched(model).model.layers[0].mlp.experts, *call)
    assert dict(vars(model.config)) == settings
    restore(model)
    assert set(vars(experts)) == attributes
    fp8_calls.clear()
    assert torch.equal(run(experts, *call), want)
    assert fp8_calls == [2 * INTERMEDIATE, HIDDEN] * CHOSEN
    assert (part_of(experts).fused, part_of(experts).reason) == (False, "not accelerated")


def test_copies_are_fused_and_pickles_are_plain(fp8_calls: list[int]) -> None:
    experts, call = fused(), sample(2)
    want = run(experts, *call)
    other = copy.deepcopy(experts)
    assert other.forward.__self__ is other
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        experts.down_proj.copy_(experts.down_proj.roll(1, 0))
    fp8_calls.clear()
    assert torch.equal(run(other, *call), want)
    assert fp8_calls == []
    assert torch.equal(run(loaded, *call), want)
    assert fp8_calls
    assert not torch.equal(run(experts, *call), want)
    assert torch.equal(run(experts, *call), written_out(experts, *call))


def replaced(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.roll(1, 0).clone(), requires_grad=False)


def scaled(experts: Any) -> None:
    with torch.no_grad():
        experts.gate_up_proj_scale_inv.mul_(2)


@pytest.mark.parametrize("change", [replaced, scaled])
def test_changed_weights_are_followed(change: Callable[[Any], None]) -> None:
    experts, call = fused(), sample(4)
    before = run(experts, *call)
    change(experts)
    assert not torch.equal(run(experts, *call), before)
    assert torch.equal(run(experts, *call), written_out(experts, *call))


def hooked(experts: Any) -> None:
    experts.act_fn.register_forward_hook(lambda *_: None)


def doubled(experts: Any) -> None:
    experts._apply_gate = lambda x: 2 * FP8Experts._apply_gate(experts, x)


def doubled_linear(experts: Any) -> None:
    experts.linear = lambda *args, **options: 2 * FP8Experts.linear(experts, *args, **options)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() * 2).clamp(-448, 448).to(weight.dtype)


def parametrised(experts: Any) -> None:
    register_parametrization(experts, "down_proj", Doubled(), unsafe=True)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (lambda e: e.train(), "the module is in training mode"),
    "hooks": (hooked, "act_fn has hooks"),
    "activation": (lambda e: setattr(e, "act_fn", nn.GELU()), "their activation is GELU"),
    "limit": (lambda e: setattr(e, "limit", 0.01), "their gate has limit=0.01"),
    "parametrised": (parametrised, "they are of another class, ParametrizedFP8Experts"),
    "gate": (doubled, "they have another gate"),
    "linear": (doubled_linear, "they have another linear"),
    "dispatch": (
        lambda e: setattr(e.config, "_experts_implementation", "mine"),
        "the config asks for the experts ",
    ),
    "weights": (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.bfloat16())), "down_proj is torch.bfloat16"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_experts_take_their_own_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "mine", lambda self, x, *_: 3 * x)
    change, reason = CHANGES[name]
    experts, plain, call = fused(), experts_of(build()), sample(4)
    for module in (experts, plain):
        change(module)
    assert torch.equal(run(experts, *call), run(plain, *call))
    (found,) = part_of(experts).unfused_calls
    assert found.startswith(reason)
    if name not in ("training",):
        assert part_of(experts).reason.startswith(reason)
        assert not part_of(experts).fused
        assert why_not(plain).startswith(reason)


def test_another_function_under_a_known_name_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda self, x, *_: 3 * x)
    experts, call = fused(), sample(2)
    experts.config._experts_implementation = "grouped_mm"
    assert torch.equal(run(experts, *call), 3 * call[0])
    assert part_of(experts).reason == "somebody has registered another experts implementation grouped_mm"


def test_calls_that_take_their_own_path() -> None:
    experts, (x, chosen, weights) = fused(), sample(3)
    want = run(experts, x, chosen, weights)
    assert torch.equal(experts(x, chosen, weights), want)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            experts(x, chosen, weights)
        assert experts(x[:0], chosen[:0], weights[:0]).shape == (0, HIDDEN)
        assert torch.equal(experts(x, top_k_weights=weights, top_k_index=chosen), want)
        with pytest.raises(TypeError):
            experts(x, chosen)
    part = part_of(experts)
    assert part.fused_calls == 2
    assert part.unfused_calls == {
        "gradients are recorded": 1,
        "autocast is on": 1,
        "there are no tokens": 1,
        "it has other arguments than hidden_states, top_k_index, top_k_weights": 1,
    }


def test_calls_on_other_devices_and_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (_, chosen, weights) = experts_of(build()), sample(3)
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    found = {"experts_gemm_for": "", "reads_ends": True}
    for name in found:
        monkeypatch.setattr(_fp8_experts, name, lambda device, dtype, name=name: found[name])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        assert _why_not(experts, x, chosen, weights) == "no block-scaled GEMM for torch.float16 on cuda"
        found["experts_gemm_for"] = "a GEMM"
        assert _why_not(experts, x, chosen, weights).startswith("it is captured in a graph, and the host has to know")
        found["reads_ends"] = False
        assert _why_not(experts, x, chosen, weights) == "it has tensors of other classes than torch.Tensor"
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(array) for array in sample(3)]
        assert _why_not(experts, *fakes) == "it has tensors of other classes than torch.Tensor"
        assert _why_not(experts, *sample(3)) == ""
        assert _why_not(experts, sample(3)[0], chosen[0], weights[0]).startswith("it is not of tokens [T, hidden]")


@pytest.mark.parametrize(
    "options",
    [
        {"weight_block_size": (64, 128)},
        {"activation_scheme": "static"},
        {"scale_fmt": "ue8m0"},
        {"weight_block_size": None},
    ],
)
def test_what_is_not_found(options: dict[str, Any]) -> None:
    model = build(**options)
    assert not fp8_experts(model)
    with pytest.raises(polyfuse.SpecError, match="FP8 experts in it"):
        patched(model)


def test_a_gate_that_is_not_known_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of Transformers may have it."""

    def gate(self: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.tanh(self.act_fn(first)) * second

    gate.__module__ = FP8Experts.__module__
    monkeypatch.setattr(FP8Experts, "_apply_gate", gate)
    model = build()
    assert not fp8_experts(model)
    assert why_not(experts_of(model)) == "their gate is not SiLU of one half times the other"


def test_chosen_by_name() -> None:
    model, call = build(), sample(5)
    want = run(experts_of(model), *call)
    model.set_experts_implementation(NAME)
    experts = experts_of(model)
    assert torch.equal(run(experts, *call), want)
    part = part_of(experts)
    assert (part.fused, part.fused_calls, part.unfused_calls, part.gemm) == (True, 1, {}, GEMM)


@pytest.mark.parametrize("accelerated", [False, True])
def test_chosen_by_name_another_gate_runs_as_the_default(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = build(), sample(5)
    model.set_experts_implementation(NAME)
    experts = experts_of(patched(model) if accelerated else model)
    experts.limit = 7.0
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda self, x, *_: 3 * x)
    assert torch.equal(run(experts, *call), 3 * call[0])
    assert part_of(experts).unfused_calls == {"their gate has limit=7.0": 1}


def test_compiled_the_original_runs(fp8_calls: list[int]) -> None:
    experts, call = fused(), sample(2)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(experts, backend="eager"), *call), written_out(experts, *call))
    assert fp8_calls
