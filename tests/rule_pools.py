"""Calls of `gated_delta_rule` with a pool of states, for the tests of the backends that write it in place."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from polyfuse.conformance import Case, make_inputs
from polyfuse.dispatch import from_numpy
from polyfuse.spec import OPS

ROWS = ("q", "k", "v", "g", "beta")
LENGTHS = [2, 0, 70, 9, 1]
SLOTS = [4, 6, -1, 1, 3]  # of 7
NO_POOL: dict[str, Any] = dict.fromkeys(("state_pool", "state_indices", "has_initial_state"))


def arguments(dtype: str = "float32", device: str = "cpu", rows: int = 84, **changed: Any) -> dict[str, Any]:
    """Five packed sequences of bfloat16, of which the third has no slot and the last no initial state."""
    dims = {"L": rows, "H": 1, "HV": 2, "K": 16, "V": 8, "slots": 7}
    fill = {"q": "unit", "k": "unit", "g": "decay", "beta": "gate"}
    case = Case("pool", dims, dtypes={"T": "bfloat16", "state_pool": dtype}, present=("state_pool",), fill=fill)
    values = make_inputs(OPS["gated_delta_rule"], case)
    values |= {
        "cu_seqlens": np.cumsum([0, *LENGTHS]),
        "state_indices": np.array(SLOTS, np.int32),
        "has_initial_state": np.array([True, True, True, True, False]),
    }
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays, **changed}


def found(args: dict[str, Any]) -> torch.Tensor:
    """The states [S, HV, K, V] that the sequences of `arguments` begin from."""
    state = args["state_pool"][SLOTS].float()
    state[[2, 4]] = 0
    return state


def in_parts(function: Any, whole: dict[str, Any], ends: list[int]) -> torch.Tensor:
    """o of one sequence, in calls that end at these rows, each from the slot that the last wrote.

    The rows of another sequence, which has no slot, come before it in each call.
    """
    parts = []
    for number, (begin, end) in enumerate(pairwise([0, *ends])):
        rows = {name: torch.cat([torch.full_like(whole[name][:3], -9.0), whole[name][begin:end]]) for name in ROWS}
        starts, indices, valid = (
            torch.tensor(values, device=whole["v"].device)
            for values in ([0, 3, 3 + end - begin], [-1, 2], [True, number > 0])
        )
        call = {"cu_seqlens": starts, "state_indices": indices, "has_initial_state": valid}
        parts.append(function(**whole | rows | call)[0][3:])
    return torch.cat(parts)
