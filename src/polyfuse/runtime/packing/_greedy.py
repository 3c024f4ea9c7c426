"""The greedy policy: items by ascending tokens, each batch filled up to the limits of the largest budget."""

from collections.abc import Sequence

from polyfuse.runtime.packing._menu import Budget
from polyfuse.runtime.packing._plans import Groups


def greedy_groups(sizes: Sequence[tuple[int, int]], budgets: Sequence[Budget]) -> Groups:
    """Items by ascending tokens, filled up to the largest budget's limits; the smallest budget for each batch.

    Items that the largest budget cannot hold are eager, all in one batch.
    """
    ascending = sorted(budgets)
    largest = ascending[-1] if ascending else Budget(0, 0, 0, 0.0)
    batches: list[list[int]] = []
    eager: list[int] = []
    held_tokens = held_frames = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0]):
        tokens, frames = sizes[i]
        if tokens > largest.tokens or frames > largest.frames:
            eager.append(i)
            continue
        held_tokens, held_frames = held_tokens + tokens, held_frames + frames
        over = held_tokens > largest.tokens or held_frames > largest.frames
        if not batches or over or len(batches[-1]) == largest.items:
            batches.append([])
            held_tokens, held_frames = tokens, frames
        batches[-1].append(i)
    groups: list[tuple[tuple[int, ...], Budget | None]] = []
    for batch in batches:
        tokens = sum([sizes[i][0] for i in batch])
        frames = sum([sizes[i][1] for i in batch])
        smallest = next(budget for budget in ascending if budget.holds(tokens, len(batch), frames))
        groups.append((tuple(batch), smallest))
    if eager:
        groups.append((tuple(eager), None))
    return tuple(groups)
