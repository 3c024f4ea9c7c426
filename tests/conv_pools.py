"""Calls of `gdn_conv_prep` with a pool of states, for the tests of the backends that write it in place."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from polyfuse.conformance import Case, make_inputs
from polyfuse.dispatch import from_numpy
from polyfuse.spec import OPS

HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
LENGTHS = [2, 0, 5, 9, 1]
SLOTS = [4, 6, -1, 1, 3]  # of 7
SPEC = OPS["gdn_conv_prep"]


def arguments(columns: int = 5, dtype: str = "float32", device: str = "cpu", **changed: Any) -> dict[str, Any]:
    """Five packed sequences of bfloat16, of which the third has no slot and the last no initial state."""
    dims = {"L": 20, "HV": 4, "W": 4, "slots": 7, "n": columns}
    dtypes = {"T": "bfloat16", "weight": "bfloat16", "state_pool": dtype}
    values = make_inputs(SPEC, Case("pool", dims, HEADS, dtypes, present=("bias", "state_pool")))
    values |= {
        "cu_seqlens": np.cumsum([0, *LENGTHS]),
        "state_indices": np.array(SLOTS, np.int32),
        "has_initial_state": np.array([True, True, True, True, False]),
    }
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays, **changed}


def bits(x: torch.Tensor) -> list[Any]:
    """Its bytes, NaN of every kind told apart."""
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(unsigned).tolist()


def any_bits(pool: torch.Tensor) -> torch.Tensor:
    """A pool of this shape, dtype and layout, that holds random bits: every kind of NaN."""
    unsigned, size = {2: torch.int16, 4: torch.int32}[pool.element_size()], 8 * pool.element_size()
    random = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1), pool.shape, generator=torch.Generator().manual_seed(3))
    return torch.empty_like(pool).copy_(random.to(unsigned).view(pool.dtype).to(pool.device))


def in_parts(function: Any, whole: dict[str, Any], ends: list[int]) -> list[torch.Tensor]:
    """The first five results for one sequence in calls that end at these rows, each from the slot that the last wrote.

    The rows of the others, which have no slot, are in between.
    """
    found = []
    for number, (begin, end) in enumerate(pairwise([0, *ends])):
        length = end - begin
        part = {name: whole[name][begin:end] for name in ("x", "a", "b")}
        noise = {name: torch.full_like(whole[name][:3], 9.0) for name in part}
        starts = torch.tensor([0, 3, 3 + length], device=whole["x"].device)
        call = whole | {name: torch.cat([noise[name], part[name]]) for name in part}
        indices = torch.tensor([-1, 2], device=starts.device)
        valid = torch.tensor([True, number > 0], device=starts.device)
        results = function(**call | {"cu_seqlens": starts, "state_indices": indices, "has_initial_state": valid})
        found.append([result[3:] for result in results[:5]])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
