"""Calls of `gdn_conv_prep` on Qwen3-Next's projection, and the same calls on a copy that is in order."""

from typing import Any

import numpy as np

from polyfuse.conformance import Case, cases

CASES: list[Case] = [case for case in cases("gdn_conv_prep") if case.attrs.get("interleaved") and case.repeat == 1]


def in_order(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the columns [q | k | v] of x copied out, and with a and b of two dimensions."""
    x, heads, heads_v = values["x"], values["num_k_heads"], len(values["A_log"])
    key_heads = x.reshape(len(x), heads, x.shape[1] // heads)
    ends = np.cumsum([values["head_k_dim"], values["head_k_dim"], heads_v // heads * values["head_v_dim"]])
    q, k, v, _ = np.split(key_heads, ends, axis=2)
    columns = [part.reshape(len(x), heads * part.shape[2]) for part in (q, k, v)]
    gates = {name: values[name].reshape(len(x), heads_v) for name in ("a", "b")}
    return {**values, **gates, "x": np.concatenate(columns, axis=1), "interleaved": False}
