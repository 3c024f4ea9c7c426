"""Weights that change, in every way that users change them: the next call computes with what they are now."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from polyfuse.integrations.transformers import accelerate, report
from polyfuse.runtime import register_graph_runtime
from polyfuse.runtime.encoder import capture
from tests.integrations.transformers import gated_delta_net_models as text
from tests.integrations.transformers.test_tower_changes import DEVICES, LIMIT
from tests.integrations.transformers.test_vision_tower import build_tower, change, encode
from tests.integrations.transformers.weight_changes import ON_A_CPU, WEIGHT_CHANGES, Change
from tests.runtime.encoder.baked_graphs import BakedGraphs

SETTINGS = {"budgets": [64], "policy": "greedy", "compile_blocks": False}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alter", WEIGHT_CHANGES, ids=lambda alter: alter.__name__)
def test_a_tower_in_graphs(alter: Change, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and alter in ON_A_CPU:
        pytest.skip("only for weights on a CPU")
    monkeypatch.setattr(capture, "_RUNTIMES", dict(capture._RUNTIMES))
    register_graph_runtime("cpu", BakedGraphs)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the untouched patch embedding
    tower, twin = accelerate(build_tower().to(device), SETTINGS), build_tower().to(device)
    before = encode(tower)
    alter(tower)
    alter(twin)
    wanted = encode(twin)
    assert change(before, wanted) > 0.02
    for _ in range(3):  # uncaptured, captured anew, replayed
        assert change(wanted, encode(tower)) <= 3 * LIMIT[device]
    assert report(tower).parts[0].fused


@pytest.mark.filterwarnings("ignore:The following .*pattern keys:RuntimeWarning")  # of PEFT
@pytest.mark.parametrize("family", [pytest.param("Qwen3Next", marks=pytest.mark.slow), "Qwen3_5"])
@pytest.mark.parametrize("alter", WEIGHT_CHANGES, ids=lambda alter: alter.__name__)
def test_a_text_model(alter: Change, family: str, op_calls: list[str]) -> None:
    model = text.build(family)
    twin, ids = copy.deepcopy(model), text.tokens(2, 9)
    accelerate(model)
    before = text.logits(model, ids)
    alter(model)
    alter(twin)
    wanted = text.logits(twin, ids)
    assert text.change(before, wanted) > 0.02
    for _ in range(2):
        assert text.change(wanted, text.logits(model, ids)) <= text.BOUND
    assert op_calls == text.PREFILL * 2 * 3


def test_a_text_model_has_no_second_copy_of_its_weights() -> None:
    model = text.build()
    before = {id(t) for t in tensors(model)}
    text.logits(accelerate(model), text.tokens(2, 9))
    assert {id(t) for t in tensors(model)} == before


def tensors(model: Any) -> list[torch.Tensor]:
    """Every tensor that a model's modules hold, as parameter, buffer or attribute."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return [*held, *model.parameters(), *model.buffers()]
