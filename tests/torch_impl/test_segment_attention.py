"""`segment_attention` in PyTorch: every case against the oracle, segments kept apart, no host reads off the CPU."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import polyfuse
from polyfuse.conformance import Case, Trial, cases, place
from polyfuse.conformance.cases import model_cases
from polyfuse.dispatch import registry
from polyfuse.spec import SpecError
from polyfuse.spec.segment_attention import NAME
from polyfuse.torch_impl import segment_attention as module

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[16, 512])
def masked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """What devices without a kernel for packed segments run, with blocks of so many rows."""
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param)

    def run(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float | None, max_seqlen: int | None) -> torch.Tensor:
        longest = len(q) if max_seqlen is None else min(max_seqlen, len(q))
        return module.masked(q, k, v, cu_seqlens, longest, q.shape[-1] ** -0.5 if scale is None else scale)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [*cases(NAME), *model_cases(NAME)], ids=lambda case: case.name)
def test_case(case: Case, device: str) -> None:
    assert Trial(NAME, case, 0).on(registry().get("torch"), device) == ("passed", "")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in cases(NAME) if case.dims["rows"]][::4], ids=lambda case: case.name)
def test_masked_case(case: Case, device: str, masked: Callable[..., torch.Tensor]) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    assert trial.check(masked(**place(values, "torch", device)), call) is None


def tensors(*lengths: int, dtype: torch.dtype = torch.float32, dim: int = 16, device: str = "cpu") -> list[Any]:
    """q, k, v of two heads and the boundaries of segments of these lengths."""
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randn(3, sum(lengths), 2, dim, generator=generator).to(device, dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return [*arrays, ends]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("which", range(3), ids="qkv".__getitem__)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.bfloat16, 72)], ids=str)
@pytest.mark.parametrize("form", ["op", "masked"])
def test_what_a_segment_holds_changes_no_bit_of_another(
    form: str, dtype: torch.dtype, dim: int, which: int, value: float, masked: Callable[..., torch.Tensor]
) -> None:
    run = masked if form == "masked" else polyfuse.segment_attention
    given = tensors(9, 20, 4, 7, dtype=dtype, dim=dim)
    before = run(*given, scale=None, max_seqlen=20)
    given[which][9:29] = value
    after = run(*given, scale=None, max_seqlen=20)
    assert torch.equal(after[:9], before[:9])
    assert torch.equal(after[29:], before[29:])
    assert not torch.equal(after[9:29], before[9:29])


class Forbidden(TorchDispatchMode):
    """Fails at every operation that waits for a device's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **kwargs or {})


def test_the_masked_form_reads_nothing(masked: Callable[..., torch.Tensor]) -> None:
    given = tensors(9, 20, 4)
    given[1][3] = float("nan")
    with Forbidden():
        masked(*given, scale=None, max_seqlen=None)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Forbidden():
        module.segment_attention(*given)


def test_max_seqlen_saves_the_scores_of_rows_that_are_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 10)
    sizes: list[int] = []
    softmax = torch.Tensor.softmax

    def counted(scores: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(scores.shape[-1])
        return softmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", counted)
    module.masked(*tensors(4, 5, 5, 5, 5, 5, 1), 5, 0.25)
    assert sizes == [14, 18, 14]


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 16), ("bfloat16", 72), ("float16", 64)])
def test_gradients_are_those_of_plain_attention(dtype: str, dim: int) -> None:
    given = tensors(5, 12, dtype=getattr(torch, dtype), dim=dim)
    leaves = [x.requires_grad_() for x in given[:3]]
    out = polyfuse.segment_attention(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * weight).sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    parts = []
    for own in (slice(0, 5), slice(5, 17)):
        q, k, v = (x[own].transpose(0, 1) for x in wide)
        parts.append(((q @ k.mT * dim**-0.5).softmax(-1) @ v).transpose(0, 1))
    want = torch.autograd.grad((torch.cat(parts) * weight).sum(), wide)
    unit = {"float32": 2.0**-18, "bfloat16": 2.0**-5, "float16": 2.0**-8}[dtype]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=unit, rtol=unit)


def test_a_recorded_graph_has_one_node_and_follows_its_boundaries() -> None:
    q, k, v, ends = tensors(9, 20, 4)

    def step(ends: torch.Tensor) -> torch.Tensor:
        return polyfuse.segment_attention(q, k, v, ends, max_seqlen=33)

    with torch.no_grad():
        graph = make_fx(step, _allow_non_fake_inputs=True)(ends)
        names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert names == [torch.ops.polyfuse.segment_attention.default]
        for lengths in ((9, 20, 4), (1, 1, 31), (33, 0, 0)):
            other = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            assert torch.equal(graph(other), step(other))


def test_it_compiles_with_any_boundaries_and_lengths() -> None:
    def step(q: Any, k: Any, v: Any, ends: Any, longest: int) -> torch.Tensor:
        return polyfuse.segment_attention(q, k, v, ends, scale=0.3, max_seqlen=longest) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((9, 20, 4), (3, 4), (7, 1, 1, 2)):
        given = tensors(*lengths)
        with torch.no_grad():
            assert torch.equal(compiled(*given, max(lengths)), step(*given, max(lengths)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale: expected a finite number > 0, got 0.0"),
        ({"scale": -1.0}, "scale: expected a finite number > 0, got -1.0"),
        ({"scale": float("nan")}, "scale: expected a finite number > 0, got nan"),
        ({"scale": float("inf")}, "scale: expected a finite number > 0, got inf"),
        ({"max_seqlen": -1}, "max_seqlen: expected an integer >= 0, got -1"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens: expected at least 1 element, got 0"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens: expected dtype int32 or int64, got float32"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, r"cu_seqlens: expected shape \[N\], got \[1, 2\]"),
        ({"k": torch.zeros(4, 1, 16)}, r"k: expected heads=2 in \[rows, heads, dim\], got \[4, 1, 16\]"),
        ({"v": torch.zeros(4, 2, 16).half()}, "v: expected dtype float32 as the other T arguments, got float16"),
        ({"q": torch.zeros(4, 32)}, r"q: expected shape \[rows, heads, dim\], got \[4, 32\]"),
        ({"q": torch.zeros(4, 2, 16).double()}, "q: expected dtype float32 or bfloat16 or float16, got float64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(4, 2, 16) for name in "qkv"}
    arguments["cu_seqlens"] = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(SpecError, match=f"^{NAME}: {message}"):
        polyfuse.segment_attention(**arguments | changes)


def test_what_the_kernel_cannot_read_is_copied() -> None:
    buffer = torch.arange(4 * 2 * 64, dtype=torch.bfloat16)
    whole = buffer.view(4, 2, 64)
    for given in (whole, whole[1:], whole[..., 8:40], whole.transpose(0, 1)):
        assert module.aligned(given) is given
    odd = buffer[1:].as_strided((4, 2, 8), (16, 8, 1)), buffer.as_strided((4, 2, 8), (20, 8, 1)), whole[..., ::2]
    for given in odd:
        got = module.aligned(given)
        assert got.data_ptr() % 16 == 0
        assert got.is_contiguous()
        assert got.equal(given)


@gpu
def test_gradients_on_a_gpu_are_those_of_the_formula() -> None:
    *arrays, ends = tensors(5, 1, 20, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.requires_grad_() for x in arrays)
    module.segment_attention(q, k, v, ends).sum().backward()
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    module.segment_attention(*wide, ends).sum().backward()
    for got, want in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=2.0**-6, rtol=2.0**-6, check_dtype=False)


@gpu
@pytest.mark.parametrize("dim", [64, 96, 256])
def test_half_precision_on_a_gpu_is_one_kernel_without_a_read(dim: int) -> None:
    given = tensors(600, 17, 300, dtype=torch.bfloat16, dim=dim, device="cuda")
    module.segment_attention(*given, max_seqlen=600)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.segment_attention(*given, max_seqlen=917)
    for ends in ([0, 600, 617, 917], [0, 1, 2, 917], [0, 0, 0, 0]):
        given[3].copy_(torch.tensor(ends))
        graph.replay()
        used = ends[-1]
        want = module.masked(*(x[:used] for x in given[:3]), given[3], max(used, 1), dim**-0.5) if used else out[:0]
        torch.testing.assert_close(out[:used], want, atol=2.0**-6, rtol=2.0**-6)


def test_the_backend_leaves_the_choice_of_tritons_mode_to_its_own() -> None:
    """On a CPU triton's interpreter must be chosen before triton is imported, and PyTorch's kernel imports triton."""
    code = "import sys, polyfuse.torch_impl.segment_attention; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
