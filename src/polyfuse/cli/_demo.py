"""`polyfuse demo`: real photos through a real vision tower, untouched and then accelerated."""

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import skimage.data
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2VLImageProcessorPil, Qwen3VLVisionConfig, Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

import polyfuse
from polyfuse.bench.timing import Clock
from polyfuse.conformance.checks.values import compare
from polyfuse.integrations.transformers import accelerate
from polyfuse.reference import oracle

exact = oracle("pos_embed_interpolate").intervals

PHOTOS = ("astronaut", "coffee", "rocket", "chelsea")  # files of scikit-image itself: no download
FAST_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1],
}

Timed = tuple[float, torch.Tensor]


def run_demo(fast: bool, console: Console, device: str) -> int:
    """Show what `accelerate` does to the speed and the output of a Qwen3-VL vision tower with random weights.

    `fast` takes a tower of 3 narrow layers in place of the 27 of Qwen3-VL. Returns the exit status: 1 if an
    embedding breaks the op's error bound, or the accelerated tower does not use what the op returns.
    """
    tower = build_tower(fast, device)
    pixels, grid = load_photos()
    _print_inputs(tower, grid, console)
    pixels, grid = pixels.to(device), grid.to(device)
    table = tower.pos_embed.weight.detach()
    options: dict[str, Any] = {"merge_size": tower.config.spatial_merge_size, "out_rows": len(pixels)}
    repeats = 1 if device == "cpu" and not fast else 3
    used: list[torch.Tensor] = []
    clock = Clock(device)

    op = polyfuse.pos_embed_interpolate

    def encode() -> torch.Tensor:
        return tower(pixels, grid).pooler_output

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(op(*args, **kwargs))
        return used[-1]

    with torch.inference_mode():
        true = exact(table.float().cpu().numpy(), grid.tolist(), merge_size=options["merge_size"])["out"]
        theirs = transformers_rows(tower, grid)
        ours = polyfuse.pos_embed_interpolate(table, grid, out_dtype=torch.float32, **options)
        old_rows = _timed(lambda: transformers_rows(tower, grid).to(table.dtype), clock, 5)
        new_rows = _timed(lambda: polyfuse.pos_embed_interpolate(table, grid, **options), clock, 5)
        warm_up(tower, pixels)
        old = _timed(encode, clock, repeats)
        accelerate(tower)
        with patch.object(polyfuse, "pos_embed_interpolate", noted):
            warm_up(tower, pixels)
            new = _timed(encode, clock, repeats)

    results = Table("", "Transformers", "accelerated", "max |difference|", "max |value|", "relative change")
    results.add_row("position embeddings", *_row(old_rows, new_rows))
    results.add_row("whole tower", *_row(old, new))
    console.print(results)
    console.print("Position embeddings in float32 against the float64 oracle and the op's error bound:")
    wrong = compare("polyfuse", ours.cpu().numpy(), true, "float32")
    console.print(f"  {wrong or 'polyfuse: every element right'}", markup=False)
    their_wrong = compare("Transformers", theirs.cpu().numpy(), true, "float32")
    console.print(f"  {their_wrong or 'Transformers: every element right'}", markup=False)
    console.print(str(polyfuse.explain("pos_embed_interpolate", table, grid, **options)), markup=False)
    if not (used and torch.equal(used[-1], new_rows[1])):
        console.print("The accelerated tower did not use the op's embeddings.", style="bold red")
        return 1
    return int(wrong is not None)


def build_tower(fast: bool, device: str) -> Any:
    """A bfloat16 vision tower with seeded random weights."""
    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(**(FAST_TOWER if fast else {}))
    tower: Any = Qwen3VLVisionModel._from_config(config, dtype=torch.bfloat16).eval()
    return tower.to(device)


def load_photos() -> tuple[torch.Tensor, torch.Tensor]:
    """The photos as a Qwen3-VL processor prepares them: pixels [patches, 1536] and grid_thw [4, 3]."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
    )
    batch = processor([getattr(skimage.data, name)() for name in PHOTOS], return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"]


def transformers_rows(tower: Any, grid: torch.Tensor) -> torch.Tensor:
    """The position embeddings as an untouched tower computes them, [patches, D] in float32."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.config.spatial_merge_size,
    )
    return (tower.pos_embed(indices) * weights[:, :, None]).sum(1)


def warm_up(tower: Any, pixels: torch.Tensor) -> None:
    """Run the tower once on a small image."""
    tower(pixels[:64], torch.tensor([[1, 8, 8]], device=pixels.device))


def _timed(run: Callable[[], torch.Tensor], clock: Clock, repeats: int) -> Timed:
    """Median seconds of a run, and the last result."""
    results = []
    times = clock.latencies([lambda: results.append(run())] * repeats)
    return statistics.median(times.done), results[-1]


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """The norm of the difference over the norm of the old."""
    return float((new.double() - old.double()).norm() / old.double().norm())


def _row(old: Timed, new: Timed) -> tuple[str, ...]:
    difference = (new[1].double() - old[1].double()).abs().max()
    largest = old[1].double().abs().max()
    times = [f"{seconds * 1e3:,.2f} ms" for seconds, _ in (old, new)]
    return (*times, f"{difference:.2e}", f"{largest:.3g}", f"{_change(old[1], new[1]):.1e}")


def _print_inputs(tower: Any, grid: torch.Tensor, console: Console) -> None:
    photos = Table("photo", "grid (t, h, w)", "patches")
    for name, (t, h, w) in zip(PHOTOS, grid.tolist(), strict=True):
        photos.add_row(name, f"[{t},{h},{w}]", str(t * h * w))
    console.print(photos)
    config = tower.config
    console.print(
        f"Vision tower: {config.depth} layers of width {config.hidden_size}, {tower.dtype}, random weights, "
        f"on {tower.device}"
    )
