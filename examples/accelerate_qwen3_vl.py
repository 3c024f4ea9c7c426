"""Photos to features with an accelerated Qwen3-VL vision tower: `python examples/accelerate_qwen3_vl.py`.

The tower is small and its weights are random, so that it runs on a CPU in seconds; with a checkpoint of your own, the
lines from `accelerate` on stay the same.
"""

import skimage.data
import torch
from transformers import Qwen2VLImageProcessorPil, Qwen3VLVisionConfig, Qwen3VLVisionModel

import polyfuse
from polyfuse.integrations.transformers import accelerate, report

PHOTOS = ("astronaut", "coffee")  # files of scikit-image itself: no download
SIZES = {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}


def main() -> None:
    torch.manual_seed(0)
    tower = Qwen3VLVisionModel(Qwen3VLVisionConfig(**SIZES, deepstack_visual_indexes=[0, 1])).eval()
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
    )
    inputs = processor([getattr(skimage.data, name)() for name in PHOTOS], return_tensors="pt")
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]

    with torch.inference_mode():
        before = tower(pixels, grid).pooler_output
        accelerate(tower)
        after = tower(pixels, grid).pooler_output
    print("grids", grid.tolist(), "features", tuple(after.shape))
    # The untouched tower computes source coordinates in float32, ours are exact.
    print(f"the features moved by at most {(after - before).abs().max():.1e} of {before.abs().max():.2f}")
    print("calls of ops:", polyfuse.call_counts())
    print(report(tower))  # graphs, which a GPU has; the position embeddings above are the op's on every device


if __name__ == "__main__":
    main()
