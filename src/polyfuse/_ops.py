"""The public functions: one per op, with the op's parameters and `backend=`.

Their documentation is their spec. This module is imported at the first use of an op.
"""

from collections.abc import Sequence
from typing import Any

from polyfuse.dispatch import public, run


@public
def pos_embed_interpolate(
    table: Any,
    grid_thw: Any,
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: Any = None,
    out_dtype: Any = None,
    out_rows: int | None = None,
    backend: str | Sequence[str] | None = None,
) -> Any:
    args = (table, grid_thw, merge_size, mode, align_corners, base, out_dtype, out_rows)
    return run("pos_embed_interpolate", args, backend)
