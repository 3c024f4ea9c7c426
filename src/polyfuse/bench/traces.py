"""Requests to plan for: what images a vision encoder is asked for, recorded or drawn.

A grid is `[frames, patch_rows, patch_cols]` of one item; a request is a list of grids, a trace a list of requests.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from polyfuse.spec import fail

# Height and width in pixels, and how often.
_RESOLUTIONS = (
    ((224, 224), 20),
    ((336, 336), 16),
    ((384, 384), 10),
    ((448, 448), 16),
    ((384, 512), 10),
    ((512, 512), 7),
    ((480, 640), 14),
    ((512, 768), 8),
    ((600, 800), 3),
    ((768, 1024), 3),
    ((720, 1280), 3),
)
_TOKENS_PER_IMAGE = 304


def tokens(grid: Sequence[int], merge: int = 2) -> int:
    """Output tokens of one item: its patches divided by `merge` squared."""
    frames, rows, cols = grid
    return frames * rows * cols // merge**2


def synthetic_trace(requests: int, seed: int = 0, max_items: int = 16) -> list[list[list[int]]]:
    """A trace of `requests` requests of 1 to `max_items` images of usual resolutions, the same for the same `seed`.

    The grids are those of Qwen3-VL: patches of 16 pixels, merged 2 by 2, sides rounded to whole merged patches. No
    request has more than 304 tokens per possible image (4,864 for 16), or than one largest image if that is more;
    the mean is about 1,900 for 16.
    Raises `SpecError` if `requests` is negative or `max_items` below 1.
    """
    if requests < 0:
        fail("synthetic_trace", "requests", "a number >= 0", requests)
    if max_items < 1:
        fail("synthetic_trace", "max_items", "a number >= 1", max_items)
    draw = random.Random(seed)
    grids = [[1, 2 * round(height / 32), 2 * round(width / 32)] for (height, width), _ in _RESOLUTIONS]
    weights = [weight for _, weight in _RESOLUTIONS]
    limit = max(_TOKENS_PER_IMAGE * max_items, *(tokens(grid) for grid in grids))
    trace: list[list[list[int]]] = []
    while len(trace) < requests:
        items = draw.randint(1, max_items)
        request = draw.choices(grids, weights, k=items)
        while sum(map(tokens, request)) > limit:
            request = draw.choices(grids, weights, k=items)
        trace.append([list(grid) for grid in request])
    return trace


def load_trace(path: str | Path) -> list[list[list[int]]]:
    """The trace in a JSON file: a list of requests, each a list of `[frames, patch_rows, patch_cols]`, merge 2.

    Raises `SpecError` if the file holds something else or a request without items, `OSError` if it cannot be read.
    """
    try:
        trace = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        fail("load_trace", "path", "a JSON file", f"{path} ({error})")
    if not isinstance(trace, list):
        fail("load_trace", "path", "a list of requests", type(trace).__name__)
    for i, request in enumerate(trace):
        if not isinstance(request, list) or not request:
            fail("load_trace", f"path[{i}]", "a list of at least one grid", request)
        for j, grid in enumerate(request):
            if not _is_grid(grid):
                fail("load_trace", f"path[{i}][{j}]", "[frames, patch_rows, patch_cols] with even rows and cols", grid)
    return trace


def _is_grid(grid: object) -> bool:
    return (
        isinstance(grid, list)
        and len(grid) == 3
        and all(type(size) is int and size >= 1 for size in grid)
        and grid[1] % 2 == 0
        and grid[2] % 2 == 0
    )
