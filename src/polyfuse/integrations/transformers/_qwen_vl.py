"""The vision towers of Qwen3-VL and Qwen3.5, dense and MoE, as a `GraphableEncoder`."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import polyfuse
from polyfuse.integrations.transformers._packed import PackedTower, compiled, vision_block
from polyfuse.integrations.transformers._pos_embed import embedding_options
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, Rows
from polyfuse.runtime.encoder.segments import frame_boundaries, patch_positions


class QwenVisionEncoder(PackedTower):
    """A Transformers Qwen3-VL or Qwen3.5 vision tower, which it uses and does not change.

    Items are images and videos. It gives the deepstack outputs too, and takes the position embeddings from
    `pos_embed_interpolate`. With `compile_blocks` the blocks and mergers are compiled by Inductor, once for all sizes.
    """

    def __init__(self, tower: Any, compile_blocks: bool = False) -> None:
        super().__init__(tower)
        self._block: Callable[..., torch.Tensor] = vision_block
        self._merge: Callable[..., torch.Tensor] = _call
        self._tables: Callable[..., Any] = _tables
        if compile_blocks:
            self._block, self._merge, self._tables = compiled(vision_block), compiled(_call), compiled(_tables)

    @property
    def outputs(self) -> Mapping[str, BufferSpec]:
        config, dtype = self.tower.config, self._kernel.dtype
        hidden = BufferSpec(Rows(per_token=self.tower.spatial_merge_unit), (config.hidden_size,), dtype)
        merged = BufferSpec(Rows(per_token=1), (config.out_hidden_size,), dtype)
        deepstack = {f"deepstack_{i}": merged for i in range(len(self._deepstack))}
        return {"last_hidden_state": hidden, "pooler_output": merged, **deepstack}

    @property
    def _deepstack(self) -> list[int]:
        """The blocks whose output is also merged and returned; Qwen3.5 has none."""
        return getattr(self.tower, "deepstack_visual_indexes", [])

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> Mapping[str, torch.Tensor]:
        tower, grid = self.tower, inputs["grid"]
        rows = len(inputs["pixels"])
        hidden = self.embed_patches(inputs["pixels"])
        hidden = hidden + polyfuse.pos_embed_interpolate(
            tower.pos_embed.weight[: tower.num_grid_per_side**2],
            grid,
            **embedding_options(tower, rows),
        )
        cos, sin, boundaries = self._tables(tower, hidden, grid, capacity.frames)
        outputs = {}
        for index, block in enumerate(tower.blocks):
            hidden = self._block(block, hidden, cos, sin, boundaries, rows)
            if index in self._deepstack:
                which = self._deepstack.index(index)
                outputs[f"deepstack_{which}"] = self._merge(tower.deepstack_merger_list[which], hidden)
        return {"last_hidden_state": hidden, "pooler_output": self._merge(tower.merger, hidden), **outputs}

    def result(self, outputs: Mapping[str, torch.Tensor], request: EncoderRequest) -> Any:
        states: dict[str, Any] = {name: outputs[name] for name in ("last_hidden_state", "pooler_output")}
        if not hasattr(self.tower, "deepstack_visual_indexes"):
            return BaseModelOutputWithPooling(**states)
        features = [outputs[f"deepstack_{i}"] for i in range(len(self._deepstack))]
        output = sys.modules[type(self.tower).__module__].BaseModelOutputWithDeepstackFeatures
        return output(**states, deepstack_features=features)


def _tables(tower: Any, hidden: torch.Tensor, grid: torch.Tensor, frames: int) -> tuple[torch.Tensor, ...]:
    """Cos and sin of each patch, and the boundaries of the frames."""
    cos, sin = tower.rotary_pos_emb(hidden, patch_positions(grid, len(hidden), tower.spatial_merge_size))
    return cos, sin, frame_boundaries(grid, frames)


def _call(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The module's result; a function of its own, so that it can be compiled once for all mergers."""
    return module(x)
