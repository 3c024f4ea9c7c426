"""Data-parallel encoding: the assignment here, the encoder in four gloo processes, which run this file."""

import os
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from polyfuse import SpecError
from polyfuse.runtime.encoder import data_parallel
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder, assign_items, item_cost
from polyfuse.runtime.encoder.protocol import ItemSize
from tests.forked_ranks import fork_ranks, run_ranks
from tests.runtime.encoder.ranks import Encoder, Manager, attempt, images

WORLD = 4
REQUESTS = {
    "uneven": [5, 700, 1, 33, 33, 12, 640, 7, 7, 128],
    "one_each": [40, 30, 20, 10],
    "fewer_than_ranks": [3, 900],
    "one": [17],
}


def process(rank: int, directory: Path) -> None:
    """All scenarios on one rank; the outcomes go to a file."""
    init = f"file://{directory}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    gather = data_parallel._all_gather = Mock(side_effect=data_parallel._all_gather)
    manager = Manager()
    pair = dist.new_group([1, 3])
    seen = {"pair": attempt(lambda: DataParallelEncoder(manager, pair).execute(images(5, 2, 9)))}
    encoder = DataParallelEncoder(manager)
    for name, tokens in REQUESTS.items():
        manager.ran.clear()
        gather.reset_mock()
        seen[name] = attempt(encoder.execute, images(*tokens))
        seen[name] |= {"ran": list(manager.ran), "collectives": gather.call_count}
    for name, ranks, text in (("raises", [2], "deliberate"), ("two_raise", [0, 3], "x" * 5000)):
        manager.error = ValueError(text) if rank in ranks else None
        seen[name] = attempt(encoder.execute, images(*REQUESTS["one_each"]))
        manager.error = None
        seen[f"after_{name}"] = attempt(encoder.execute, images(*REQUESTS["one_each"]))
    short = DataParallelEncoder(manager, timeout_s=1.5)
    if rank != 3:
        seen["late"] = attempt(short.execute, images(1, 2))
    else:
        time.sleep(2)
    seen["after_late"] = attempt(encoder.execute, images(*REQUESTS["one_each"]))
    if rank != 3:
        seen["exit"] = attempt(encoder.execute, images(*REQUESTS["one_each"]))
    torch.save(seen, directory / f"{rank}.pt")
    os._exit(0)  # rank 3 dies; the others leave no group behind to close


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    module = "tests.runtime.encoder.test_data_parallel"
    run_ranks(module, directory, options=["-W", "error"], timeout_s=60, TORCH_CPP_LOG_LEVEL="FATAL")
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def expected(tokens):
    request = Encoder().request(images(*tokens))
    return Encoder().result(Manager().run(request), request)


def check(outcome, tokens):
    torch.testing.assert_close(outcome["result"], expected(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_every_rank_gets_what_one_process_computes(outcomes, name):
    for seen in outcomes:
        check(seen[name], REQUESTS[name])


@pytest.mark.parametrize("name", REQUESTS)
def test_each_item_runs_once_on_its_rank_and_two_collectives_are_made(outcomes, name):
    assigned = assign_items([item_cost(ItemSize(n)) for n in REQUESTS[name]], WORLD)
    assert [seen[name]["ran"] for seen in outcomes] == [[items] if items else [] for items in assigned]
    assert [seen[name]["collectives"] for seen in outcomes] == [2] * WORLD


def test_a_group_smaller_than_the_world(outcomes):
    for rank in (1, 3):
        check(outcomes[rank]["pair"], [5, 2, 9])
    for rank in (0, 2):
        assert outcomes[rank]["pair"]["text"] == (
            "DataParallelEncoder: group: expected a group of this process, got one without it"
        )


def test_an_error_on_one_rank_is_raised_on_all(outcomes):
    text = "data parallel encoding failed on rank 2: ValueError: deliberate"
    assert [seen["raises"]["text"] for seen in outcomes] == [text] * WORLD
    assert [seen["raises"]["type"] for seen in outcomes] == ["RuntimeError"] * WORLD
    assert [seen["raises"]["cause"] for seen in outcomes] == [None, None, "ValueError: deliberate", None]


def test_all_failing_ranks_are_named_and_long_messages_cut(outcomes):
    text = "ValueError: " + "x" * (4096 - len("ValueError: "))
    text = f"data parallel encoding failed on rank 0: {text}; on rank 3: {text}"
    assert [seen["two_raise"]["text"] for seen in outcomes] == [text] * WORLD


@pytest.mark.parametrize("name", ["after_raises", "after_two_raise", "after_late"])
def test_the_next_request_works(outcomes, name):
    for seen in outcomes:
        check(seen[name], REQUESTS["one_each"])


def test_a_late_rank_does_not_hang_the_others(outcomes):
    for seen in outcomes[:3]:
        assert seen["late"]["type"] == "RuntimeError"
        assert 1 < seen["late"]["seconds"] < 10


def test_a_dead_rank_does_not_hang_the_others(outcomes):
    for seen in outcomes[:3]:
        assert seen["exit"]["type"] == "RuntimeError"
        assert seen["exit"]["seconds"] < 10


def test_without_torch_distributed():
    with pytest.raises(SpecError, match=r"DataParallelEncoder: group: expected torch.distributed to be initialised"):
        DataParallelEncoder(Manager())


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_runs_locally(alone, monkeypatch):
    monkeypatch.setattr(data_parallel, "_all_gather", None)
    manager = Manager()
    check({"result": DataParallelEncoder(manager).execute(images(5, 2))}, [5, 2])
    assert manager.ran == [None]
    manager.error = ValueError("deliberate")
    with pytest.raises(ValueError, match=r"^deliberate$"):
        DataParallelEncoder(manager).execute(images(5, 2))


def test_no_gradient_is_recorded(alone):
    pixels = [image.requires_grad_() for image in images(5, 2)]
    assert not DataParallelEncoder(Manager()).execute(pixels)["levels"].requires_grad


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_positive_and_finite(alone, timeout):
    text = f"DataParallelEncoder: timeout_s: expected a finite number of seconds > 0, got {timeout}"
    with pytest.raises(SpecError, match=f"^{text}$"):
        DataParallelEncoder(Manager(), timeout_s=timeout)


def test_assignment_of_known_costs():
    assert assign_items([3, 1, 4, 1, 5, 9, 2, 6], 3) == [[5, 6], [0, 1, 7], [2, 3, 4]]
    assert assign_items([1.0] * 5, 2) == [[0, 1, 2], [3, 4]]
    assert assign_items([7, 8], 4) == [[1], [0], [], []]
    assert assign_items([], 2) == [[], []]
    assert assign_items([0, 0, 0], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_assignment_is_a_balanced_partition(ranks):
    generator = torch.Generator().manual_seed(ranks)
    for items in (1, 2, 7, 40, 200):
        costs = torch.randint(1, 5000, (items,), generator=generator).tolist()
        assigned = assign_items(costs, ranks)
        assert sorted(i for items in assigned for i in items) == list(range(items))
        assert all(items == sorted(items) for items in assigned)
        loads = [sum(costs[i] for i in items) for items in assigned]
        assert max(loads) - min(loads) <= max(costs)
        assert assign_items(costs, ranks) == assigned


def test_assignment_refuses_bad_arguments():
    with pytest.raises(SpecError, match=r"^assign_items: ranks: expected an integer >= 1, got 0$"):
        assign_items([1.0], 0)
    for bad in (-1.0, float("nan"), float("inf")):
        text = rf"^assign_items: costs\[1\]: expected a finite number >= 0, got {bad}$"
        with pytest.raises(SpecError, match=text):
            assign_items([1.0, bad], 2)


def test_costs_count_attention_within_a_frame():
    assert item_cost(ItemSize(1650)) == 3300
    assert item_cost(ItemSize(1650, frames=10)) == pytest.approx(1815)
    assert item_cost(ItemSize(64)) == pytest.approx(64 + 64**2 / 1650)


if __name__ == "__main__":
    fork_ranks(process, WORLD)
