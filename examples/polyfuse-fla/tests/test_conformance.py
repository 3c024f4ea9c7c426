"""`gated_delta_rule` against the oracle, on a GPU: what is claimed is right, and skips have a declared reason."""

from importlib.util import find_spec

import pytest
import torch

import polyfuse
from polyfuse.conformance import run
from polyfuse.spec import Unsupported

pytestmark = [
    pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DECLARED = (
    *(f"unsupported: q.dtype={dtype}" for dtype in ("float32", "float16")),
    *("unsupported: K=", "unsupported: V=", "more output elements than"),
)
DIMS = {"q": (4, 64), "k": (4, 64), "v": (8, 64), "g": (8,), "beta": (8,)}


def made(rows: int) -> dict[str, torch.Tensor]:
    """Arguments of so many rows, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    arguments = {name: torch.randn(rows, *dims, generator=generator) for name, dims in DIMS.items()}
    arguments |= {name: torch.nn.functional.normalize(arguments[name], dim=-1) for name in "qk"}
    arguments |= {"g": -arguments["g"].abs(), "beta": arguments["beta"].sigmoid()}
    return {name: x.cuda() if name in ("g", "beta") else x.bfloat16().cuda() for name, x in arguments.items()}


def test_op_conforms():
    report = run(["gated_delta_rule"], ["fla"], level="standard", device="cuda")
    assert report.ok, [(r.case, r.detail) for r in report.results if r.status == "failed"]
    skipped = [r.detail for r in report.results if r.status == "skipped"]
    assert all(detail.startswith(DECLARED) for detail in skipped), skipped


def test_boundaries_changed_in_place_are_read_again():
    ends = torch.tensor([0, 70, 200], device="cuda")
    polyfuse.gated_delta_rule(**made(200), cu_seqlens=ends, backend="fla")
    ends.copy_(torch.tensor([0, 5, 200]))
    o, _ = polyfuse.gated_delta_rule(**made(200), cu_seqlens=ends, backend="fla")
    want, _ = polyfuse.gated_delta_rule(**made(200), cu_seqlens=ends.clone(), backend="fla")
    assert torch.equal(o, want)


def test_packed_sequences_are_declined_in_a_capture_and_one_sequence_is_captured():
    arguments, ends = made(200), torch.tensor([0, 200], device="cuda")
    want, _ = polyfuse.gated_delta_rule(**arguments, backend="fla")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(Unsupported, match="in the capture of a CUDA graph"):
            polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, backend="fla")
        o, _ = polyfuse.gated_delta_rule(**arguments, backend="fla")
    graph.replay()
    assert torch.equal(o, want)
