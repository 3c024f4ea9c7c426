"""The passes in Inductor: compiled modules, other people's passes, settings and the identity for compile caches."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.nn.functional import silu

from polyfuse.runtime import fusion
from polyfuse.runtime.fusion._passes import Settings
from polyfuse.spec import SpecError
from tests.runtime.fusion.graphs import DEVICE, D, activated, assert_same_bits, quantise, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(64, 2 * D, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise(activated(self.gate_up(x)))


def test_a_compiled_module_follows_its_batch_and_changes_no_bit() -> None:
    block = Block().to(DEVICE, torch.bfloat16)
    inputs = [rows(n)[:, :64] for n in (5, 8, 33)]
    before = len(fusion.report())
    with fusion.enable(strict=True):
        compiled = torch.compile(block, dynamic=True)
        got = [compiled(x) for x in inputs]
    for x, outputs in zip(inputs, got, strict=True):
        assert_same_bits(outputs, quantise(activated(block.gate_up(x))))
    (graph,) = fusion.report()[before:]
    (match,) = graph.matches
    assert match == {
        "op": "silu_mul_block_quant",
        "shape": [match["shape"][0], "512"],
        "dtype": "torch.bfloat16",
        "scale_min": float(torch.tensor(1e-10)),
        "materialize": True,
    }
    assert not match["shape"][0].isdigit()


def test_a_graph_without_the_pattern_is_compiled_to_the_same_code() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return silu(x.chunk(2, -1)[0]).abs().amax(-1) / 448

    codes = []
    for enabled in (False, True):
        torch._dynamo.reset()
        with (
            inductor.patch(fx_graph_cache=False),
            functorch.patch(enable_autograd_cache=False),
            fusion.enable() if enabled else nullcontext(),
        ):
            written = torch._inductor.utils.get_code(torch.compile(function), rows(4))
        codes.append([re.sub(r"# AOT ID.*|/tmp/\S+", "", part) for part in written])
    assert "abs" in codes[0][0]
    assert codes[0] == codes[1]
    assert "polyfuse" not in codes[1][0]
    assert fusion.report()[-1] == fusion.GraphReport((), ())


class Counting(CustomGraphPass):
    """A pass of the user's own, with an identity or without."""

    def __init__(self, identity: str | None = "mine") -> None:
        self.identity = identity
        self.calls = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self.identity


InferenceAwareBase: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)  # torch 2.12


class InferenceAware(InferenceAwareBase):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        self.seen.append(is_inference)

    def uuid(self) -> str:
        return "aware"


def slots() -> tuple[Any, Any]:
    return inductor.joint_custom_pre_pass, inductor.post_grad_custom_post_pass


def test_enable_ends_with_its_block_and_runs_earlier_passes_first() -> None:
    joint, after, aware = Counting(), Counting(), InferenceAware()
    with inductor.patch(joint_custom_pre_pass=joint, post_grad_custom_post_pass=[after, aware], fx_graph_cache=False):
        with fusion.enable():
            assert all(isinstance(slot, CustomGraphPass) for slot in slots())
            for slot, earlier in zip(slots(), (joint, [after, aware]), strict=True):
                assert slot.earlier == earlier
            torch.compile(lambda x: x + 1)(rows(4))
        assert slots() == (joint, [after, aware])
        assert (joint.calls, after.calls, aware.seen) == (1, 1, [True])


def test_the_last_enable_holds_and_disable_ends_all() -> None:
    assert slots() == (None, None)
    fusion.enable()
    with fusion.enable(materialize=False, strict=True):
        assert [slot.settings for slot in slots()] == [Settings(strict=True, materialize=False)] * 2
    assert [slot.settings for slot in slots()] == [Settings(strict=False, materialize=True)] * 2
    fusion.enable(strict=True)
    fusion.disable()
    assert slots() == (None, None)


def test_an_identity_has_the_settings_and_the_earlier_pass_in_it() -> None:
    identities = []
    for earlier, settings in (
        (None, {}),
        (None, {"strict": True}),
        (None, {"materialize": False}),
        (Counting("one"), {}),
        ([Counting("one"), Counting("two")], {}),
    ):
        with inductor.patch(joint_custom_pre_pass=earlier), fusion.enable(**settings):
            identities += [slot.uuid() for slot in slots()]
            assert identities[-2:] == [slot.uuid() for slot in slots()]
            assert {type(part) for part in identities[-1][0]} == {str, bool}  # nothing that differs between processes
    assert len({*identities}) == len(identities) - 2  # of the second slot, which had no earlier pass
    for earlier in (Counting(None), lambda graph: None):
        with inductor.patch(joint_custom_pre_pass=earlier), fusion.enable():
            assert slots()[0].uuid() is None


@pytest.mark.parametrize(
    ("argument", "known"),
    [
        ("strict", "True, False or one of silu_mul_block_quant, rms_norm_block_quant, block_quant"),
        ("materialize", "True or False"),
    ],
)
def test_settings_are_what_is_known(argument: str, known: str) -> None:
    with pytest.raises(SpecError, match=rf"^fusion\.enable: {argument}: expected {known}, got 'yes'$"):
        fusion.enable(**{argument: "yes"})
    assert slots() == (None, None)


def test_the_documents_example_is_matched() -> None:
    text = (Path(__file__).parents[3] / "docs/fusion.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict[str, Any] = {}
    before = len(fusion.report())
    exec(code, names)
    ((match,),) = [graph.matches for graph in fusion.report()[before:]]
    assert str(match) in re.sub(r"\s+", " ", text)
    assert (names["q"].shape, names["scale"].shape) == ((4, 256), (4, 2))
