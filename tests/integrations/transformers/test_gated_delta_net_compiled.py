"""Gated DeltaNet layers on the ops under `torch.compile`."""

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import DynamicCache, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from polyfuse.integrations.transformers import accelerate
from tests.integrations.transformers.gated_delta_net_models import DECODE, PREFILL, hidden, states, write

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

CONFIG: Any = Qwen3_5TextConfig(
    hidden_size=64,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)


def build_layer() -> Any:
    torch.manual_seed(0)
    return Qwen3_5GatedDeltaNet(CONFIG, 0).eval()


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def test_ten_layers_share_one_graph_with_one_node_for_each_op() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter)
    layers = [accelerate(build_layer()) for _ in range(10)]
    with torch.no_grad():
        for layer in layers:
            write(layer)
            assert torch.equal(layer(hidden(2, 9)), compiled(layer, hidden(2, 9)))
        last = layers[-1]
        before = last(hidden(2, 9))
        write(last)
        after = compiled(accelerate(last), hidden(2, 9))
        assert torch.equal(last(hidden(2, 9)), after)
        assert not torch.equal(before, after)
    assert counter.frame_count == 1
    nodes = [node for node in counter.graphs[0].graph.nodes if "polyfuse." in str(node.target)]
    assert [str(node.target) for node in nodes] == [f"polyfuse.{op}" for op in PREFILL]
    assert not [value for node in nodes for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)]


def test_decodes_from_a_cache_in_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = accelerate(build_layer())
    caches: list[Any] = [DynamicCache(config=CONFIG) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            layer(hidden(2, 9), cache)
        before = [state.clone() for state in states(caches[1])]
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for _ in range(3):
            assert torch.equal(layer(hidden(2, 1), caches[0]), compiled(hidden(2, 1), caches[1]))
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert [target for target in targets if "polyfuse." in target] == [f"polyfuse.{op}" for op in DECODE]
    for first, old, new in zip(before, *map(states, caches), strict=True):
        assert torch.equal(old, new)
        assert not torch.equal(first, new)


def test_a_second_model_compiles_from_the_cache() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of Inductor's own imports
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            layer = accelerate(build_layer())
            write(layer)
            assert torch.equal(layer(hidden(2, 9)), torch.compile(layer, fullgraph=True)(hidden(2, 9)))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
