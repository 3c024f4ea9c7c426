"""`examples/serve_gdn_layer.py`: its requests have the rows that they have alone, and planted defects are found."""

import sys
from collections import Counter
from importlib import util
from pathlib import Path

import pytest
import torch

import polyfuse

EXAMPLE = Path(__file__).parents[1] / "examples/serve_gdn_layer.py"


@pytest.fixture
def example(monkeypatch):
    """The example as a module. One thread, as the example itself sets: with more, such small tensors take longer."""
    spec = util.spec_from_file_location("serve_gdn_layer", EXAMPLE)
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their types up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def served(example, layer, seeds, longest=70):
    """What the schedules of these seeds ran, and how many rows differ."""
    total = Counter()
    with torch.inference_mode():
        for seed in seeds:
            total.update(example.run_schedule(layer, seed, longest))
    return total


def new_request(example, layer, rows=3, wanted=2):
    return example.Request(list(torch.randn(rows, layer.hidden)), wanted)


@pytest.mark.parametrize(
    ("dtype", "seeds"),
    [
        (torch.float32, range(25)),
        pytest.param(torch.float32, range(25, 75), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, range(75, 100), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_requests_that_are_served_together_have_the_rows_of_requests_run_alone(example, dtype, seeds):
    total = served(example, example.Layer(dtype=dtype), seeds)
    assert total["mismatches"] == 0
    assert total["rows"] > 100 * len(seeds)
    assert min(total["swapped"], total["recomputed"]) > len(seeds) / 2


@pytest.mark.slow
def test_a_thousand_schedules(example, capsys):
    assert example.main(["--schedules", "1000", "--seed", "100"]) == 0
    assert capsys.readouterr().out.endswith(" 0 mismatches\n")


@pytest.mark.slow
def test_two_schedules_in_the_triton_interpreter(example):
    with polyfuse.use_backend("triton"):
        total = served(example, example.Layer(), range(2), longest=20)
    assert total["mismatches"] == 0
    assert min(total["swapped"], total["recomputed"]) > 0


def changed(name, change):
    """A defect: an op that is called with other arguments by keyword."""

    def plant(monkeypatch, _):
        op = getattr(polyfuse, name)
        monkeypatch.setattr(polyfuse, name, lambda *tensors, **named: op(*tensors, **change(named)))

    return plant


def always_initial(named):
    return {**named, "has_initial_state": None}


def padding_in_slot_0(named):
    indices = named["state_indices"]
    return {**named, "state_indices": None if indices is None else indices.clamp(min=0)}


def where_slots_are_named(change):
    """A change of an engine's calls alone: a request that runs alone has no need of state_indices."""
    return lambda named: change(named) if "state_indices" in named else named


def loses_conv_state(monkeypatch, example):
    class Engine(example.Engine):
        def preempt(self, request, swap):
            super().preempt(request, swap)
            if request.swapped is not None:
                request.swapped[0].zero_()

    monkeypatch.setattr(example, "Engine", Engine)


def forgets_generated_rows(monkeypatch, example):
    class Engine(example.Engine):
        def preempt(self, request, swap):
            super().preempt(request, swap)
            if request.swapped is None and request.generated:
                request.generated[-1] = request.prompt[0]

    monkeypatch.setattr(example, "Engine", Engine)


@pytest.mark.parametrize(
    "plant",
    [
        changed("gdn_conv_prep", where_slots_are_named(always_initial)),
        changed("gated_delta_rule", where_slots_are_named(always_initial)),
        changed("gdn_conv_prep", where_slots_are_named(padding_in_slot_0)),
        changed("gated_delta_rule", where_slots_are_named(padding_in_slot_0)),
        changed("gdn_decode", padding_in_slot_0),
        loses_conv_state,
        forgets_generated_rows,
    ],
    ids=[
        "conv-has_initial_state-ignored",
        "rule-has_initial_state-ignored",
        "conv-padding-in-slot-0",
        "rule-padding-in-slot-0",
        "decode-padding-in-slot-0",
        "swap-without-conv-state",
        "recompute-with-another-input",
    ],
)
def test_a_defect_makes_mismatches(example, monkeypatch, plant):
    plant(monkeypatch, example)
    assert served(example, example.Layer(), range(4))["mismatches"] > 0


@pytest.mark.parametrize("stale", ["finite", "NaN"])
def test_a_state_left_in_a_slot_is_seen_if_the_next_owner_reads_it(example, monkeypatch, stale):
    layer = example.Layer()
    engine, requests = example.Engine(layer, slots=1, batch=2), [new_request(example, layer) for _ in range(2)]
    changed("gated_delta_rule", where_slots_are_named(always_initial))(monkeypatch, example)
    if stale == "finite":
        for pool in engine.pools:
            pool.zero_()
    for request in requests:
        engine.admit(request)
        engine.step([(request, 3)], [])
        engine.step([], [request])
        assert engine.free == [0]
    assert [example.differing(layer, request) > 0 for request in requests] == [stale == "NaN", True]


def test_one_bit_is_a_mismatch(example):
    layer = example.Layer()
    engine, request = example.Engine(layer, slots=1, batch=1), new_request(example, layer)
    engine.admit(request)
    engine.step([(request, 2)], [])
    assert example.differing(layer, request) == 0
    request.rows[1][7:8].view(torch.int32).bitwise_xor_(1)
    assert example.differing(layer, request) == 1


def test_an_error_of_one_bit_grows(example):
    layer = example.Layer()
    right = torch.randn(40, layer.hidden, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[-1, :1].view(torch.int32).bitwise_xor_(1)
    calls = [("prefill", 40), *[("decode", 1)] * 20]
    rows, others = (
        torch.stack(example.run_alone(layer, example.Request(list(prompt), 21, calls=calls)))
        for prompt in (right, wrong)
    )
    errors = (rows - others).abs().amax(1)
    assert (errors > 0).tolist() == [False] * 39 + [True] * 21
    assert errors[-1] > 10 * errors[39]


def test_a_slot_is_cleared_by_no_one_and_given_on(example):
    layer = example.Layer()
    engine, requests = (
        example.Engine(layer, slots=1, batch=1),
        [new_request(example, layer, wanted=1) for _ in range(2)],
    )
    for request in requests:
        engine.admit(request)
        engine.step([(request, 3)], [])
        assert request.slot == -1
        assert all(pool[0].isfinite().all() and pool[0].any() for pool in engine.pools)
    assert [example.differing(layer, request) for request in requests] == [0, 0]


def test_two_requests_on_one_slot_are_refused_before_anything_runs(example):
    layer = example.Layer()
    engine = example.Engine(layer, slots=2, batch=2)
    for _ in range(2):
        engine.admit(new_request(example, layer))
    first, second = engine.running
    engine.step([(first, 3), (second, 3)], [])
    before = [pool.clone() for pool in engine.pools]
    second.slot = first.slot
    with pytest.raises(RuntimeError, match=r"each slot must be free or one request's, got free \[\], all \[1, 1\]"):
        engine.step([], [first, second])
    assert all(torch.equal(*pair) for pair in zip(before, engine.pools, strict=True))


def test_a_slot_that_is_freed_twice_is_refused(example, monkeypatch):
    class Engine(example.Engine):
        def _release(self, request):
            self.free.append(request.slot)
            super()._release(request)

    monkeypatch.setattr(example, "Engine", Engine)
    with pytest.raises(RuntimeError, match="each slot must be free or one request's"):
        served(example, example.Layer(), range(1))


def test_a_request_twice_in_a_step_or_without_a_slot_is_refused(example):
    layer = example.Layer()
    engine, request = example.Engine(layer, slots=1, batch=2), new_request(example, layer)
    with pytest.raises(RuntimeError, match="each request once, and only one that has a slot"):
        engine.step([(request, 3)], [])
    engine.admit(request)
    with pytest.raises(RuntimeError, match="each request once, and only one that has a slot"):
        engine.step([(request, 1)], [request])


@pytest.mark.parametrize("counts", [[64, 86], [128, 22], [64, 64, 22]], ids=str)
def test_splits_at_multiples_of_64_change_no_bit_of_a_prompt(example, counts):
    layer = example.Layer()
    prompt = list(torch.randn(150, layer.hidden))
    whole, split = (
        example.run_alone(layer, example.Request(prompt, 1, calls=[("prefill", count) for count in some]))
        for some in ([150], counts)
    )
    assert torch.equal(torch.stack(whole), torch.stack(split))


def test_the_script_says_what_it_ran_and_ends_with_1_on_a_mismatch(example, monkeypatch, capsys):
    assert example.main(["--schedules", "2", "--seed", "3"]) == 0
    counts = example.run_schedule(example.Layer(), 3)
    counts = {name: number + example.run_schedule(example.Layer(), 4)[name] for name, number in counts.items()}
    assert capsys.readouterr().out == (
        "2 schedules: {steps} steps, {swapped} swapped, {recomputed} recomputed, {rows} rows, 0 mismatches\n"
    ).format(**counts)
    monkeypatch.setattr(example, "differing", lambda layer, request: 1)
    assert example.main(["--schedules", "1", "--seed", "3"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("seed 3: ")
    assert last.startswith("1 schedules: ")
