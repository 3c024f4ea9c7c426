"""`gated_delta_rule` by `fla.ops.gated_delta_rule.chunk_gated_delta_rule`, which is the chunked form of the spec.

FLA counts the chunks of packed sequences on the host. Their boundaries are read once here, and FLA gets only what it
handles right in all of its own backends: sequences that have rows, beginning at row 0, with nothing behind the last.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from fla import __version__ as fla_version
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

from polyfuse.spec import Capability, Deferral
from polyfuse.spec.gated_delta_rule import LEAST_G
from polyfuse_fla._pool import Slots

if tuple(int(part) for part in fla_version.split(".")[:2]) < (0, 6):
    raise ImportError(f"flash-linear-attention: expected 0.6 or later, got {fla_version}")

# On an H200, 16 key and 32 value heads of 128, bfloat16, 2048 / 8192 / 32768 rows: FLA 0.6's own Triton kernels took
# 134 / 488 / 1941 us, polyfuse's 78 / 294 / 1132. FlashQLA, to which FLA hands on, was not measured here.
ONLY_TRITON = Deferral("cuda", "flash_qla is not installed, and FLA's own kernels take longer than polyfuse's", {})

CAPABILITY = Capability(
    devices=("cuda",),
    min_arch={"cuda": (8, 0)},
    # FLA takes products of float32 in TF32, whose operands have 11 bits. Of float16 results on an H200 a few in a
    # thousand were outside of the bounds, in 2 cases of 43.
    dtypes={"q": ("bfloat16",)},
    # FLA names odd widths of 16-bit numbers as miscompiled by Triton. Widths of models are multiples of 8.
    multiples={"K": 8, "V": 8},
    ranges={"K": (8, 256)},
    host_reads=("cu_seqlens",),
    defers=() if find_spec("flash_qla") else (ONLY_TRITON,),
)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [L, HV, V], rounded once, and final_state [F, HV, K, V]. A pool is updated."""
    if state_pool is None:
        return _rule(q, k, v, g, beta, scale, initial_state, cu_seqlens, output_final_state)
    count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    pool = Slots(state_pool, state_indices, count)
    o, last = _rule(q, k, v, g, beta, scale, pool.read(has_initial_state), cu_seqlens, True)
    pool.write(last)
    return o, last[:0]


def _rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without a pool."""
    ends = [0, len(v)] if cu_seqlens is None else cu_seqlens.tolist()
    filled = [number for number, (start, end) in enumerate(pairwise(ends)) if start < end] if v.numel() else []
    rows = slice(ends[0], ends[-1])
    o = last = None
    if filled:
        packing = {}
        if cu_seqlens is not None:
            packing = _packing((*(ends[number] for number in filled), rows.stop), *_place(v.device))
        o, last = chunk_gated_delta_rule(
            *(_aligned(x[rows]).unsqueeze(0) for x in (q, k, v)),
            # Differences of a running sum that is -infinity are NaN.
            g[rows].clamp(min=LEAST_G).unsqueeze(0),
            _aligned(beta[rows]).unsqueeze(0),
            scale=scale,
            initial_state=_some_states(initial_state, filled),
            output_final_state=output_final_state,
            **packing,
        )
    sizes = (v.shape[1], q.shape[2], v.shape[2])
    if not output_final_state:
        return _all_rows(o, rows, v), v.new_empty((0, *sizes), dtype=torch.float32)
    return _all_rows(o, rows, v), _all_states(last, filled, initial_state, (len(ends) - 1, *sizes), v.device)


def _place(device: torch.device) -> tuple[torch.device, int]:
    """The device, and the stream on which its kernels run."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=4)
def _packing(ends: tuple[int, ...], device: torch.device, stream: int) -> dict[str, torch.Tensor]:
    """FLA's arguments for sequences with these boundaries, of which the first becomes row 0.

    FLA keeps what it computes from boundaries by the tensor's identity, whatever it holds by then. Nothing changes
    these, so that equal boundaries, as in all layers of a model, are one tensor on each stream that uses them.
    """
    on_host = torch.tensor(ends, dtype=torch.int64) - ends[0]
    return {"cu_seqlens": on_host.to(device), "cu_seqlens_cpu": on_host}


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous from a multiple of 16 bytes on, where FlashQLA's tensor maps can begin."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _all_rows(o: torch.Tensor | None, rows: slice, v: torch.Tensor) -> torch.Tensor:
    """o [L, HV, V] of FLA's result [1, rows, HV, V]: zero in the rows of no sequence."""
    if o is not None and o.shape[1] == len(v):
        return o.squeeze(0)
    whole = v.new_zeros(v.shape)
    if o is not None:
        whole[rows] = o.squeeze(0)
    return whole


def _some_states(states: torch.Tensor | None, filled: list[int]) -> torch.Tensor | None:
    """The states that sequences with rows begin with."""
    return None if states is None else _aligned(states if len(filled) == len(states) else states[filled])


def _all_states(
    last: torch.Tensor | None,
    filled: list[int],
    initial: torch.Tensor | None,
    sizes: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """The states [S, HV, K, V] after all sequences, of which FLA computed those with rows."""
    if last is not None and len(last) == sizes[0]:
        return last
    final = torch.zeros(sizes, dtype=torch.float32, device=device)
    if initial is not None:
        final.copy_(initial)
    if last is not None:
        final[filled] = last
    return final
