"""The vision tower of Qwen2.5-VL, with windowed attention, as a `GraphableEncoder`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from polyfuse.integrations.transformers._packed import PackedTower, compiled, vision_block
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, Rows
from polyfuse.runtime.encoder.segments import frame_boundaries, patch_positions
from polyfuse.runtime.encoder.windows import max_windows, window_tables


class WindowedQwenEncoder(PackedTower):
    """A Transformers Qwen2.5-VL vision tower, which it uses and does not change.

    Items are images and videos. As the tower returns them, `last_hidden_state` is in window order, which keeps each
    item's rows together, and `pooler_output` in the order of the pixels. With `compile_blocks` the blocks and the
    merger are compiled by Inductor, once for all sizes.
    """

    def __init__(self, tower: Any, compile_blocks: bool = False) -> None:
        super().__init__(tower)
        self._side: int = tower.window_size // tower.spatial_merge_size // tower.patch_size
        self._block: Callable[..., torch.Tensor] = vision_block
        self._merge: Callable[..., torch.Tensor] = _merge
        self._tables: Callable[..., Any] = _tables
        if compile_blocks:
            self._block, self._merge, self._tables = compiled(vision_block), compiled(_merge), compiled(_tables)

    @property
    def outputs(self) -> Mapping[str, BufferSpec]:
        config, dtype = self.tower.config, self._kernel.dtype
        hidden = BufferSpec(Rows(per_token=self.tower.spatial_merge_unit), (config.hidden_size,), dtype)
        return {"last_hidden_state": hidden, "pooler_output": BufferSpec(Rows(1), (config.out_hidden_size,), dtype)}

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> Mapping[str, torch.Tensor]:
        tower, rows = self.tower, len(inputs["pixels"])
        hidden = self.embed_patches(inputs["pixels"])
        windows = max_windows(capacity.tokens, capacity.frames, self._side)
        order, patches, cos, sin, frame_edges, window_edges = self._tables(
            tower, hidden, inputs["grid"], capacity.frames, windows, self._side
        )
        hidden = hidden[patches]
        for index, block in enumerate(tower.blocks):
            if index in tower.fullatt_block_indexes:
                hidden = self._block(block, hidden, cos, sin, frame_edges, rows)
            else:
                longest = self._side**2 * tower.spatial_merge_unit
                hidden = self._block(block, hidden, cos, sin, window_edges, longest)
        merged = self._merge(tower.merger, hidden)
        pooled = torch.empty_like(merged).index_copy_(0, order, merged)
        return {"last_hidden_state": hidden, "pooler_output": pooled}

    def result(self, outputs: Mapping[str, Any], request: EncoderRequest) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(**outputs)


def _tables(
    tower: Any, hidden: torch.Tensor, grid: torch.Tensor, frames: int, windows: int, side: int
) -> tuple[torch.Tensor, ...]:
    """Token order, patch order, cos and sin in that order, and the boundaries of frames and of windows."""
    merge, unit = tower.spatial_merge_size, tower.spatial_merge_unit
    order, window_edges = window_tables(grid, len(hidden) // unit, windows, side, merge)
    patches = (order[:, None] * unit + torch.arange(unit, device=order.device)).flatten()
    cos, sin = tower.rotary_pos_emb(hidden, patch_positions(grid, len(hidden), merge)[patches])
    return order, patches, cos, sin, frame_boundaries(grid, frames), window_edges


def _merge(merger: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Merged patches; a function of its own, so that it can be compiled once for all towers."""
    return merger(hidden)
