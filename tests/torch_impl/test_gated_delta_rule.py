"""`gated_delta_rule` in PyTorch: every case against the oracle, sequences kept apart, no host reads, bad calls."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import polyfuse
from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.dispatch import registry
from polyfuse.spec import SpecError, Unsupported
from polyfuse.spec.gated_delta_rule import NAME
from polyfuse.torch_impl import gated_delta_rule as module
from polyfuse.torch_impl.gated_delta_rule import gated_delta_rule

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [*cases(NAME), *model_cases(NAME)]
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 8 else []) for n, case in enumerate(CASES)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_case(case: Case, device: str) -> None:
    assert Trial(NAME, case, 0).on(registry().get("torch"), device) == ("passed", "")


@pytest.mark.parametrize("block", [0, 1, 3, 16])
@pytest.mark.parametrize("seed", range(6))
def test_any_boundaries(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of 64 rows: lengths around them, empty sequences, and rows of no sequence; some at a time, or all."""
    if block:
        monkeypatch.setattr(module, "block_of", lambda slots, device: block)
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 0, 1, 7, 63, 64, 65, 127, 128, 129], 9)
    ends = tuple(int(n) for n in rng.integers(0, 140) + np.cumsum([0, *lengths]))
    sizes = {"L": ends[-1] + int(rng.integers(0, 70)), "H": 1, "HV": 1, "K": 4, "V": 3, "N": 10, "S": 9}
    case = Case(
        f"boundaries_{seed}",
        sizes,
        {"output_final_state": True},
        host={"cu_seqlens": ends},
        as_tensor=("cu_seqlens",),
        present=("initial_state", "cu_seqlens"),
        fill={"q": "unit", "k": "unit", "g": "decay", "beta": "gate"},
    )
    assert Trial(NAME, case, 0).on(registry().get("torch")) == ("passed", "")


def tensors(*lengths: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Arguments of 2 key heads and 4 value heads, with states and the boundaries of sequences of these lengths."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows = sum(lengths)
    unit = torch.nn.functional.normalize
    given = {"q": unit(normal(rows, 2, 16), dim=-1), "k": unit(normal(rows, 2, 16), dim=-1), "v": normal(rows, 4, 8)}
    given = {name: part.to(dtype) for name, part in given.items()}
    given |= {"g": -normal(rows, 4).abs(), "beta": normal(rows, 4).sigmoid()}
    given |= {"initial_state": normal(len(lengths), 4, 16, 8)}
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return given | {"cu_seqlens": ends, "output_final_state": True}


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_has_the_same_bits_in_every_batch(device: str) -> None:
    lengths = [70, 1, 64, 200, 9]
    given = tensors(*lengths, device=device)
    o, last = gated_delta_rule(**given)
    begin = 0
    for number, length in enumerate(lengths):
        own = slice(begin, begin + length)
        alone = given | {name: given[name][own] for name in ("q", "k", "v", "g", "beta")}
        alone |= {"initial_state": given["initial_state"][number : number + 1]}
        alone |= {"cu_seqlens": given["cu_seqlens"].new_tensor([0, length])}
        for got, want in zip(gated_delta_rule(**alone), (o[own], last[number : number + 1]), strict=True):
            assert torch.equal(got, want)
        begin += length


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_what_a_sequence_holds_changes_no_bit_of_another(name: str, value: float) -> None:
    given = tensors(9, 70, 0, 7)
    before = gated_delta_rule(**given)
    given[name][1 if name == "initial_state" else slice(9, 79)] = value
    after = gated_delta_rule(**given)
    assert torch.equal(after[0][:9], before[0][:9])
    assert torch.equal(after[0][79:], before[0][79:])
    assert not torch.equal(after[0][9:79], before[0][9:79])
    for sequence in (0, 2, 3):
        assert torch.equal(after[1][sequence], before[1][sequence])


def test_empty_sequences_keep_their_state_to_the_bit() -> None:
    given = tensors(0, 5, 0, 0)
    given["initial_state"][2, 1, 3, 4] = float("nan")
    _, state = gated_delta_rule(**given)
    for sequence in (0, 2, 3):
        torch.testing.assert_close(state[sequence], given["initial_state"][sequence], rtol=0, atol=0, equal_nan=True)


def test_a_packed_sequence_is_that_sequence_alone() -> None:
    given = tensors(70, 3, 130)
    o, state = gated_delta_rule(**given)
    for number, (start, end) in enumerate([(0, 70), (70, 73), (73, 203)]):
        alone = {name: part[start:end] for name, part in given.items() if name in ("q", "k", "v", "g", "beta")}
        first = given["initial_state"][number : number + 1]
        own, last = gated_delta_rule(**alone, initial_state=first, output_final_state=True)
        torch.testing.assert_close(own, o[start:end], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[0], state[number], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_a_sequence_goes_on_from_its_final_state(cut: int) -> None:
    given = tensors(150)
    o, state = gated_delta_rule(**given)
    arrays = {name: given[name] for name in ("q", "k", "v", "g", "beta")}
    head, middle = gated_delta_rule(
        **{name: part[:cut] for name, part in arrays.items()},
        initial_state=given["initial_state"],
        output_final_state=True,
    )
    tail, last = gated_delta_rule(
        **{name: part[cut:] for name, part in arrays.items()}, initial_state=middle, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([head, tail]), o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


class Forbidden(TorchDispatchMode):
    """Fails at every operation that waits for a device's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **kwargs or {})


def test_nothing_is_read_back() -> None:
    given = tensors(9, 70, 0, 4)
    given["g"][3] = float("-inf")
    with Forbidden():
        gated_delta_rule(**given)
        gated_delta_rule(**given | {"cu_seqlens": None, "initial_state": given["initial_state"][:1]})


def test_a_recorded_graph_has_one_node_and_follows_its_boundaries() -> None:
    given = tensors(9, 70, 4)

    def step(ends: torch.Tensor) -> Any:
        return tuple(polyfuse.gated_delta_rule(**given | {"cu_seqlens": ends}))

    with torch.no_grad():
        graph = make_fx(step, _allow_non_fake_inputs=True)(given["cu_seqlens"])
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in names if "getitem" not in name] == ["polyfuse.gated_delta_rule.default"]
        for lengths in ((9, 70, 4), (1, 1, 81), (83, 0, 0)):
            other = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            for one, two in zip(graph(other), step(other), strict=True):
                assert torch.equal(one, two)


def test_it_compiles_with_any_lengths() -> None:
    def step(**given: Any) -> Any:
        o, state = polyfuse.gated_delta_rule(**given)
        return o * 2, state

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((9, 20, 4), (3, 70), (7, 1, 1, 2)):
        given = tensors(*lengths)
        with torch.no_grad():
            for one, two in zip(compiled(**given), step(**given), strict=True):
                assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["q", "v", "g", "initial_state"])
def test_gradients_are_refused(name: str) -> None:
    given = tensors(5)
    given[name].requires_grad_()
    with pytest.raises(Unsupported, match="requires grad"):
        polyfuse.gated_delta_rule(**given, backend="torch")
    with torch.no_grad():
        assert not polyfuse.gated_delta_rule(**given).o.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale: expected a finite number > 0, got 0.0"),
        ({"scale": float("nan")}, "scale: expected a finite number > 0, got nan"),
        ({"v": torch.zeros(4, 3, 8)}, r"v: expected HV divisible by H=2 in \[L, HV, V\], got 3"),
        ({"v": torch.zeros(4, 4, 8).half()}, "v: expected dtype float32 as the other T arguments, got float16"),
        ({"g": torch.zeros(4, 4).bfloat16()}, "g: expected dtype float32, got bfloat16"),
        ({"beta": torch.zeros(4, 2)}, r"beta: expected HV=4 in \[L, HV\], got \[4, 2\]"),
        ({"k": torch.zeros(4, 2, 8)}, r"k: expected K=16 in \[L, H, K\], got \[4, 2, 8\]"),
        ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, "cu_seqlens: expected at least 2 elements, got 1"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens: expected dtype int32 or int64, got float32"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, r"initial_state: expected S=1 in \[S, HV, K, V\], got \[2, 4"),
        ({"initial_state": torch.zeros(1, 4, 8, 16)}, r"initial_state: expected K=16 in \[S, HV, K, V\], got \[1, 4"),
        ({"initial_state": torch.zeros(1, 4, 16, 8).half()}, "initial_state: expected dtype float32, got float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": torch.zeros(4, 2, 16), "k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 4, 8)}
    arguments |= {"g": torch.zeros(4, 4), "beta": torch.zeros(4, 4)}
    if "v" in changes and changes["v"].shape[1] == 3:
        arguments |= {"g": torch.zeros(4, 3), "beta": torch.zeros(4, 3)}
    with pytest.raises(SpecError, match=f"^{NAME}: {message}"):
        polyfuse.gated_delta_rule(**arguments | changes)


@gpu
def test_a_graph_on_a_gpu_follows_its_boundaries() -> None:
    given = tensors(60, 140, 17, dtype=torch.bfloat16, device="cuda")
    gated_delta_rule(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_delta_rule(**given)
    for ends in ([0, 60, 200, 217], [0, 1, 2, 217], [5, 5, 5, 100]):
        given["cu_seqlens"].copy_(torch.tensor(ends))
        graph.replay()
        for one, two in zip(captured, gated_delta_rule(**given), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
