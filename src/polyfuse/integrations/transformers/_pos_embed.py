"""A vision tower's position embedding that resamples its own table with `pos_embed_interpolate`."""

from typing import Any, NamedTuple

import torch
from torch import nn

import polyfuse


class _Request(NamedTuple):
    """What a patched tower hands to its position embedding in place of tap indices."""

    grid_thw: torch.Tensor
    side: int
    options: dict[str, Any]


class InterpolatedEmbedding(nn.Embedding):
    """Stands in for a tower's position embedding, whose Parameter it shares, and resamples the table itself.

    Given plain indices it looks them up like any embedding.
    """

    def __init__(self, original: nn.Embedding) -> None:
        super().__init__(original.num_embeddings, original.embedding_dim, _weight=original.weight)
        self.weight = original.weight
        self.train(original.training)
        self._original = (original,)  # a bare module would be registered, and add keys to the state dict

    def forward(self, input: torch.Tensor | _Request) -> torch.Tensor:
        """For a `_Request`, all rows `[rows, 1, D]`: as a single tap, which the tower weights by one and sums."""
        if not isinstance(input, _Request):
            return super().forward(input)
        table = self.weight[: input.side**2]
        return polyfuse.pos_embed_interpolate(table, input.grid_thw, **input.options)[:, None]

    def release(self) -> nn.Embedding:
        """Give the original back, with this module's present parameter and mode."""
        (original,) = self._original
        original.weight = self.weight
        return original.train(self.training)


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
    """A call's keyword arguments, asking a patched tower's embedding for finished rows instead of taps."""
    given = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
    patched = isinstance(getattr(tower, "pos_embed", None), InterpolatedEmbedding)
    if not patched or given.get("interp_indices") is not None or given.get("interp_weights") is not None:
        return kwargs
    options = embedding_options(tower, given["hidden_states"].shape[0])
    request = _Request(given["grid_thw"], tower.num_grid_per_side, options)
    ones = tower.pos_embed.weight.new_ones(1, 1, dtype=options["out_dtype"])
    return kwargs | {"interp_indices": request, "interp_weights": ones}
