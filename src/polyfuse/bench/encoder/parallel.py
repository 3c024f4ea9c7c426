"""A request of many images on one rank, and over all ranks of torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from polyfuse.bench.encoder.trace import TraceRow, trace_row, warmed_up
from polyfuse.bench.subjects.vision import VisionModel
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.spec import fail

IMAGES, PIXELS, REQUESTS = 20, 336, 50


def measure_parallel(subject: VisionModel) -> list[TraceRow]:
    """Measure twenty images of 336 x 336 pixels on rank 0 alone, and over all ranks.

    torch.distributed is initialised. All ranks call it together; what it returns counts on rank 0.
    """
    side = subject.merge * round(PIXELS / (subject.patch_size * subject.merge))
    request, ranks = [[1, side, side]] * IMAGES, dist.get_world_size()
    trace = [request] * REQUESTS
    subject.reserve(subject.rows(request))
    shares = IMAGES, -(-IMAGES // ranks), max(1, IMAGES // ranks)
    budgets = [subject.tokens(request[:images]) for images in shares]
    manager = EncoderGraphManager(subject.encoder(), budgets=budgets, max_items=IMAGES)
    manager.capture()
    calls = warmed_up(subject, trace, DataParallelEncoder(manager).execute)
    rows = [trace_row(subject, trace, f"{ranks} ranks", calls)]
    dist.barrier()
    if dist.get_rank() == 0:
        rows.insert(0, trace_row(subject, trace, "one rank", warmed_up(subject, trace, manager.execute)))
    dist.barrier()
    return rows


@contextmanager
def torchrun_rank(device: str) -> Iterator[tuple[int, int, str]]:
    """This process as a rank of torchrun's, by NCCL on CUDA and gloo elsewhere: the rank, how many, and its device.

    Raises `SpecError` in a process that torchrun did not start.
    """
    if "LOCAL_RANK" not in os.environ:
        command = "torchrun --nproc-per-node 4 -m polyfuse bench encoder --data-parallel"
        fail("bench encoder", "--data-parallel", "a process started by torchrun", "none of its variables", command)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()
