"""A vision tower's position embeddings from `pos_embed_interpolate`, in calls that run the tower's own forward."""

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

import polyfuse
from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._plain import oddity
from polyfuse.spec import FLOATS, dtype_name


class _Request(NamedTuple):
    """What a patched tower hands to its position embedding in place of tap indices."""

    grid_thw: torch.Tensor
    side: int
    options: dict[str, Any]


@_patch.stand_in
def forward(module: Any, input: torch.Tensor | _Request) -> torch.Tensor:
    """A position embedding's forward: for a `_Request`, the finished rows `[rows, 1, D]`.

    They are as a single tap, which the tower weights by one and sums. Indices are looked up as ever.
    """
    if not isinstance(input, _Request):
        return type(module).forward(module, input)
    table = module.weight[: input.side**2]
    return polyfuse.pos_embed_interpolate(table, input.grid_thw, **input.options)[:, None]


def embedding_options(tower: Any, rows: int) -> dict[str, Any]:
    """The keyword arguments with which `pos_embed_interpolate` computes a tower's embeddings."""
    return {
        "merge_size": tower.config.spatial_merge_size,
        "mode": tower.interpolation_mode,
        "align_corners": tower.interpolation_align_corners,
        "out_dtype": tower.patch_embed.proj.weight.dtype,
        "out_rows": rows,
    }


def request_embeddings(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, asking the tower's embedding, which is patched for it, for finished rows, not taps.

    Unchanged where the embedding is no plain one, or the op takes no table or result of its dtypes.
    """
    embedding: Any = getattr(tower, "pos_embed", None)
    if not hasattr(tower, "interpolation_mode"):
        return kwargs
    given = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
    if given.get("interp_indices") is not None or given.get("interp_weights") is not None:
        return kwargs
    pixels, grid = given.get("hidden_states"), given.get("grid_thw")
    if not (isinstance(pixels, torch.Tensor) and isinstance(grid, torch.Tensor)):
        return kwargs
    projection: Any = getattr(tower.patch_embed, "proj", None)
    if oddity(embedding, nn.Embedding) or oddity(projection, nn.Conv3d) or getattr(embedding, "max_norm", None):
        return kwargs
    dtypes = {dtype_name(module.weight.dtype) for module in (embedding, projection)}
    if not dtypes <= set(FLOATS) or grid.device != embedding.weight.device:
        return kwargs
    if getattr(vars(embedding).get("forward"), "__func__", None) is not forward:
        _patch.install(embedding, MethodType(forward, embedding), "pos_embed", by_request=False)
    options = embedding_options(tower, pixels.shape[0])
    request = _Request(grid, tower.num_grid_per_side, options)
    ones = embedding.weight.new_ones(1, 1, dtype=options["out_dtype"])
    return kwargs | {"interp_indices": request, "interp_weights": ones}
