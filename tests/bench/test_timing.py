"""The clock's arithmetic, on a device and with times that are made up."""

import re
from pathlib import Path

import pytest

import polyfuse.bench
from polyfuse.bench import timing
from polyfuse.bench.timing import Clock


@pytest.fixture
def world(monkeypatch):
    """A host on which a call takes 2 seconds, and a device that needs 3 more for each."""

    class World:
        now, queued, calls = 100.0, 0.0, 0

        def call(self):
            self.now, self.queued, self.calls = self.now + 2, self.queued + 3, self.calls + 1

        def wait(self, clock=None):
            self.now, self.queued = self.now + self.queued, 0.0

    made = World()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: made.now * 1e9)
    monkeypatch.setattr(Clock, "wait", made.wait)
    return made


@pytest.fixture
def clock():
    return Clock("somewhere")


def test_latencies_wait_before_and_after_each_call(world, clock):
    world.call()
    found = clock.latencies([world.call] * 3)
    assert found.done == [5.0] * 3
    assert found.returned == [2.0] * 3


def test_median_latency_and_its_number_of_calls(world, clock):
    assert clock.latency_ms(world.call, calls=7, warm_up=2) == 5e3
    assert world.calls == 9
    assert Clock("cpu").latency_ms(world.call, calls=7, warm_up=2) == 5e3
    assert world.calls == 9 + 5


def test_a_row_waits_for_its_last_call(world, clock):
    assert clock.row_ms(world.call, 4) == 5e3
    assert world.calls == 4


def test_a_queue_waits_for_none(world, clock):
    assert clock.queue_us(world.call, calls=4, rounds=3, warm_up=1) == 2e6
    assert world.calls == 13
    assert world.queued == 0


def test_a_limit_leaves_out_calls_and_then_rounds_but_one(world):
    """A call takes 5 seconds with its wait, and nothing more is warmed up than the two calls that are timed for it."""
    assert Clock("somewhere", 31.0).queue_us(world.call) == 2e6
    assert world.calls == 2 + 4  # 21 seconds are left
    world.calls = 0
    assert Clock("somewhere", 3.0).queue_us(world.call) == 2e6
    assert world.calls == 1 + 1
    assert Clock("somewhere", 1e9).queue_us(world.call, calls=4, rounds=3) == 2e6
    assert world.calls == 2 + 2 + 3


def test_cold_calls_come_one_by_one_behind_a_write(world, clock):
    assert clock.cold_us([world.call], rounds=3) == 5e6
    assert world.calls == 3
    assert Clock("somewhere", 12.0).cold_us([world.call]) == 5e6
    assert world.calls == 3 + 2
    assert Clock("somewhere", 1.0).cold_us([world.call]) == 5e6
    assert world.calls == 3 + 2 + 1


def test_a_budget_is_what_is_left_of_its_seconds(world):
    budget = timing.Budget(7.0)
    assert budget.left() == 7.0
    world.call()
    assert budget.left() == 5.0
    world.now += 9
    assert budget.left() == 0.0


def test_without_graphs_device_time_is_latency(world, clock):
    assert clock.device_us(world.call) == pytest.approx(5e6)


def test_host_time(world):
    assert timing.host_ns(world.call, calls=3, rounds=5) == 2e9
    assert world.calls == 16
    assert timing.seconds(world.call) == 2


def test_jax_time():
    jax = pytest.importorskip("jax")
    done, queued = timing.jax_us(jax.jit(lambda: jax.numpy.ones(8).sum()))
    assert 0 < queued <= done < 1e6
    calls = []
    timing.jax_us(lambda: calls.append(jax.numpy.ones(8).sum()) or calls[-1], limit=1e-9)
    assert len(calls) == 3


def test_no_other_measurement_has_a_clock_of_its_own():
    folder = Path(polyfuse.bench.__file__).parent
    timed = {path.name for path in folder.rglob("*.py") if re.search(r"perf_counter|elapsed_time", path.read_text())}
    assert timed == {"timing.py"}
