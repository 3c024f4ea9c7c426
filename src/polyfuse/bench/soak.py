"""Random requests from several threads through an encoder's graphs, each compared: what `polyfuse soak encoder` runs.

A batch depends on the seed and its number alone. Its outputs are compared with what the adapter computes uncaptured in
buffers of exactly its size. Between batches the graphs' static buffers are now and then filled with NaN.
"""

import gc
import random
import resource
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from polyfuse.bench import timing
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.subjects.vision import VisionModel, uncaptured
from polyfuse.runtime.encoder.buffers import Tensors
from polyfuse.runtime.encoder.manager import EncoderGraphManager

MAX_ITEMS = 12
OVERSIZE_SHARE, VIDEO_SHARE = 0.005, 0.1  # of the items
POISON_SHARE = 0.1  # of the batches
REPEAT_EVERY = 10  # batches
KEPT = 4  # batches of a thread whose outputs stay alive
MESSAGES = 20

# How far a row may be from the exact-size one's, of its norm, times the square root of the number of layers. Matrix
# products of other sizes may add in another order, and turn roundings the other way in every layer. bfloat16 runs with
# all roundings unrelated differ by up to 5.5e-3, 1.0e-2 and 1.4e-2 for 1, 4 and 12 layers of the real towers; float32
# ones were seen to differ by up to 5e-7. Rows that have nothing to do with each other differ by 1.4.
BOUND = {torch.bfloat16: 2.0**-7, torch.float32: 5e-6}


@dataclass
class SoakResult(Results):
    """What a run found. Memory is the device's, in bytes; on a CPU the most that the process has held."""

    model: str
    depth: int
    seed: int
    threads: int
    bound: float
    batches: int = 0
    items: int = 0
    repeated: int = 0
    poisoned: int = 0
    mismatches: int = 0
    worst: float = 0.0
    messages: list[str] = field(default_factory=list)  # of the first mismatches
    allocated: list[int] = field(default_factory=list)  # after a tenth of the batches, and after all
    reserved: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing differed, and allocated memory grew by no more than 1% and 64 MiB."""
        start, end = self.allocated
        return not self.mismatches and end - start <= start / 100 + 2**26

    @property
    def kind(self) -> str:
        return "soak_encoder_"

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, and `ok`."""
        return super().as_dict() | {"ok": self.ok}


class Soak:
    """One run of random batches, from several threads, each on a stream of its own."""

    def __init__(
        self,
        subject: VisionModel,
        batches: int,
        threads: int = 4,
        seed: int = 0,
        on_batch: Callable[[], object] = lambda: None,
    ) -> None:
        self.subject, self.batches, self.on_batch = subject, batches, on_batch
        self.encoder = subject.encoder()
        self.side = 4 if subject.tiny else 16  # of the largest image, in tokens
        unit = self.encoder.token_multiple if subject.fixed else self.side**2
        # Where nothing is captured a replay costs what an eager call does, and an optimal plan has none.
        policy = "optimal" if subject.captures else "greedy"
        settings: dict[str, Any] = {"smallest": max(1, unit // 4), "largest": 4 * unit, "max_graphs": 12}
        self.manager = EncoderGraphManager(self.encoder, **settings, policy=policy)
        self.oversize = [1, *[subject.merge * (2 * self.side + 1)] * 2]
        largest = [[3, subject.merge * self.side, subject.merge * self.side], self.oversize]
        self.rows = MAX_ITEMS * max(subject.rows([grid]) for grid in largest)
        bound = BOUND[subject.dtype] * subject.depth**0.5
        self.result = SoakResult(device_name(subject.device), subject.name, subject.depth, seed, threads, bound)
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.meeting = threading.Barrier(threads, self._sample_memory)

    def run(self) -> SoakResult:
        """Run all batches; one that raises is a mismatch too."""
        self.subject.reserve(2 * self.rows)
        self.manager.capture()
        self.subject.clock.wait()
        self.result.seconds = timing.seconds(self._run_threads)
        self.result.stats = self.manager.stats.as_dict()
        return self.result

    def _run_threads(self) -> None:
        with ThreadPoolExecutor(self.result.threads) as pool:
            futures = [pool.submit(self._work, thread) for thread in range(self.result.threads)]
            try:
                for future in futures:
                    future.result()
            finally:  # at an interrupt the threads end too
                self.stopped.set()
                self.meeting.abort()

    def _work(self, thread: int) -> None:
        cuda, tenth = self.subject.device.startswith("cuda"), self.batches // 10
        with torch.cuda.stream(torch.cuda.Stream(self.subject.device)) if cuda else nullcontext():
            for numbers in (range(tenth), range(tenth, self.batches)):
                kept: deque[tuple[int, Tensors, torch.Tensor]] = deque()
                for number in numbers[thread :: self.result.threads]:
                    if self.stopped.is_set():
                        return
                    try:
                        self._batch(number, kept)
                    except Exception as error:  # a finding, and no reason to stop
                        self._mismatch(number, f"{type(error).__name__}: {error}")
                    if len(kept) > KEPT:
                        self._check_kept(*kept.popleft())
                while kept:
                    self._check_kept(*kept.popleft())
                self.meeting.wait()

    def _batch(self, number: int, kept: deque[tuple[int, Tensors, torch.Tensor]]) -> None:
        draw, result = random.Random(f"{self.result.seed} {number}"), self.result
        request = [self._grid(draw) for _ in range(draw.randint(1, MAX_ITEMS))]
        arguments = self.subject.arguments(request, draw.randrange(self.rows))
        poison, repeat = draw.random() < POISON_SHARE, number % REPEAT_EVERY == 0
        if poison:
            self.manager.fill_buffers(torch.nan)
        outputs = self.manager.run(self.encoder.request(*arguments))
        kept.append((number, outputs, _checksums(outputs)))
        with self.manager.exclusive():  # while one thread compiles, PyTorch lets no other call what is compiled
            expected = uncaptured(self.encoder, *arguments)
        worst = row_difference(outputs, expected)
        if not worst <= result.bound:
            self._mismatch(number, f"a row differs by {worst:.1e} of its norm, in {request}")
        if repeat:
            again = self.manager.run(self.encoder.request(*arguments))
            if not all(torch.equal(outputs[name], again[name]) for name in outputs):
                self._mismatch(number, f"other values the second time, in {request}")
        with self.lock:
            result.batches, result.items = result.batches + 1, result.items + len(request)
            result.repeated, result.poisoned = result.repeated + repeat, result.poisoned + poison
            result.worst = max(result.worst, worst)
            self.on_batch()

    def _grid(self, draw: random.Random) -> list[int]:
        if draw.random() < OVERSIZE_SHARE:
            return self.oversize
        frames = draw.randint(2, 3) if draw.random() < VIDEO_SHARE else 1
        return [frames, *(self.subject.merge * draw.randint(1, self.side) for _ in range(2))]

    def _check_kept(self, number: int, outputs: Tensors, checksums: torch.Tensor) -> None:
        if not torch.equal(_checksums(outputs), checksums):
            self._mismatch(number, "outputs were overwritten after they had been returned")

    def _mismatch(self, number: int, text: str) -> None:
        with self.lock:
            self.result.mismatches += 1
            if len(self.result.messages) < MESSAGES:
                self.result.messages.append(f"batch {number}: {text}")

    def _sample_memory(self) -> None:
        gc.collect()
        self.subject.clock.wait()
        if self.subject.device == "cpu":
            allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            allocated = torch.accelerator.memory_allocated(self.subject.device)
            reserved = torch.accelerator.memory_reserved(self.subject.device)
        self.result.allocated.append(allocated)
        self.result.reserved.append(reserved)


def row_difference(outputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of two rows over all outputs, in shares of the expected row's norm; NaN if one is."""
    worst = []
    for name, rows in expected.items():
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
        differences = torch.linalg.vector_norm(outputs[name].float() - rows.float(), dim=-1)
        worst.append((differences / norms).max())
    return float(torch.stack(worst).max())


def _checksums(outputs: Tensors) -> torch.Tensor:
    words = {2: torch.int16, 4: torch.int32}
    return torch.stack([rows.view(words[rows.itemsize]).sum() for rows in outputs.values()])
