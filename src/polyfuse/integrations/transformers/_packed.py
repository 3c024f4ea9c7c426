"""What the adapters of packed vision towers share: patches and grids as their input, and one transformer block."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

import polyfuse
from polyfuse.integrations.transformers._plain import model_oddity
from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, ItemSize, Rows
from polyfuse.spec import fail

EXAMPLE_SIDE = 16  # tokens


class PackedTower:
    """The part of a `GraphableEncoder` that is alike for towers called with flattened patches and a grid."""

    token_multiple = 1
    # Whose calls `forward` computes itself: names of modules, and how their classes' names must end.
    bypassed: ClassVar[Mapping[str, str]] = {
        "patch_embed": "VisionPatchEmbed",
        "patch_embed.proj": "Conv3d",
        "pos_embed": "Embedding",
        "rotary_pos_emb": "VisionRotaryEmbedding",
        "blocks": "ModuleList",
        "blocks.*": "VisionBlock",
        "blocks.*.attn": "VisionAttention",
        "blocks.*.attn.*": "Linear",
        "blocks.*.mlp": "MLP",
        "deepstack_merger_list": "ModuleList",
    }

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.name = type(tower).__name__

    @property
    def device(self) -> torch.device:
        return self._kernel.device

    @property
    def dtype(self) -> torch.dtype:
        return self._kernel.dtype

    @property
    def _kernel(self) -> torch.Tensor:
        """The kernel of the patch embedding, [hidden, channels, frames, rows, columns]."""
        return self.tower.patch_embed.proj.weight

    @property
    def _width(self) -> int:
        """How many values a flattened patch has."""
        return self._kernel.shape[1:].numel()

    @property
    def inputs(self) -> Mapping[str, BufferSpec]:
        pixels = BufferSpec(Rows(per_token=self.tower.spatial_merge_unit), (self._width,), self._kernel.dtype)
        return {"pixels": pixels, "grid": BufferSpec(Rows(per_item=1), (3,), torch.int64, zero=True)}

    def oddity(self) -> str:
        """What keeps `forward` from computing what the tower itself would, as it is now; "" for nothing."""
        found = model_oddity(self.tower, self.bypassed)
        kernel = self.tower.patch_embed.proj if not found else None
        if kernel and (kernel.stride != kernel.kernel_size or any(kernel.padding) or kernel.groups != 1):
            return "patch_embed.proj is no plain projection of patches"
        return found

    def request(self, hidden_states: Any, grid_thw: Any) -> EncoderRequest:
        """Check `hidden_states` `[patches, width]`, floating point, against `grid_thw` `[items, 3]`, integers.

        Both may be on the host, and of the pixels only what is computed is moved. The grid is read back once. Raises
        `SpecError` for other shapes, dtypes or a wrong device, for no items, and for sides that cannot be merged or do
        not add up to the patches.
        """
        name, merge, width = self.name, self.tower.spatial_merge_size, self._width
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 2 or hidden_states.shape[1] != width:
            fail(name, "pixels", f"a tensor [patches, {width}]", _described(hidden_states))
        check_pixels(name, "pixels", hidden_states, self.device)
        if not isinstance(grid_thw, torch.Tensor) or grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
            fail(name, "grid_thw", "an integer tensor [items, 3]", _described(grid_thw))
        if grid_thw.is_floating_point():
            fail(name, "grid_thw", "an integer tensor [items, 3]", _described(grid_thw))
        items = grid_thw.tolist()
        if not items:
            fail(name, "grid_thw", "at least one item", "none")
        for t, h, w in items:
            if min(t, h, w) < 1 or h % merge or w % merge:
                expected = f"frames >= 1 and patch sides that are positive multiples of {merge}"
                fail(name, "grid_thw", expected, [t, h, w])
        patches = sum(t * h * w for t, h, w in items)
        if patches != len(hidden_states):
            fail(name, "pixels", f"{patches} rows, as grid_thw says", len(hidden_states))
        sizes = tuple(ItemSize(t * h * w // merge**2, t) for t, h, w in items)
        return EncoderRequest(sizes, {"pixels": hidden_states, "grid": grid_thw})

    def example(self, tokens: int) -> EncoderRequest:
        """Zeros as images of `EXAMPLE_SIDE` squared tokens, and one strip with the rest."""
        merge, side = self.tower.spatial_merge_size, EXAMPLE_SIDE
        images = [[1, side * merge, side * merge]] * (tokens // side**2)
        if rest := tokens % side**2:
            images.append([1, merge, rest * merge])
        pixels = self._kernel.new_zeros(tokens * merge**2, self._width)
        sizes = tuple(ItemSize(h * w // merge**2) for _, h, w in images)
        return EncoderRequest(sizes, {"pixels": pixels, "grid": torch.tensor(images)})

    def embed_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """The patch embedding, whose kernel covers a whole patch, as one matrix product: [patches, hidden]."""
        return torch.nn.functional.linear(pixels, self._kernel.flatten(1), self.tower.patch_embed.proj.bias)


def check_pixels(name: str, argument: str, pixels: torch.Tensor, device: torch.device) -> None:
    """Raise `SpecError` unless pixels are floating point, on the encoder's device or on the host."""
    places = dict.fromkeys([device, torch.device("cpu")])
    if pixels.device not in places or not pixels.is_floating_point():
        expected = f"floating point on {' or '.join(map(str, places))}"
        fail(name, argument, expected, f"{pixels.dtype} on {pixels.device}")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by Inductor, once for all sizes.

    Inductor gives a reduction over more than 1024 columns a loop, which reads them twice; with multi_kernel it also
    makes the kernel that holds the row, times both at the first call and keeps the faster. Without its cache on disk:
    PyTorch 2.11 cannot load such kernels from there.
    """
    return torch.compile(function, dynamic=True, options={"triton.multi_kernel": 1, "fx_graph_cache": False})


def vision_block(
    block: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, boundaries: torch.Tensor, longest: int
) -> torch.Tensor:
    """One block of a Qwen vision tower over packed rows `[patches, hidden]`; `cos` and `sin` are fp32."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = qkv.unbind(1)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    mixed = polyfuse.segment_attention(query, key, value, boundaries, scale=attention.scaling, max_seqlen=longest)
    hidden = hidden + attention.proj(mixed.flatten(1))
    return hidden + block.mlp(block.norm2(hidden))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]).to(x.dtype)


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
