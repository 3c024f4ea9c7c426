"""Run polyfuse's ops inside a loaded Transformers model: `accelerate(model)`, and `restore(model)` to undo it.

Patched: the position embeddings of the Qwen3-VL, Qwen3-VL-MoE, Qwen3.5 and Qwen3.5-MoE vision towers, which
become one `pos_embed_interpolate` call. Parameters keep their names and stay the same objects, and no
`forward` is replaced.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Qwen3_5MoeVisionModel, Qwen3_5VisionModel, Qwen3VLMoeVisionModel, Qwen3VLVisionModel

import polyfuse
from polyfuse.spec import fail

VISION_TOWERS = (Qwen3VLVisionModel, Qwen3VLMoeVisionModel, Qwen3_5VisionModel, Qwen3_5MoeVisionModel)

Model = TypeVar("Model", bound=nn.Module)


class _Request(NamedTuple):
    """What a patched tower hands to its position embedding in place of tap indices."""

    grid_thw: torch.Tensor
    side: int
    options: dict[str, Any]


class InterpolatedEmbedding(nn.Embedding):
    """Stands in for a tower's position embedding, whose Parameter it shares, and resamples the table itself.

    Given plain indices it looks them up like any embedding.
    """

    def __init__(self, original: nn.Embedding, hook: RemovableHandle) -> None:
        super().__init__(original.num_embeddings, original.embedding_dim, _weight=original.weight)
        self.weight = original.weight
        self.train(original.training)
        self._hook = hook
        self._original = (original,)  # a bare module would be registered, and add keys to the state dict

    def forward(self, input: torch.Tensor | _Request) -> torch.Tensor:
        """[rows, 1, D] for a `_Request`: a single tap, which the tower weights by one and sums."""
        if not isinstance(input, _Request):
            return super().forward(input)
        table = self.weight[: input.side**2]
        return polyfuse.pos_embed_interpolate(table, input.grid_thw, **input.options)[:, None]

    def release(self) -> nn.Embedding:
        """Stop the requests and give the original back, with this module's present parameter and mode."""
        (original,) = self._original
        self._hook.remove()
        original.weight = self.weight
        return original.train(self.training)


def accelerate(model: Model) -> Model:
    """Patch a loaded model in place and return it. What is patched already stays as it is.

    Every vision tower in `VISION_TOWERS` found in `model`, itself included, then takes its position embeddings
    from `polyfuse.pos_embed_interpolate`: at that op's accuracy, so not to the bit what Transformers computes
    from rounded coordinates. The tower adds them to its patch embeddings outside of both modules, in a second
    rounding, which is why the op's fused `base` is not used.

    The grid is not read back to the host: an invalid one gives NaN. A call that passes `interp_indices` or
    `interp_weights` is left as it is. Infer under `torch.no_grad()` or `torch.inference_mode()`: a call that records
    gradients for the table needs a backend that has them.

    Raises `SpecError` if there is no such tower.
    """
    for tower in _towers(model, "accelerate"):
        if not isinstance(tower.pos_embed, InterpolatedEmbedding):
            hook = tower.register_forward_pre_hook(_request_embeddings, with_kwargs=True)
            tower.pos_embed = InterpolatedEmbedding(tower.pos_embed, hook)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place and return the model, its original modules back in their places.

    Raises `SpecError` if nothing in the model is patched.
    """
    patched = [tower for tower in _towers(model, "restore") if isinstance(tower.pos_embed, InterpolatedEmbedding)]
    if not patched:
        fail("restore", "model", "a model patched by accelerate", f"an unpatched {type(model).__name__}")
    for tower in patched:
        tower.pos_embed = tower.pos_embed.release()
    return model


def _towers(model: nn.Module, function: str) -> list[Any]:
    towers = [module for module in model.modules() if isinstance(module, VISION_TOWERS)]
    if not towers:
        names = ", ".join(tower.__name__ for tower in VISION_TOWERS)
        fail(function, "model", f"a vision tower of type {names} in it", type(model).__name__)
    return towers


def _request_embeddings(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Pre-hook of a patched tower: ask its embedding for finished rows instead of taps."""
    given = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
    table = tower.pos_embed.weight
    if given.get("interp_indices") is not None or given.get("interp_weights") is not None:
        return None
    dtype = tower.patch_embed.proj.weight.dtype
    options = {
        "merge_size": tower.config.spatial_merge_size,
        "mode": tower.interpolation_mode,
        "align_corners": tower.interpolation_align_corners,
        "out_dtype": dtype,
        "out_rows": given["hidden_states"].shape[0],
    }
    request = _Request(given["grid_thw"], tower.num_grid_per_side, options)
    return args, kwargs | {"interp_indices": request, "interp_weights": table.new_ones(1, 1, dtype=dtype)}
