"""Ways in which training, serving and loading code changes the weights of a model in place or under its feet."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_file
from torch import nn

Change = Callable[[Any], None]


def _targets(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


def _gradients(model: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def _step(model: Any, optimizer: Any, **options: Any) -> None:
    _gradients(model)
    optimizer(model.parameters(), lr=0.05, **options).step()
    model.zero_grad()


def fused_adamw(model: Any) -> None:
    _step(model, torch.optim.AdamW, fused=True)


def foreach_adamw(model: Any) -> None:
    _step(model, torch.optim.AdamW, foreach=True)


def fused_sgd(model: Any) -> None:
    _step(model, torch.optim.SGD, fused=True, momentum=0.9)


def fused_adagrad(model: Any) -> None:
    _step(model, torch.optim.Adagrad, fused=True)


def data_copied(model: Any) -> None:
    """What a weight synchronisation of reinforcement learning does."""
    for parameter in model.parameters():
        parameter.data.copy_(1.25 * parameter.data)


def data_replaced(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = 1.25 * parameter.data


def foreach_copied(model: Any) -> None:
    data = [p.data for p in model.parameters()]
    torch._foreach_copy_(data, torch._foreach_mul(data, 1.25))


def flat_buffer(model: Any) -> None:
    """Parameters become views of one buffer, which is then written to."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data = part.view_as(parameter)
    flat.mul_(1.25)


def numpy_view(model: Any) -> None:
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array *= 1.25


def copied_in_no_grad(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def copied_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def inference_tensors(model: Any) -> None:
    """Parameters that were made in inference mode, which count no versions, written to."""
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(1.25 * parameter.clone(), requires_grad=False)
        for parameter in model.parameters():
            parameter.mul_(1.01)


def state_loaded(model: Any) -> None:
    model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()})


def state_assigned(model: Any) -> None:
    model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()}, assign=True)


def safetensors_loaded(model: Any) -> None:
    state = {name: 1.25 * value for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(state, path)
        load_model(model, path, strict=False)


def parameters_set(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.25 * parameter.detach()))


def tensors_swapped(model: Any) -> None:
    for parameter in list(model.parameters()):
        torch.utils.swap_tensors(parameter, nn.Parameter(1.25 * parameter.detach()))


def vector_written(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.25 * vector, model.parameters())


def storage_freed_and_refilled(model: Any) -> None:
    """What sharded training does between the steps."""
    for parameter in model.parameters():
        saved = 1.25 * parameter.detach()
        size = parameter.untyped_storage().nbytes()
        parameter.untyped_storage().resize_(0)
        parameter.untyped_storage().resize_(size)
        parameter.data.copy_(saved)


def tensors_set(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.set_(1.25 * parameter.detach())


def moved_to_shared_memory(model: Any) -> None:
    data_copied(model.share_memory())


def broadcast(model: Any) -> None:
    with process_group():
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
            dist.broadcast(parameter.data, 0)


def reduced(model: Any) -> None:
    with process_group():
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
            dist.all_reduce(parameter.data)


def lora_merged(model: Any) -> None:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    config = peft.LoraConfig(target_modules=sorted(names), r=2, init_lora_weights=False)
    torch.manual_seed(9)
    peft.get_peft_model(model, config).merge_and_unload()


def cast_and_back(model: Any) -> None:
    data_copied(model.to(torch.bfloat16).to(torch.float32))


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WEIGHT_CHANGES: tuple[Change, ...] = (
    *(fused_adamw, foreach_adamw, fused_sgd, fused_adagrad, data_copied, data_replaced, foreach_copied, flat_buffer),
    *(numpy_view, copied_in_no_grad, copied_in_inference_mode, inference_tensors, state_loaded, state_assigned),
    *(safetensors_loaded, parameters_set, tensors_swapped, vector_written, storage_freed_and_refilled, tensors_set),
    *(moved_to_shared_memory, broadcast, reduced, lora_merged, cast_and_back),
)
ON_A_CPU = (fused_adagrad, numpy_view, moved_to_shared_memory, broadcast, reduced)
