"""Whatever is done to a tower, before or after `accelerate` and the first request: it computes what it would without.

On a CPU graphs are those of `BakedGraphs`: what was recorded at the capture is replayed as it was, as CUDA does.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

pytest.importorskip("transformers")

import peft
import torchao
from transformers.modeling_utils import AttentionInterface

import polyfuse
from polyfuse.integrations.transformers import accelerate, encoder_manager, invalidate, report, restore
from polyfuse.runtime import register_graph_runtime
from polyfuse.runtime.encoder import capture
from tests.integrations.transformers.test_vision_tower import BOUND, FAMILIES, build_tower, change, encode, same
from tests.runtime.encoder.baked_graphs import BakedGraphs

# Budgets that the requests fill to the last token or nearly, so that no path is chosen by measured times.
SETTINGS = {"budgets": [64], "policy": "greedy", "compile_blocks": False}

BETWEEN = pytest.param("before the first request", marks=pytest.mark.slow)
WHEN = ["before accelerate", BETWEEN, "after the first request"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# A GPU has other kernels for the patch embedding and for attention than Transformers calls there.
LIMIT = {"cpu": BOUND[torch.float32], "cuda": 5 * BOUND[torch.float32]}

Change = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def baked_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_RUNTIMES", dict(capture._RUNTIMES))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the untouched patch embedding
    register_graph_runtime("cpu", BakedGraphs)


def lora(tower: Any, *targets: str, save: list[str] | None = None) -> Any:
    """The tower inside of a PEFT model, with adapters that matter."""
    config = peft.LoraConfig(target_modules=list(targets), modules_to_save=save, r=2, init_lora_weights=False)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(tower, config)
    return wrapped.eval()


def lora_on_qkv(tower: Any) -> None:
    lora(tower, "qkv")


def lora_on_proj(tower: Any) -> None:
    lora(tower, "proj")  # of the attention and of the patch embedding


def lora_on_the_position_embedding(tower: Any) -> None:
    lora(tower, "pos_embed")


def modules_to_save(tower: Any) -> None:
    saved = lora(tower, "qkv", save=["pos_embed"])
    with torch.no_grad():
        saved.base_model.model.pos_embed.modules_to_save["default"].weight.mul_(2)


def lora_merged_and_unloaded(tower: Any) -> None:
    lora(tower, "qkv", "linear_fc1").merge_and_unload()


def hook_on_a_block(tower: Any) -> None:
    tower.blocks[0].register_forward_hook(lambda module, args, output: output * 1.5)


def hook_on_attention(tower: Any) -> None:
    tower.blocks[1].attn.register_forward_hook(lambda module, args, output: output * 1.5)


def pre_hook_on_the_patch_embedding(tower: Any) -> None:
    tower.patch_embed.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_on_the_position_embedding(tower: Any) -> None:
    tower.pos_embed.register_forward_hook(lambda module, args, output: output * 1.5)


def hook_on_a_linear_layer(tower: Any) -> None:
    tower.blocks[0].mlp.linear_fc1.register_forward_hook(lambda module, args, output: output * 1.5)


def own_attention(tower: Any) -> None:
    AttentionInterface.register("values_only", values_only)
    tower.config._attn_implementation = "values_only"


def values_only(module: Any, query: Any, key: Any, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return value.transpose(1, 2), None


def forward_on_the_instance(tower: Any) -> None:
    mlp = tower.blocks[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def subclassed_block(tower: Any) -> None:
    class Doubled(type(tower.blocks[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    tower.blocks[0].__class__ = Doubled


def replaced_block(tower: Any) -> None:
    class Scaled(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return hidden_states * 3

    tower.blocks[1] = Scaled()


def replaced_merger(tower: Any) -> None:
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 32))
    tower.merger.linear_fc2 = layers.to(tower.merger.linear_fc2.weight.device)


def batch_statistics(tower: Any) -> None:
    class Centred(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input - input.mean(0))

    tower.merger.linear_fc2.__class__ = Centred


def dropped_layers(tower: Any) -> None:
    tower.blocks = tower.blocks[:1]


def other_deepstack(tower: Any) -> None:
    tower.deepstack_visual_indexes[0] = 1


def another_epsilon(tower: Any) -> None:
    for block in tower.blocks:
        block.norm1.eps = 0.5


def another_scale(tower: Any) -> None:
    tower.blocks[0].attn.scaling *= 3


def pruned(tower: Any) -> None:
    prune.l1_unstructured(tower.blocks[0].attn.qkv, "weight", amount=0.5)


def pruned_rows(tower: Any) -> None:
    layer = tower.blocks[0].mlp.linear_fc1
    layer.weight.data, layer.bias.data = layer.weight.data[:64], layer.bias.data[:64]
    tower.blocks[0].mlp.linear_fc2.weight.data = tower.blocks[0].mlp.linear_fc2.weight.data[:, :64]


def parametrized(tower: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrize.register_parametrization(tower.blocks[0].attn.proj, "weight", Doubled())


def quantised(tower: Any) -> None:
    """Dynamic quantisation with a scale for the whole activation."""
    torchao.quantization.quantize_(tower, torchao.quantization.Int8DynamicActivationInt8WeightConfig())


def loaded(tower: Any) -> None:
    tower.load_state_dict({name: 1.5 * value for name, value in tower.state_dict().items()}, assign=True)


def wrapped_in_train(tower: Any) -> None:
    """Dropout in one module that is left in training mode does nothing here, as its rate is 0."""
    tower.blocks[0].train()


CHANGES = (
    *(lora_on_qkv, lora_on_proj, lora_on_the_position_embedding, modules_to_save, lora_merged_and_unloaded),
    *(hook_on_a_block, hook_on_attention, pre_hook_on_the_patch_embedding, hook_on_the_position_embedding),
    *(hook_on_a_linear_layer, own_attention, forward_on_the_instance, subclassed_block, replaced_block),
    *(replaced_merger, batch_statistics, dropped_layers, other_deepstack, another_epsilon, another_scale),
    *(pruned, pruned_rows, parametrized, quantised, loaded, wrapped_in_train),
)
# What graphs can still hold; everything else runs as before, and is named.
GRAPHABLE = {
    *("lora_merged_and_unloaded", "replaced_merger", "dropped_layers", "other_deepstack", "another_epsilon"),
    *("another_scale", "pruned_rows", "loaded"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("alter", CHANGES, ids=lambda alter: alter.__name__)
def test_a_tower_computes_what_it_would_without(alter: Change, when: str, device: str) -> None:
    tower, twin = build_tower().to(device), build_tower().to(device)
    untouched = encode(twin)
    alter(twin)
    wanted = encode(twin)
    if alter is not wrapped_in_train:
        assert change(untouched, wanted) > 20 * LIMIT[device]
    if when == "before accelerate":
        alter(tower)
        accelerate(tower, SETTINGS)
    else:
        accelerate(tower, SETTINGS)
        if when == "after the first request":
            assert change(untouched, encode(tower)) <= LIMIT[device]
        alter(tower)
    for _ in range(3):  # uncaptured, captured anew if it can be, and replayed
        assert change(wanted, encode(tower)) <= LIMIT[device]
    (part,) = (part for part in report(tower).parts if part.kind == "vision")
    assert part.fused == (alter.__name__ in GRAPHABLE), part.reason
    assert bool(part.reason) != part.fused
    if not part.fused:
        assert list(part.unfused_calls) == [part.reason]
    assert bool(part.graphs) == part.fused


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_its_weights(family: str) -> None:
    tower = accelerate(build_tower(family), SETTINGS)
    encode(tower)
    loaded(tower)
    wanted = restored(tower)
    assert change(wanted, encode(tower)) <= BOUND[torch.float32]
    assert change(wanted, encode(tower)) <= BOUND[torch.float32]
    assert report(tower).parts[0].changes == {"weights were moved or replaced": 1}


def restored(tower: Any) -> list[torch.Tensor]:
    """What an accelerated tower's own forward computes, from a copy that shares its weights."""
    plain = build_tower(next(family for family in FAMILIES if type(tower).__name__ == f"{family}VisionModel"))
    plain.load_state_dict(tower.state_dict(), assign=True)
    return encode(plain)


def test_an_adapter_that_comes_and_goes() -> None:
    """Added, disabled, switched, merged and removed, with a request after each step."""
    tower, twin = accelerate(build_tower(), SETTINGS), build_tower()
    first = encode(tower)
    adapted, plain = lora(tower, "qkv"), lora(twin, "qkv")
    for model in (adapted, plain):
        torch.manual_seed(6)
        model.add_adapter("second", peft.LoraConfig(target_modules=["linear_fc1"], r=2, init_lora_weights=False))
        model.eval()
    steps: list[Callable[[Any], Any]] = [
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.set_adapter("default"),
        lambda model: model.merge_adapter(["default"]),
        lambda model: [block.attn.qkv.unmerge() for block in model.base_model.model.blocks],
        lambda model: model.unload(),
    ]
    for step in steps:
        for model in (adapted, plain):
            step(model)
        for _ in range(2):
            assert change(encode(twin), encode(tower)) <= BOUND[torch.float32]
    assert change(first, encode(tower)) <= BOUND[torch.float32]
    assert report(tower).parts[0].fused


@pytest.fixture
def global_hook() -> Iterator[None]:
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    yield
    hook.remove()


def test_global_hooks_see_every_module(global_hook: None) -> None:
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    assert report(tower).parts[0].reason == "there are global module hooks"


def test_the_first_request_under_autocast() -> None:
    tower, twin = accelerate(build_tower(), SETTINGS), build_tower()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(encode(accelerate(twin, graphs=False)), encode(tower))
    assert change(encode(build_tower()), encode(tower)) <= BOUND[torch.float32]
    assert report(tower).parts[0].unfused_calls == {"autocast is on": 1}


def test_weights_that_alternate_are_never_captured_in_between() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    states = [{name: factor * value for name, value in tower.state_dict().items()} for factor in (1.0, 1.5)]
    for step in range(6):
        tower.load_state_dict(states[step % 2], assign=True)
        assert change(restored(tower), encode(tower)) <= BOUND[torch.float32]
    assert report(tower).parts[0].graphs == {}


def test_invalidate_drops_the_graphs() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    manager = encoder_manager(tower)
    assert invalidate(tower) is tower
    assert manager.stats.requests == 0
    assert encoder_manager(tower) is not manager
    encode(tower)
    assert report(tower).parts[0].graphs == {64: 1}


def test_a_capture_of_a_tower_that_is_not_plain_is_refused() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    manager = encoder_manager(tower)
    hook_on_a_block(tower)
    with pytest.raises(polyfuse.Unsupported, match=r"Qwen3VLVisionModel: blocks\.0 has hooks"):
        manager.capture()
    assert copy.deepcopy(tower).blocks[0]._forward_hooks
    restore(tower)


@pytest.mark.parametrize("part", ["", "blocks.0", "blocks.0.mlp", "patch_embed"])
def test_a_forward_that_is_replaced_on_a_class(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, twin = accelerate(build_tower(), SETTINGS), build_tower()
    encode(tower)
    cls = type(tower.get_submodule(part))
    own = cls.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, 1.5 * hidden_states, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    for _ in range(2):
        assert same(encode(twin), encode(tower))
    assert report(tower).parts[0].reason.endswith("has another forward")
    monkeypatch.undo()
    for _ in range(2):
        assert change(encode(twin), encode(tower)) <= BOUND[torch.float32]
