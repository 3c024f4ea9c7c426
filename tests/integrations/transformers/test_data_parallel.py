"""A tower over four gloo processes, which run this file, against the untouched tower in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import transformers

from polyfuse.integrations.transformers import make_encoder
from polyfuse.runtime import DataParallelEncoder, EncoderGraphManager
from tests.forked_ranks import fork_ranks, run_ranks

WORLD = 4
REQUESTS = [
    torch.tensor([[1, 4, 6], [3, 2, 8], [1, 10, 14], [1, 2, 2], [1, 8, 8], [2, 6, 6], [1, 4, 4]]),
    torch.tensor([[1, 6, 4], [1, 2, 10]]),
]


def build() -> Any:
    cls: Any = transformers.Qwen3VLVisionModel
    config = cls.config_class(
        depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=32,
        deepstack_visual_indexes=[0], num_position_embeddings=81,
    )  # fmt: skip
    torch.manual_seed(0)
    return cls._from_config(config, dtype=torch.float32).eval()


def pixels(grid: torch.Tensor) -> torch.Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 1536, generator=torch.Generator().manual_seed(1))


def process(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=WORLD)
    manager = EncoderGraphManager(make_encoder(build()), budgets=[16, 48], policy="greedy")
    encoder = DataParallelEncoder(manager)
    outputs = []
    for grid in REQUESTS:
        result = encoder.execute(pixels(grid), grid)
        outputs.append([result.last_hidden_state, result.pooler_output, *result.deepstack_features])
    torch.save((outputs, manager.stats.items), directory / f"{rank}.pt")
    dist.destroy_process_group()


def test_four_processes_give_the_result_of_one(tmp_path: Path) -> None:
    run_ranks("tests.integrations.transformers.test_data_parallel", tmp_path, timeout_s=120)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    tower = build()
    for i, grid in enumerate(REQUESTS):
        with torch.no_grad():
            want = tower(pixels(grid), grid)
        for outputs, _ in results:
            for got, old in zip(
                outputs[i], (want.last_hidden_state, want.pooler_output, *want.deepstack_features), strict=True
            ):
                assert got.shape == old.shape
                assert (got - old).norm() <= 2e-6 * old.norm()  # as in test_transformers.py
    assert sum(items for _, items in results) == sum(map(len, REQUESTS))
    assert sorted(items for _, items in results)[:2] != [0, 0]


if __name__ == "__main__":
    fork_ranks(process, WORLD)
