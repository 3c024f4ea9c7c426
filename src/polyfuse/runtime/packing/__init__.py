"""Packing of items into graph replays: which items of a request share a replay, and which budgets to capture.

**What is minimised.** An item is `(tokens, frames)`. A budget is a captured graph with three limits (tokens, items,
frames) and a cost in seconds, which is the same whatever is inside. A plan partitions a request's items into batches,
each on a budget that holds it, and at most one batch that is computed eagerly. `plan_packing` looks for the plan of the
least total seconds: the costs of its budgets, plus the eager time of its eager batch.

**How it is found** (`_search.py` runs these steps in turn):

1. Items that no budget can hold are eager. The plan with all the others in one batch is the first candidate.
2. `_bound.py` bounds all other plans from below. If none can be better, the first candidate is the answer.
3. Up to 8 items: `_exact.py` compares all partitions, by dynamic programming over subsets in O(3^items). Exact.
4. More items: `_tree.py` follows the most promising ways to serve the largest item that is left, down to depth 3 in
   several ways, below that in one. `_node.py` finds these ways: the largest item is eager, or on one of the budgets
   with the others that fill it best, as `_subset_sums.py` tells. This is a heuristic of bounded effort, about a
   millisecond at most: it drops branches that cannot gain 0.1%, and looks at few budgets where many replays are left.
5. The plan of `_greedy.py` is taken if the heuristic did no better.

Filling one budget by subset sums is exact but for long requests, whose sums are rounded to coarser grains.

**Which budgets to capture** is `suggest.py`: exact for a given sample of requests, in
O(graphs * distinct sizes * log(distinct sizes)).

`_menu.py` prepares the budgets for looking up, `_problem.py` one request. All of it is standard library only.
"""

from polyfuse.runtime.packing.planner import plan_packing, suggest_budgets

__all__ = ["plan_packing", "suggest_budgets"]
