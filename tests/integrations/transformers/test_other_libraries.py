"""Other libraries' patches around `accelerate` and `restore`, in either order: the model computes what it would.

Each library is applied to a tiny Qwen3.5 with a tower and Gated DeltaNet layers, before or after `accelerate`; then it
is undone where it can be, before or after `restore`.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")

import accelerate as hf_accelerate
import bitsandbytes
import peft
import torchao
from accelerate.hooks import remove_hook_from_submodules
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from polyfuse.integrations.transformers import accelerate, report, restore
from polyfuse.runtime import register_graph_runtime
from polyfuse.runtime.encoder import capture
from tests.integrations.transformers.test_accelerate import build, logits
from tests.runtime.encoder.baked_graphs import BakedGraphs

SETTINGS = {"budgets": [8], "compile_blocks": False}
BOUND = 1e-5  # of the largest logit, as for the layers and the tower by themselves

Patch = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def baked_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_RUNTIMES", dict(capture._RUNTIMES))
    register_graph_runtime("cpu", BakedGraphs)


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def difference(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((wanted.double() - got.double()).abs().max() / wanted.double().abs().max())


def with_lora(model: Any) -> Any:
    torch.manual_seed(4)
    names = ["in_proj_qkv", "in_proj_a", "out_proj", "qkv", "linear_fc1"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)).eval()


def with_hooks(model: Any) -> Any:
    """What `device_map` leaves in a model on several devices."""
    return hf_accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def with_hooks_on_every_module(model: Any) -> Any:
    return hf_accelerate.cpu_offload(model, "cpu")


def with_offloaded_tower(model: Any) -> Any:
    hf_accelerate.cpu_offload(model.model.visual, "cpu")
    return model


def without_hooks(model: Any) -> Any:
    remove_hook_from_submodules(model)
    return model


def quantised_by_torchao(model: Any) -> Any:
    torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
    return model


def quantised_by_bitsandbytes(model: Any) -> Any:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name.rpartition(".")[2] in ("in_proj_qkv", "qkv"):
            int8 = bitsandbytes.nn.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
            )
            int8.load_state_dict(layer.state_dict())
            model.set_submodule(name, int8.to("cpu"))
    return model.eval()


def with_own_forwards(model: Any) -> Any:
    """What Liger and many scripts do: a forward of their own on the instance, around the one they find or not."""
    for layer in model.modules():
        if type(layer).__name__ in ("Qwen3_5GatedDeltaNet", "Qwen3_5VisionModel"):
            found = layer.forward

            def forward(self: Any, *args: Any, found: Any = found, **kwargs: Any) -> Any:
                output = found(*args, **kwargs)
                if isinstance(output, torch.Tensor):
                    return 1.5 * output
                output.pooler_output = 1.5 * output.pooler_output
                return output

            layer.forward = MethodType(forward, layer)
    return model


def in_ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_tensor_parallel(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.language_model.layers:
        if hasattr(layer, "linear_attn"):
            plan = {"in_proj_qkv": ColwiseParallel(), "in_proj_z": ColwiseParallel()}
            parallelize_module(layer.linear_attn, mesh, plan)
    return model


PATCHES = (
    *(with_lora, with_hooks, with_hooks_on_every_module, with_offloaded_tower, quantised_by_torchao),
    *(quantised_by_bitsandbytes, with_own_forwards, in_ddp, sharded, in_tensor_parallel),
)


@pytest.mark.parametrize("first", ["accelerate", "library"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_in_either_order(patch: Patch, first: str, group: None) -> None:
    wanted = logits(patch(build()))
    model = build()
    if first == "accelerate":
        accelerate(model, SETTINGS)
        assert difference(logits(build()), logits(model)) <= BOUND
        patched = patch(model)
    else:
        patched = patch(model)
        if patch is with_own_forwards:
            with pytest.raises(ValueError, match=r"a part that can be patched, got .* has another forward"):
                accelerate(patched, SETTINGS)
            return
        accelerate(patched, SETTINGS)
    for _ in range(3):
        assert difference(wanted, logits(patched)) <= BOUND
    assert len(report(patched).parts) == 2
    restore(patched)
    assert torch.equal(wanted, logits(patched))


@pytest.mark.parametrize("order", ["hooks off, restore", "restore, hooks off"])
@pytest.mark.parametrize("first", ["accelerate", "library"])
@pytest.mark.parametrize("patch", [with_hooks, with_hooks_on_every_module], ids=lambda patch: patch.__name__)
def test_hooks_come_off_before_or_after_restore(patch: Patch, first: str, order: str) -> None:
    wanted, model = logits(build()), build()
    steps = [lambda: accelerate(model, SETTINGS), lambda: patch(model)]
    for step in steps if first == "accelerate" else reversed(steps):
        step()
    steps = [lambda: without_hooks(model), lambda: restore(model)]
    for step in steps if order == "hooks off, restore" else reversed(steps):
        step()
    assert torch.equal(wanted, logits(model))
    placed = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    assert all(forward.__func__ is type(forward.__self__).forward for forward in placed)
    accelerate(model, SETTINGS)
    assert difference(wanted, logits(model)) <= BOUND
    assert all(part.fused for part in report(model).parts)


def test_a_model_with_hooks_around_whole_parts_runs_fused_inside_of_them() -> None:
    for model in (with_hooks(accelerate(build(), SETTINGS)), accelerate(with_hooks(build()), SETTINGS)):
        logits(model)
        assert [(part.fused, part.fused_calls) for part in report(model).parts] == [(True, 1), (True, 1)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(duplicate: Any) -> None:
    model = accelerate(build(), SETTINGS)
    before = logits(model)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert difference(before, logits(twin)) <= BOUND
    assert difference(before, logits(model)) > 100 * BOUND
    assert difference(before, logits(accelerate(twin, SETTINGS))) <= BOUND
    assert all(part.fused for part in report(twin).parts)


def test_replicas_of_data_parallel_run_on_their_own_weights() -> None:
    model = accelerate(build(), SETTINGS)
    for name in ("model.visual", "model.language_model.layers.0.linear_attn"):
        module = model.get_submodule(name)
        replica = module._replicate_for_data_parallel()
        assert replica.forward.__self__ is replica
        assert replica.forward.__func__ is type(module).forward
        assert module.forward is not replica.forward


def test_a_saved_model_loads_as_it_was(tmp_path: Any) -> None:
    model = accelerate(build(), SETTINGS)
    before = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert difference(before, logits(loaded)) <= BOUND
    assert not [module for module in loaded.modules() if "forward" in vars(module)]
    hf_accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size > 0


def test_five_orders_of_lora() -> None:
    """Added, accelerated, merged, unloaded and restored: always as the untouched model after the same."""
    orders = (
        ("accelerate", "lora", "merge", "restore"),
        ("lora", "accelerate", "merge", "restore"),
        ("lora", "merge", "accelerate", "restore"),
        ("accelerate", "lora", "restore", "merge"),
        ("lora", "accelerate", "restore", "merge"),
    )
    steps: dict[str, Patch] = {
        "accelerate": lambda model: accelerate(model, SETTINGS),
        "restore": restore,
        "lora": with_lora,
        "merge": lambda model: model.merge_and_unload(),
    }
    for order in orders:
        model, twin = build(), build()
        for step in order:
            model = steps[step](model)
            if step in ("lora", "merge"):
                twin = steps[step](twin)
            for _ in range(2):
                assert difference(logits(twin), logits(model)) <= BOUND, (order, step)


def test_a_report_changes_nothing() -> None:
    model = build()
    assert {part.reason for part in report(model).parts} == {"not accelerated"}
    with_own_forwards(model)
    assert {part.reason for part in report(model).parts} == {"has another forward"}
    with pytest.raises(ValueError, match="expected a model patched by accelerate"):
        restore(model)


def test_a_wrapper_that_is_taken_off_after_restore_leaves_a_model_to_accelerate_again() -> None:
    model, wanted = accelerate(build(), SETTINGS), logits(build())
    layer = model.model.language_model.layers[0].linear_attn
    found = layer.forward
    layer.forward = lambda *args, **kwargs: found(*args, **kwargs)
    restore(model)
    assert torch.equal(wanted, logits(model))
    layer.forward = found
    assert torch.equal(wanted, logits(model))
    accelerate(model, SETTINGS)
    assert difference(wanted, logits(model)) <= BOUND
    assert [(part.fused, part.fused_calls) for part in report(model).parts] == [(True, 1), (True, 1)]
