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

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"
CONFIG: Any = Qwen3_5TextConfig(
    hidden_size=64,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)

# Of the largest value: sums of 64 terms in another order, and a delta rule that is solved in another way. Transformers
# has one for exports, and under torch.compile PyTorch 2.11 says that it exports.
BOUND = 1e-5


def build_layer() -> Any:
    torch.manual_seed(0)
    return Qwen3_5GatedDeltaNet(CONFIG, 0).eval()


def hidden(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, 64, generator=torch.Generator().manual_seed(3))


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.in_proj_z.weight.mul_(2)


def change(old: torch.Tensor, new: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((new.double() - old.double()).abs().max() / old.double().abs().max())


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
            assert change(layer(hidden()), compiled(layer, hidden())) <= BOUND
        last = layers[-1]
        before = last(hidden())
        write(last)
        after = compiled(accelerate(last), hidden())
        assert change(last(hidden()), after) <= BOUND < change(before, after)
    assert counter.frame_count == 1
    nodes = [node for node in counter.graphs[0].graph.nodes if "polyfuse." in str(node.target)]
    assert [str(node.target) for node in nodes] == ["polyfuse.gdn_in_proj", "polyfuse.gdn_conv_prep"]
    assert not [value for node in nodes for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)]


def test_decodes_from_a_cache_in_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = accelerate(build_layer())
    caches: list[Any] = [DynamicCache(config=CONFIG) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            layer(hidden(), cache)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for _ in range(3):
            assert torch.equal(layer(hidden(1), caches[0]), compiled(hidden(1), caches[1]))
    assert counter.frame_count == 1
    old, new = (cache.layers[0] for cache in caches)
    assert torch.equal(old.conv_states[0], new.conv_states[0])
    assert torch.equal(old.recurrent_states[0], new.recurrent_states[0])


def test_a_second_model_compiles_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fallback's arithmetic would take the time that Inductor needs for it.
    monkeypatch.setattr(
        f"{MODELING}.torch_chunk_gated_delta_rule",
        lambda query, key, value, g, beta, **kwargs: (value * beta[..., None], None),
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of Inductor's own imports
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            layer = accelerate(build_layer())
            write(layer)
            eager = layer(hidden())
            assert change(eager, torch.compile(layer, fullgraph=True)(hidden())) <= BOUND
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
