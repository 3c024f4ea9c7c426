"""A tower over four gloo processes, which run this file, against the untouched tower in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import transformers
from torch.utils._python_dispatch import TorchDispatchMode

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


class Converted(TorchDispatchMode):
    """Counts the rows of patches that are converted from float64, as those are that go into a float32 tower."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.dtype == torch.float64 and source.shape[-1:] == (1536,):
                self.rows += len(source)
        return func(*args, **(kwargs or {}))


def process(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=WORLD)
    manager = EncoderGraphManager(make_encoder(build()), budgets=[16, 48], policy="greedy")
    encoder = DataParallelEncoder(manager)
    outputs, rows = [], []
    for grid in REQUESTS:
        with Converted() as converted:
            result = encoder.execute(pixels(grid).double(), grid)
        outputs.append([result.last_hidden_state, result.pooler_output, *result.deepstack_features])
        rows.append(converted.rows)
    bad = torch.tensor([[1, 3, 8]]) if rank == 1 else torch.tensor([[1, 4, 6]])
    with pytest.raises(RuntimeError) as error:
        encoder.execute(torch.zeros(24, 1536), bad)
    torch.save((outputs, manager.stats.items, rows, str(error.value)), directory / f"{rank}.pt")
    dist.destroy_process_group()


def test_four_processes_give_the_result_of_one(tmp_path: Path) -> None:
    run_ranks("tests.integrations.transformers.test_data_parallel", tmp_path, timeout_s=120)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    tower = build()
    for i, grid in enumerate(REQUESTS):
        with torch.no_grad():
            want = tower(pixels(grid), grid)
        for outputs, *_ in results:
            for got, old in zip(
                outputs[i], (want.last_hidden_state, want.pooler_output, *want.deepstack_features), strict=True
            ):
                assert got.shape == old.shape
                assert (got - old).norm() <= 2e-6 * old.norm()  # as in test_transformers.py
        assert sum(rows[i] for _, _, rows, _ in results) == len(pixels(grid))  # each rank converts its share alone
    assert sum(items for _, items, _, _ in results) == sum(map(len, REQUESTS))
    assert sorted(items for _, items, _, _ in results)[:2] != [0, 0]
    refused = "grid_thw: expected frames >= 1 and patch sides that are positive multiples of 2, got [1, 3, 8]"
    text = f"data parallel encoding failed on rank 1: SpecError: Qwen3VLVisionModel: {refused}"
    assert [message for *_, message in results] == [text] * WORLD


if __name__ == "__main__":
    fork_ranks(process, WORLD)
