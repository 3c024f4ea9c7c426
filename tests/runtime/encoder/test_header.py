"""Ranks whose calls differ: all of three gloo processes, which run this file, raise, and the next request works."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.header import check_headers, failed_header, header
from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, ItemSize, Rows
from tests.forked_ranks import fork_ranks, run_ranks
from tests.runtime.encoder.ranks import Encoder, Manager, attempt, images

WORLD = 3
TIMEOUT = 20.0
GOOD = (40, 30, 20, 10)
REFUSED = "SpecError: encoder: pixels: expected images with tokens, got "
FAILED = "data parallel encoding failed"
EQUAL = "data parallel encoding: expected equal calls on all ranks, got"

# What each rank calls with; and the error that all of them raise.
CALLS: dict[str, tuple[Any, str]] = {
    "one image more": (
        [GOOD, GOOD, (*GOOD, 5)],
        f"{EQUAL} items 4 of 100 tokens, as (tokens, frames) [(40, 1), (30, 1), (20, 1), (10, 1)] on ranks 0, 1; "
        "items 5 of 105 tokens, as (tokens, frames) [(40, 1), (30, 1), (20, 1), (10, 1), (5, 1)] on rank 2",
    ),
    "one image less": (
        [(40,), (40, 9000), (40, 9000)],
        f"{EQUAL} items 1 of 40 tokens, as (tokens, frames) [(40, 1)] on rank 0; "
        "items 2 of 9040 tokens, as (tokens, frames) [(40, 1), (9000, 1)] on ranks 1, 2",
    ),
    "another order": (
        [(4, 5), (5, 4), (4, 5)],
        f"{EQUAL} items 2 of 9 tokens, as (tokens, frames) [(4, 1), (5, 1)] on ranks 0, 2; "
        "items 2 of 9 tokens, as (tokens, frames) [(5, 1), (4, 1)] on rank 1",
    ),
    "bad on one": ([GOOD, (), GOOD], f"{FAILED} on rank 1: {REFUSED}[]"),
    "bad on two": ([(), GOOD, (3, 0)], f"{FAILED} on rank 0: {REFUSED}[]; on rank 2: {REFUSED}[3, 0]"),
}
WIDE = BufferSpec(Rows(per_token=1), (3,), torch.float64)
# What the encoder of rank 1 has of its own; and what of it the error of all ranks names.
ENCODERS = {
    "name": ({"name": "Tower"}, "encoder Encoder on ranks 0, 2; encoder Tower on rank 1"),
    "dtype": (
        {"inputs": {"pixels": WIDE}},
        "inputs pixels float32 [1*tokens, 3] on ranks 0, 2; inputs pixels float64 [1*tokens, 3] on rank 1",
    ),
    "outputs": (
        {"outputs": {"wide": WIDE}},
        "outputs embeds bfloat16 [1*tokens, 3], levels float32 [2*tokens + 1*items, 3], count int64 [1*items] "
        "on ranks 0, 2; outputs wide float64 [1*tokens, 3] on rank 1",
    ),
    "multiple": ({"token_multiple": 2}, "token_multiple 1 on ranks 0, 2; token_multiple 2 on rank 1"),
}


def process(rank: int, directory: Path) -> None:
    """All scenarios on one rank, each followed by a good request; the outcomes go to a file."""
    init = f"file://{directory}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    manager = Manager()
    encoder = DataParallelEncoder(manager, timeout_s=TIMEOUT)
    outer = dist.new_group([0, 2])
    seen = {}

    def note(name, execute, tokens):
        seen[name] = attempt(execute, images(*tokens))
        seen[f"{name}, ran"] = list(manager.ran)
        manager.encoder = Encoder()
        seen[f"after {name}"] = attempt(encoder.execute, images(*GOOD))
        manager.ran.clear()

    for name, (calls, _) in CALLS.items():
        note(name, encoder.execute, calls[rank])
    for name, (changed, _) in ENCODERS.items():
        if rank == 1:
            vars(manager.encoder).update(changed)
        note(name, encoder.execute, GOOD)
    note("bad on all", encoder.execute, (3, 0))
    note("bad in two ways", encoder.execute, (3, 0) if rank == 1 else ())
    if rank == 1:
        manager.encoder.request = None
    note("errors of two types", encoder.execute, ())
    if rank == 1:
        manager.encoder.outputs = {"huge": BufferSpec(Rows(per_token=1), (1 << 50,), torch.float32)}
    note("no memory", encoder.execute, GOOD)
    pixels = images(*GOOD)
    seen["pixels"] = attempt(encoder.execute, [image + rank for image in pixels])
    if rank != 1:
        seen["of a part"] = attempt(DataParallelEncoder(manager, outer).execute, images(4, 5 + rank))
    torch.save(seen, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    module = "tests.runtime.encoder.test_header"
    run_ranks(module, directory, options=["-W", "error"], timeout_s=60, TORCH_CPP_LOG_LEVEL="FATAL")
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def raised(outcomes, name):
    """The one text of a `RuntimeError` that every rank raised, none of which waited or encoded anything."""
    assert [seen[name]["type"] for seen in outcomes] == ["RuntimeError"] * WORLD
    assert max(seen[name]["seconds"] for seen in outcomes) < TIMEOUT / 2
    assert [seen[f"{name}, ran"] for seen in outcomes] == [[]] * WORLD
    (text,) = {seen[name]["text"] for seen in outcomes}
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", CALLS)
def test_unequal_calls_raise_on_all_ranks(outcomes, name):
    assert raised(outcomes, name) == CALLS[name][1]


@pytest.mark.parametrize("name", ENCODERS)
def test_unequal_encoders_raise_on_all_ranks(outcomes, name):
    assert raised(outcomes, name) == f"{EQUAL} {ENCODERS[name][1]}"


def test_a_rank_raises_from_its_own_error(outcomes):
    assert [seen["bad on one"]["cause"] for seen in outcomes] == [None, f"{REFUSED}[]"[:40], None]


def test_errors_of_one_type_on_all_ranks_are_raised_as_they_are(outcomes):
    for name, got in (("bad on all", ["[3, 0]"] * WORLD), ("bad in two ways", ["[]", "[3, 0]", "[]"])):
        texts = [f"{seen[name]['type']}: {seen[name]['text']}" for seen in outcomes]
        assert texts == [f"{REFUSED}{tokens}" for tokens in got]


def test_errors_of_two_types_become_one(outcomes):
    text = f"{FAILED} on rank 0: {REFUSED}[]; on rank 1: TypeError: 'NoneType' object is not callable; "
    assert raised(outcomes, "errors of two types") == f"{text}on rank 2: {REFUSED}[]"


def test_a_rank_without_memory_tells_the_others(outcomes):
    assert raised(outcomes, "no memory").startswith(f"{FAILED} on rank 1: RuntimeError: ")


@pytest.mark.parametrize(
    "name", [*CALLS, *ENCODERS, "bad on all", "bad in two ways", "errors of two types", "no memory"]
)
def test_the_next_request_works(outcomes, name):
    request = Encoder().request(images(*GOOD))
    want = Encoder().result(Manager().run(request), request)
    for seen in outcomes:
        torch.testing.assert_close(seen[f"after {name}"]["result"], want, rtol=0, atol=0)


def test_other_pixels_are_not_seen(outcomes):
    """Every rank gets each item as the rank encoded it that ran it: here item `i` rank `i`, and the last one rank 2."""
    embeds = [seen["pixels"]["result"]["embeds"] for seen in outcomes]
    want = [2 * (image + rank) for image, rank in zip(images(*GOOD), (0, 1, 2, 2), strict=True)]
    assert all(torch.equal(got, torch.cat(want).bfloat16()) for got in embeds)


def test_messages_name_the_ranks_of_the_world(outcomes):
    text = (
        f"{EQUAL} items 2 of 9 tokens, as (tokens, frames) [(4, 1), (5, 1)] on rank 0; "
        "items 2 of 11 tokens, as (tokens, frames) [(4, 1), (7, 1)] on rank 2"
    )
    assert [outcomes[rank]["of a part"]["text"] for rank in (0, 2)] == [text] * 2


def test_a_row_has_one_size_and_its_digests_are_of_all():
    sizes = [(1,), (9,) * 99 + (1,), (9,) * 99 + (2,)]
    rows = [header(Encoder(), EncoderRequest(tuple(map(ItemSize, tokens)), {})) for tokens in sizes]
    rows += [failed_header(ValueError("x" * n)) for n in (0, 5000)]
    assert {len(row) for row in rows} == {1288}
    with pytest.raises(RuntimeError, match=r"items 100 of 892 tokens.*\.\.\. on rank 0; items 100 of 893 tokens"):
        check_headers([rows[1], rows[2]], [0, 1], None)
    with pytest.raises(RuntimeError, match=r"on rank 7: ValueError: x{1268}$"):
        check_headers([rows[0], rows[4]], [5, 7], None)
    check_headers([rows[1]] * 2, [0, 1], None)


if __name__ == "__main__":
    fork_ranks(process, WORLD)
