"""Conformance of `segment_attention`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, patched, returned, truncated
from polyfuse.reference import segment_attention as oracle
from polyfuse.reference._numerics import F64, round_to, to_f64
from polyfuse.spec import FLOATS, dtype_name
from polyfuse.spec.segment_attention import NAME

_ENDS = (0, 5, 6, 6, 30, 47)  # of 50 rows: 5, 1, none, 24, 17, and 3 past the last


def _case(name: str, ends: tuple[int, ...] = _ENDS, rows: int | None = None, **changes: Any) -> Case:
    """A case of 2 heads of 16, with 3 rows past the last segment, on which `changes` are made."""
    sizes = {"rows": ends[-1] + 3 if rows is None else rows, "heads": 2, "dim": 16, "N": len(ends)}
    return Case(
        name,
        sizes | changes.pop("dims", {}),
        dtypes={"T": changes.pop("dtype", "bfloat16"), "cu_seqlens": changes.pop("index", "int32")},
        host={"cu_seqlens": ends},
        as_tensor=("cu_seqlens",),
        **changes,
    )


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(f"{dtype}-segments", dtype=dtype)
        yield _case(f"{dtype}-large", dtype=dtype, fill={"q": "large"})
        yield _case(f"{dtype}-uniform", dtype=dtype, fill={"q": "zeros"})
        yield _case(f"{dtype}-integers", dtype=dtype, fill=dict.fromkeys("qkv", "integers"))
        yield _case(f"{dtype}-one_segment", (0, 140), 140, dtype=dtype, dims={"dim": 72})
    for dim in (1, 5, 8, 24, 40, 64, 72, 80, 88, 96, 120, 128, 160, 256):
        yield _case(f"one_segment-dim_{dim}", (0, 20), 20, dims={"dim": dim})
    for dim in (8, 72, 80, 128):
        yield _case(f"float32-dim_{dim}", (0, 7, 20), 20, dtype="float32", dims={"dim": dim})
    yield _case("int64", index="int64")
    yield _case("one_head", dims={"heads": 1})
    yield _case("many_heads", (0, 3, 9), dims={"heads": 17})
    for scale in (0.02, 2.0):
        yield _case(f"scale_{scale}", attrs={"scale": scale})
    for longest in (24, 30, 50, 1000):
        yield _case(f"max_seqlen_{longest}", attrs={"max_seqlen": longest})
    yield from _boundaries()
    yield from _layouts()
    yield from _not_finite()


def _boundaries() -> Iterator[Case]:
    yield _case("no_rows", (0, 0, 0), 0)
    yield _case("no_rows-no_segments", (0,), 0)
    yield _case("no_segments", (0,), 4)
    yield _case("empty_segments", (0, 0, 0, 0), 4, attrs={"max_seqlen": 0})
    yield _case("empty_around", (0, 0, 0, 5, 5, 70, 70, 70), 70)
    yield _case("one_row", (0, 1), 1)
    yield _case("single_rows", tuple(range(38)), 40, dims={"heads": 1})
    around = (0, 63, 127, 192, 193, 320, 449, 480, 512, 545)  # 63, 64, 65, 1, 127, 129, 31, 32, 33
    for dtype in ("float32", "float16"):
        yield _case(f"around_tiles-{dtype}", around, 545, dtype=dtype, dims={"heads": 1, "dim": 24})
    dims = {"rows": 902, "heads": 1, "dim": 8, "N": 301}
    yield Case("many_segments", dims, dtypes={"T": "bfloat16"}, fill={"cu_seqlens": "cu_seqlens"})
    # No case over 2**31 elements: repeated rows would lie past the last segment.


def _layouts() -> Iterator[Case]:
    for layout in ("one_of_three", "row_strided", "column_strided"):
        for dtype in ("bfloat16", "float32"):
            yield _case(f"{layout}-{dtype}", dtype=dtype, dims={"dim": 24}, layout=dict.fromkeys("qkv", layout))
    yield _case("mixed_layouts", layout={"k": "one_of_three", "v": "row_strided"})


def _not_finite() -> Iterator[Case]:
    """One segment, one element, or the rows past the last segment hold what must not spread."""
    for dtype in ("float32", "bfloat16"):
        for longest in (None, 24):
            name = f"segment_nan-{dtype}-{longest}"
            attrs = {"max_seqlen": longest}
            yield _case(name, dtype=dtype, attrs=attrs, fill=dict.fromkeys("qkv", "segment_nan"))
            name = f"segment_inf-{dtype}-{longest}"
            yield _case(name, dtype=dtype, attrs=attrs, fill=dict.fromkeys("qkv", "segment_inf"))
        for tensor in "qkv":
            yield _case(f"{tensor}_nan-{dtype}", dtype=dtype, fill={tensor: "one_nan"})
            yield _case(f"{tensor}_inf-{dtype}", dtype=dtype, fill={tensor: "one_inf"})
        yield _case(f"v_both_infinities-{dtype}", dtype=dtype, fill={"v": "both_infinities"})
    yield _case("trailing_nan", fill=dict.fromkeys("qkv", "trailing_nan"))
    yield _case("trailing_nan-float32", dtype="float32", fill=dict.fromkeys("qkv", "trailing_nan"))
    yield _case("nan_some", fill=dict.fromkeys("qkv", "nan_some"))
    yield _case("subnormal", dtype="float32", fill=dict.fromkeys("qkv", "subnormal"))
    yield _case("huge_values", dtype="float16", fill={"v": "huge"})


def _with(value: float, *where: Any) -> Fill:
    """Normal values, but `value` at a place; places past the end are left out."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal(shape)
        values[where] = value
        return values

    return fill


def _both_infinities(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Of two rows of one segment, in one column of a head alike and in another opposite."""
    values = rng.standard_normal(shape)
    values[8, 0, :2] = np.inf
    values[9, 0, :2] = np.inf, -np.inf
    return values


FILLS: dict[str, Fill] = {
    "segment_nan": _with(np.nan, slice(6, 30)),
    "segment_inf": _with(np.inf, slice(6, 30)),
    "one_nan": _with(np.nan, 31, 0, 3),
    "one_inf": _with(np.inf, 31, 0, 3),
    "both_infinities": _both_infinities,
    "trailing_nan": _with(np.nan, slice(-3, None)),
}


def _moved(change: Callable[[list[int]], list[int]]) -> Mutant:
    """The op on other boundaries."""

    def boundaries(values: dict[str, Any]) -> dict[str, Any]:
        ends = values["cu_seqlens"]
        return {"cu_seqlens": np.array(change(ends.tolist()), ends.dtype)}

    return changed(NAME, boundaries)


def _without_second_boundary(ends: list[int]) -> list[int]:
    return [*ends[:1], *ends[2:]] if len(ends) > 2 else ends


def _one_row_more(segments: Any) -> Any:
    """Each segment attends to the first row of the next as well; that row keeps the result of its own."""
    return lambda cu_seqlens: [slice(s.start, s.stop + 1) for s in segments(cu_seqlens)][::-1]


def _last_key_dropped(attention: Any) -> Any:
    def attend(q: F64, k: F64, v: F64, scale: float) -> F64:
        kept = max(1, len(k) - 1)
        return attention(q, k[:kept], v[:kept], scale)

    return attend


def _causal(softmax: Any) -> Any:
    def weights(scores: F64) -> F64:
        later = np.triu(np.ones(scores.shape[-2:], bool), 1)
        return softmax(np.where(later, -np.inf, scores))

    return weights


def _overflowing(softmax: Any) -> Any:
    """Exponentials of the scores as they are, in float32."""

    def weights(scores: F64) -> F64:
        exponentials = to_f64(np.exp(scores.astype(np.float32)))
        return exponentials / exponentials.sum(-1, keepdims=True)

    return weights


def _leaking(**values: Any) -> Any:
    """All segments in one product under a mask: zero weights meet every value, and zero times NaN is NaN."""
    q, k, v = (to_f64(values[name]) for name in "qkv")
    index = np.arange(len(q))
    segment = np.searchsorted(values["cu_seqlens"], index, side="right")
    with np.errstate(all="ignore"):
        scores = oracle.factor(values["scale"], q.shape[-1]) * oracle.products(q, k)
        if q.size:
            scores = np.where(segment[:, None] == segment, scores, -np.inf)
            q = oracle.mix(oracle.softmax(scores), v)
    return round_to(q, dtype_name(values["q"].dtype))


def _rounded_exponentials(bits: int, dtype: str | None = None) -> Mutant:
    """Exponentials with so many significant bits, in calls of one dtype or of all."""

    def make(softmax: Any) -> Any:
        def weights(scores: F64) -> F64:
            exponentials = np.exp(scores - scores.max(-1, keepdims=True))
            return truncated(exponentials, bits) / exponentials.sum(-1, keepdims=True)

        return weights

    rounded = patched(NAME, oracle, "softmax", make)

    def mutant(**values: Any) -> Any:
        chosen = dtype in (None, dtype_name(values["q"].dtype))
        return rounded(**values) if chosen else changed(NAME, lambda v: {})(**values)

    return mutant


def _rounded_scores(products: Any) -> Any:
    """Scores with the 8 significant bits of bfloat16."""
    return lambda q, k: truncated(products(q, k), 8)


def _rounded_operands(products: Any) -> Any:
    """q and k with the 11 significant bits of TF32."""
    return lambda q, k: products(truncated(q, 11), truncated(k, 11))


def _dim_scale(power: float) -> Mutant:
    """A scale of a power of the head dim."""
    return changed(NAME, lambda v: {"scale": v["q"].shape[-1] ** power})


def _heads_reversed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name][:, ::-1] for name in "kv"}


def _columns_dropped(values: dict[str, Any]) -> dict[str, Any]:
    """Of the scores, those past the largest power of two in the head dim."""
    q = values["q"].copy()
    q[..., 1 << (q.shape[-1].bit_length() - 1) :] = 0
    return {"q": q, "scale": oracle.factor(values["scale"], q.shape[-1])}


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "leaks_through_zero_weights": _leaking,
    "one_segment": _moved(lambda ends: [ends[0], ends[-1]]),
    "two_segments_joined": _moved(_without_second_boundary),
    "last_segment_dropped": _moved(lambda ends: ends[:-1] if len(ends) > 1 else ends),
    "first_row_of_the_next_segment_included": patched(NAME, oracle, "segments", _one_row_more),
    "last_key_dropped": patched(NAME, oracle, "attention", _last_key_dropped),
    "causal": patched(NAME, oracle, "softmax", _causal),
    "no_maximum_subtracted": patched(NAME, oracle, "softmax", _overflowing),
    "no_scale": changed(NAME, lambda v: {"scale": 1.0}),
    "scale_twice": _dim_scale(-1.0),
    "scale_of_the_padded_dim": changed(
        NAME, lambda v: {"scale": v["scale"] or (1 << (v["q"].shape[-1] - 1).bit_length()) ** -0.5}
    ),
    "given_scale_ignored": changed(NAME, lambda v: {"scale": None}),
    "columns_past_the_power_of_two_dropped": changed(NAME, _columns_dropped),
    "k_and_v_swapped": changed(NAME, lambda v: {"k": v["v"], "v": v["k"]}),
    "q_and_k_swapped": changed(NAME, lambda v: {"q": v["k"], "k": v["q"]}),
    "heads_reversed": changed(NAME, _heads_reversed),
    "rows_reversed": returned(NAME, lambda out: (out[::-1],)),
    "bfloat16_exponentials_in_float32": _rounded_exponentials(8, "float32"),
    "tf32_exponentials_in_float32": _rounded_exponentials(11, "float32"),
    "bfloat16_exponentials_in_float16": _rounded_exponentials(8, "float16"),
    "exponentials_of_5_bits": _rounded_exponentials(5, "bfloat16"),
    "bfloat16_scores": patched(NAME, oracle, "products", _rounded_scores),
    "tf32_scores": patched(NAME, oracle, "products", _rounded_operands),
}
