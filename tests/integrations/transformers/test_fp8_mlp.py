"""FP8 MLPs: found by what they compute, fused bit for bit, and left alone where they cannot be.

Transformers takes its FP8 GEMM from the hub, so its function is emulated here: its quantisation as written, and sums in
float64, where those of a block are exact, or PyTorch's `scaled_mm` on a GPU.
"""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import ScalingType, scaled_mm
from transformers.integrations import finegrained_fp8
from transformers.models.glm4.modeling_glm4 import Glm4MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5MLP
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextMLP

import polyfuse
from polyfuse.integrations.transformers import _fp8_mlp
from polyfuse.integrations.transformers._fp8_mlp import block_scaled_mm, fp8_mlps, fuse, is_fused, release

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"))]
FAMILIES = [Qwen3MLP, Qwen3NextMLP, Qwen3_5MLP, Qwen3_5MoeMLP, LlamaMLP, Phi3MLP, Glm4MLP]
HIDDEN, INTERMEDIATE = 256, 640
FP8 = torch.float8_e4m3fn


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows, K] and its scales [rows, K / 128], as the model's kernel computes them."""
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1)
    scale = amax / torch.full_like(amax, 448)
    return (groups / scale.clamp(min=1e-12)[..., None]).clamp(-448, 448).flatten(-2).to(FP8), scale


def emulated_linear(input: Any, weight: Any, weight_scale_inv: Any, block_size: Any = None, **options: Any) -> Any:
    assert tuple(block_size) == (128, 128)
    assert all(value is None or name == "allow_deepgemm" for name, value in options.items())
    q, scale = quantised(input.reshape(-1, input.shape[-1]))
    if input.is_cuda:
        q, scale = (nn.functional.pad(t.view(torch.uint8), (0, 0, 0, -len(t) % 4)).view(t.dtype) for t in (q, scale))
        scale = scale.t().contiguous().t()
        blocks = nn.functional.pad(weight_scale_inv, (0, -weight_scale_inv.shape[1] % 4)).t()
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        out = scaled_mm(q, weight.t(), scale, recipes[0], blocks, recipes[1], output_dtype=input.dtype)
        return out[: input.numel() // input.shape[-1]].view(*input.shape[:-1], len(weight))
    out = torch.zeros(len(q), len(weight))
    for k in range(scale.shape[1]):
        for n in range(0, len(weight), 128):
            part, block = (t[:, 128 * k : 128 * (k + 1)].double() for t in (q, weight[n : n + 128]))
            out[:, n : n + 128] += (part @ block.t()).float() * scale[:, k : k + 1] * weight_scale_inv[n // 128, k]
    return out.to(input.dtype).view(*input.shape[:-1], len(weight))


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the results of the model's FP8 linear function, as it is called."""
    widths: list[int] = []

    def recorded(input: Any, weight: Any, *args: Any, **options: Any) -> Any:
        widths.append(len(weight))
        return emulated_linear(input, weight, *args, **options)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", recorded)
    return widths


def build(cls: type[nn.Module] = Qwen3MLP, device: str = "cpu", **options: Any) -> Any:
    """An MLP with FP8 weights."""
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act="silu", mlp_bias=False)
    mlp: Any = cls(config, INTERMEDIATE) if "Qwen3_5" in cls.__name__ else cls(config)
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"block_size": (128, 128)} | options
    for name, linear in list(mlp.named_children()):
        if isinstance(linear, nn.Linear):
            fp8 = finegrained_fp8.FP8Linear(linear.in_features, linear.out_features, **settings)
            for parameter in fp8.parameters():
                parameter.requires_grad_(False)
            values = torch.randn(fp8.weight.shape, generator=generator) * 100
            fp8.weight.copy_(values.clamp(-448, 448).to(FP8))  # past 464 PyTorch 2.11 gives NaN
            fp8.weight_scale_inv.copy_(torch.rand(fp8.weight_scale_inv.shape, generator=generator) * 1e-3)
            setattr(mlp, name, fp8)
    return mlp.eval().to(device)


def patched(mlp: Any) -> Any:
    fuse(mlp)
    return mlp


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def run(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = mlp(x)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", FAMILIES)
def test_bitwise_equal_to_the_model(cls: type[nn.Module], device: str, calls: list[int]) -> None:
    mlp, x = build(cls, device), sample(3, 5, device=device)
    want = run(mlp, x)
    assert want.abs().amax() > 1
    calls.clear()
    got = run(patched(mlp), x)
    assert torch.equal(got, want)
    assert (got.dtype, got.shape) == (x.dtype, (3, 5, HIDDEN))
    assert calls == [2 * INTERMEDIATE]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 1, 3)])
def test_other_dtypes_and_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mlp, x = build(), sample(*shape, dtype=dtype)
    want = run(mlp, x)
    with torch.inference_mode():
        assert torch.equal(patched(mlp)(x), want)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-6, 1e-12])
def test_small_activations_have_no_floor(size: float) -> None:
    """The scales of `silu_mul_block_quant` end at 4e-6 by default: most of these products would be lost."""
    mlp, x = build(), sample(8) * size
    want = run(mlp, x)
    assert torch.equal(run(patched(mlp), x), want)
    assert want.count_nonzero() == (size > 1e-12) * want.numel()


def test_nan_and_infinity_stay_in_their_rows() -> None:
    mlp, x = build(), sample(6)
    x[1, 3], x[4, 7] = float("nan"), float("inf")
    want = run(mlp, x)
    torch.testing.assert_close(run(patched(mlp), x), want, rtol=0, atol=0, equal_nan=True)
    assert want.isfinite().all(-1).tolist() == [True, False, True, True, False, True]


def test_weights_are_shared_not_copied() -> None:
    mlp = build()
    before = dict(mlp.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    run(patched(mlp), sample(2))
    after = dict(mlp.named_parameters())
    assert all(after[name] is p and torch.equal(p.float(), values[name].float()) for name, p in before.items())
    for kind in ("weight", "weight_scale_inv"):
        gate, up = (getattr(linear, kind).untyped_storage() for linear in (mlp.gate_proj, mlp.up_proj))
        assert gate.data_ptr() == up.data_ptr()
        assert gate.nbytes() == 2 * values[f"gate_proj.{kind}"].nbytes
    assert list(mlp.state_dict()) == list(values)


def replaced(mlp: Any) -> None:
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.roll(1, 0).clone(), requires_grad=False)


def assigned(mlp: Any) -> None:
    mlp.load_state_dict({name: p.roll(1, 0).clone() for name, p in mlp.state_dict().items()}, assign=True)


def written(mlp: Any) -> None:
    with torch.no_grad():
        mlp.gate_proj.weight_scale_inv.mul_(2)
        mlp.down_proj.weight.copy_(mlp.down_proj.weight.roll(1, 0))


@pytest.mark.parametrize("change", [replaced, assigned, written])
def test_changed_weights_are_followed(change: Callable[[Any], None]) -> None:
    plain, mlp, x = build(), patched(build()), sample(4)
    before = run(mlp, x)
    change(plain)
    change(mlp)
    assert torch.equal(run(mlp, x), run(plain, x))
    assert not torch.equal(run(plain, x), before)


def test_a_deep_copy_keeps_the_patch(calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    want = run(mlp, x)
    other = copy.deepcopy(mlp)
    assert other.forward.__self__ is other
    assert fp8_mlps(other) == [other]
    written(mlp)
    calls.clear()
    assert torch.equal(run(other, x), want)
    assert calls == [2 * INTERMEDIATE]


def test_a_saved_module_is_plain_and_can_be_patched(calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    want = run(mlp, x)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert not is_fused(other)
    assert fp8_mlps(other) == [other]
    calls.clear()
    assert torch.equal(run(other, x), want)
    assert torch.equal(run(patched(other), x), want)
    assert calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN, 2 * INTERMEDIATE]


def test_a_released_module_is_as_before(calls: list[int]) -> None:
    mlp, x = build(), sample(2)
    attributes = set(vars(mlp))
    want = run(patched(mlp), x)
    release(mlp)
    assert set(vars(mlp)) == attributes
    assert mlp not in _fp8_mlp._gate_up
    calls.clear()
    assert torch.equal(run(mlp, x), want)
    assert calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


def hooked(mlp: Any) -> None:
    mlp.act_fn.register_forward_hook(lambda *_: None)


def kernelized(mlp: Any) -> None:
    mlp.down_proj.forward = mlp.down_proj.forward


def in_float32(mlp: Any) -> None:
    for name, linear in list(mlp.named_children()):
        if name != "act_fn":
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            setattr(mlp, name, plain)


@pytest.mark.parametrize("change", [hooked, kernelized, in_float32, lambda mlp: mlp.train()])
def test_the_original_runs_where_the_fused_one_cannot(change: Callable[[Any], Any], calls: list[int]) -> None:
    plain, mlp, x = build(), patched(build()), sample(2, dtype=torch.float32)
    want = run(plain, x)
    run(mlp, x)
    calls.clear()
    change(mlp)
    got = run(mlp, x)
    if change is in_float32:
        assert calls == []
    else:
        assert torch.equal(got, want)
        assert calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


def test_the_original_runs_under_grad_by_keyword_and_on_no_rows(calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    assert torch.equal(mlp(x), run(build(), x))
    calls.clear()
    with torch.no_grad():
        mlp(x=x)
        assert mlp(x[:0]).shape == (0, HIDDEN)
    assert calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN] * 2


def test_the_original_is_compiled(calls: list[int]) -> None:
    mlp, x = patched(build()), sample(4)
    want = run(mlp, x)
    calls.clear()
    assert torch.equal(run(torch.compile(mlp, backend="eager", fullgraph=True), x), want)
    assert calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


def test_ten_compiled_mlps_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(input: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return input @ weight.to(input.dtype).t()

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", linear)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda mlp, x: mlp(x), fullgraph=True, backend=counter)
    mlp, x = build(), sample(4, dtype=torch.float32)
    for _ in range(10):
        mlp = patched(copy.deepcopy(mlp))
        replaced(mlp)
        with torch.no_grad():
            assert torch.equal(compiled(mlp, x), type(mlp).forward(mlp, x))
    assert counter.frame_count == 1


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class TwoInputs(LlamaMLP):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(y))


class Swapped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Branching(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) if x.sum() > 0 else x


class OtherOrder(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


def gelu() -> Any:
    mlp = build()
    mlp.act_fn = nn.GELU()
    return mlp


def changed(change: Callable[[Any], None]) -> Any:
    mlp = build()
    change(mlp)
    return mlp


def test_every_mlp_of_a_model_is_found() -> None:
    inner, outer = build(), build(OtherOrder)
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(outer, nn.Linear(2, 2)), "c": gelu()})
    assert fp8_mlps(model) == [inner, outer]
    patched(inner)
    assert fp8_mlps(model) == [inner, outer]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda cls=cls: build(cls) for cls in (Clamped, TwoInputs, Swapped, Branching)),
        gelu,
        lambda: build(has_bias=True),
        lambda: build(activation_scheme="static"),
        lambda: build(block_size=(64, 128)),
        lambda: build(scale_fmt="ue8m0"),
        lambda: changed(hooked),
        lambda: changed(kernelized),
        lambda: changed(in_float32),
        lambda: nn.Sequential(nn.Linear(4, 4)),
    ],
)
def test_what_is_not_found(make: Callable[[], Any]) -> None:
    assert fp8_mlps(make()) == []


@pytest.mark.parametrize(("rows", "columns"), [(4, 128), (12, 512), (8, 640)])
def test_scaled_mm_takes_these_layouts(rows: int, columns: int) -> None:
    """PyTorch's own checks of shapes and strides, on tensors without data."""
    with torch.device("meta"):
        x = torch.empty(rows, 2 * columns, dtype=torch.bfloat16)
        weight, weight_scale = torch.empty(256, columns, dtype=FP8), torch.empty(2, columns // 128)
    real = polyfuse.silu_mul_block_quant(torch.ones(x.shape), scale_layout="col_major", scale_min=0)
    q, scale = (t.to("meta") for t in real)
    assert scale.stride() == (1, rows)
    out = block_scaled_mm(q, scale, weight, weight_scale, torch.bfloat16)
    assert (out.shape, out.dtype) == ((rows, 256), torch.bfloat16)
    if columns > 128:
        with pytest.raises(RuntimeError, match="1x128 x 128x128 blockwise scaling"):
            block_scaled_mm(q, scale.contiguous(), weight, weight_scale, torch.bfloat16)


@pytest.mark.parametrize(
    ("cuda", "capability", "expected"),
    [("13.0", (9, 0), True), ("12.9", (9, 0), True), ("12.8", (9, 0), False), ("13.0", (10, 0), False)],
)
def test_only_hopper_has_these_scales(
    cuda: str, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_scaled_mm = _fp8_mlp._has_scaled_mm.__wrapped__
    assert has_scaled_mm(torch.device("cuda")) is expected
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not has_scaled_mm(torch.device("cuda"))
