"""Conformance of `gated_delta_rule`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, patched
from polyfuse.reference import gated_delta_rule as oracle
from polyfuse.reference._numerics import F64, Array
from polyfuse.spec import FLOATS, dtype_name
from polyfuse.spec.gated_delta_rule import CHUNK, NAME

_ENDS = (2, 2, 67, 131, 131, 132, 195)  # none, 65, 64, none, 1, 63 rows; 2 before the first, 5 past the last
_USUAL = {"q": "unit", "k": "unit", "g": "decay", "beta": "gate"}
_ALL = ("initial_state", "cu_seqlens")


def _case(name: str, ends: tuple[int, ...] = _ENDS, rows: int = 200, **changes: Any) -> Case:
    """A case of packed sequences with states and 2 value heads for each of 2 key heads, on which `changes` are made."""
    sizes = {"L": rows, "H": 2, "HV": 4, "K": 16, "V": 8, "N": len(ends), "S": len(ends) - 1}
    return Case(
        name,
        sizes | changes.pop("dims", {}),
        {"output_final_state": True} | changes.pop("attrs", {}),
        {"T": changes.pop("dtype", "bfloat16"), "cu_seqlens": changes.pop("index", "int32")},
        {"cu_seqlens": ends},
        as_tensor=("cu_seqlens",),
        present=changes.pop("present", _ALL),
        fill=_USUAL | changes.pop("fill", {}),
        **changes,
    )


def _one(name: str, rows: int, present: tuple[str, ...] = ("initial_state",), **changes: Any) -> Case:
    """A case whose rows are one sequence, without boundaries."""
    return _case(name, (0, rows), rows, present=present, **changes)


def cases() -> Iterator[Case]:
    for dtype, (heads, heads_v) in product(FLOATS, ((2, 2), (2, 4), (1, 4))):
        yield _one(f"{dtype}-h{heads}-hv{heads_v}", 70, dtype=dtype, dims={"H": heads, "HV": heads_v})
    for dtype, index, present in product(FLOATS, ("int32", "int64"), (("cu_seqlens",), _ALL)):
        name = f"{dtype}-packed-{index}{'-initial_state' if len(present) == 2 else ''}"
        yield _case(name, dtype=dtype, index=index, present=present)
    for rows, dtype in product((0, 1, 2, 63, 64, 65, 130), ("bfloat16", "float32")):
        yield _one(f"rows_{rows}-{dtype}", rows, dtype=dtype, dims={"H": 1, "HV": 2})
    yield _one("no_initial_state", 130, (), dtype="float32")
    yield _one("no_initial_state-bfloat16", 130, ())
    yield _case("final_state_off", attrs={"output_final_state": False})
    yield _case("all_empty", (0, 0, 0, 0), 3)
    yield _case("all_empty-no_rows", (0, 0, 0), 0)
    yield _case("decode", tuple(range(10)), 9)
    yield _case("short_sequences", (0, 2, 2, 7, 10, 11, 17, 21, 23), 25, dtype="float32")
    yield _case("starts_far_behind", (130, 131, 199), 200, dims={"H": 1, "HV": 1})
    for key, value in ((1, 1), (8, 24), (24, 72), (72, 24), (64, 40), (128, 128), (256, 32)):
        yield _case(f"dims_k{key}-v{value}", (0, 5, 71), 71, dims={"H": 1, "HV": 2, "K": key, "V": value})
    for key, value in ((5, 7), (72, 24), (128, 16)):
        dims = {"H": 1, "HV": 2, "K": key, "V": value}
        yield _case(f"dims_k{key}-v{value}-float32", (0, 5, 71), 71, dtype="float32", dims=dims)
    yield _case("heads_3-of_9", (0, 40), 40, dims={"H": 3, "HV": 9})
    yield _one("no_key_columns", 3, dims={"K": 0})
    for scale, dtype in product((0.02, 2.0), ("bfloat16", "float32")):
        yield _one(f"scale_{scale}-{dtype}", 70, dtype=dtype, attrs={"scale": scale})
    yield from _gates()
    yield from _vectors()
    yield from _layouts()
    yield from _not_finite()


def _gates() -> Iterator[Case]:
    ends = (0, 130, 150)
    dims = {"H": 1, "HV": 2}
    for dtype, g in product(FLOATS, ("zeros", "strong", "mixed", "resets", "very_negative")):
        yield _case(f"g_{g}-{dtype}", ends, 150, dtype=dtype, dims=dims, fill={"g": g})
    for dtype, beta in product(FLOATS, ("zeros", "ones", "small", "to_two")):
        yield _case(f"beta_{beta}-{dtype}", ends, 150, dtype=dtype, dims=dims, fill={"beta": beta, "g": "slow"})
    # Nothing but decays and the state: in fp32 to the end, whatever the dtype.
    for dtype in FLOATS:
        yield _case(f"state_alone-{dtype}", ends, 150, dtype=dtype, dims=dims, fill={"beta": "zeros", "g": "zeros"})


def _vectors() -> Iterator[Case]:
    for dtype, fill in product(FLOATS, ("parallel", "long")):
        for g in ("zeros", "decay"):
            yield _case(f"k_{fill}-g_{g}-{dtype}", (0, 70), 70, dtype=dtype, fill={"k": fill, "g": g})
    # Rows that all touch one another's answers, and integers: the inverse and all products are exact.
    whole = dict.fromkeys(("q", "k"), "basis") | {"v": "integers", "initial_state": "integers", "g": "zeros"}
    for dtype in FLOATS:
        yield _case(f"integers-{dtype}", dtype=dtype, fill=whole | {"beta": "ones"})
    for dtype in ("bfloat16", "float16"):
        yield _case(f"state_large-{dtype}", dtype=dtype, fill={"initial_state": "large"})
    yield _case("v_tiny-float32", dtype="float32", fill={"v": "subnormal", "initial_state": "subnormal"})
    yield _case("v_tiny-float16", dtype="float16", fill={"v": "subnormal", "initial_state": "tiny"})
    yield _case("v_huge-float16", (0, 70), 70, dtype="float16", fill={"v": "huge"})


def _layouts() -> Iterator[Case]:
    ends, dims = (0, 3, 70), {"H": 2, "HV": 2, "K": 24}
    for layout, dtype in product(("one_of_three", "row_strided", "column_strided"), ("bfloat16", "float32")):
        layouts = dict.fromkeys(("q", "k", "v"), layout)
        yield _case(f"{layout}-{dtype}", ends, 70, dtype=dtype, dims=dims, layout=layouts)
    for layout in ("row_strided", "column_strided"):
        yield _case(f"gates_{layout}", ends, 70, layout=dict.fromkeys(("g", "beta"), layout))
    for layout in ("last_two_swapped", "row_strided", "column_strided"):
        yield _case(f"state_{layout}", ends, 70, dims=dims, layout={"initial_state": layout})
    mixed = {"q": "one_of_three", "k": "row_strided", "v": "column_strided", "beta": "row_strided"}
    yield _case("mixed_layouts", ends, 70, layout=mixed)


def _not_finite() -> Iterator[Case]:
    """One row, one sequence, or the rows of no sequence hold what must not spread."""
    values = ("q", "k", "v", "g", "beta")
    for dtype in ("float32", "bfloat16"):
        for tensor in values:
            yield _case(f"{tensor}_nan-{dtype}", dtype=dtype, fill={tensor: f"{_USUAL.get(tensor, 'normal')}-nan"})
        for tensor in ("q", "k", "v"):
            yield _case(f"{tensor}_inf-{dtype}", dtype=dtype, fill={tensor: f"{_USUAL.get(tensor, 'normal')}-inf"})
        for tensor in ("v", "initial_state"):
            yield _case(f"{tensor}_inf_some-{dtype}", dtype=dtype, fill={tensor: "inf_some"})
        yield _case(f"outside_nan-{dtype}", dtype=dtype, fill=dict.fromkeys(values, "outside_nan"))
        yield _case(f"sequence_nan-{dtype}", dtype=dtype, fill=dict.fromkeys(values, "sequence_nan"))
        yield _case(f"state_nan-{dtype}", dtype=dtype, fill={"initial_state": "nan_some"})
        yield _case(f"resets_with_nan-{dtype}", dtype=dtype, fill={"g": "resets", "v": "normal-nan"})


def unit(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of length 1 in every direction."""
    return _normalised(rng.standard_normal(shape))


def _normalised(x: F64) -> F64:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _parallel(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of length 1 within some 20 degrees of one direction of their head."""
    return _normalised(rng.standard_normal((1, *shape[1:])) + 0.3 * rng.standard_normal(shape))


def _long(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of a length up to 1.2."""
    return unit(rng, shape, dtype) * rng.uniform(0.5, 1.2, (*shape[:-1], 1))


def _basis(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors with one 1."""
    return np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]


def _gate(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """The sigmoid of normal values."""
    return 1 / (1 + np.exp(-rng.standard_normal(shape)))


def _decay(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """-exp(A) * softplus(a + dt_bias) as trained layers have it: heads from a long memory to a short one."""
    rate = np.exp(np.linspace(-4, 2, shape[-1]))
    return -rate * np.log1p(np.exp(rng.standard_normal(shape) - 2))


def _slow(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Decays that keep most of the state over all rows."""
    return -0.01 * rng.random(shape)


def _sometimes(value: float, often: float = 0.05) -> Fill:
    """`_slow`, and in between a few of `value`."""
    return lambda rng, shape, dtype: np.where(rng.random(shape) < often, value, _slow(rng, shape, dtype))


def _uniform(low: float, high: float) -> Fill:
    return lambda rng, shape, dtype: rng.uniform(low, high, shape)


def _ones(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return np.ones(shape)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return rng.standard_normal(shape)


def _with(usual: Fill, value: float, rows: Any, inside: bool = True) -> Fill:
    """Values of another fill, but `value` in some rows: in one element of each or, without `inside`, in all."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = usual(rng, shape, dtype)
        values[(rows, *(0 for _ in shape[1:])) if inside else rows] = value
        return values

    return fill


_OUTSIDE = np.r_[: _ENDS[0], _ENDS[-1] : 200]
_BAD_ROW = 40  # in the middle of a chunk of a sequence of 65 rows

FILLS: dict[str, Fill] = {
    "unit": unit,
    "parallel": _parallel,
    "long": _long,
    "basis": _basis,
    "gate": _gate,
    "decay": _decay,
    "slow": _slow,
    "strong": _uniform(-30, 0),
    "mixed": _sometimes(-60.0),
    "resets": _sometimes(-np.inf),
    "very_negative": _sometimes(-1e30),
    "ones": _ones,
    "small": _uniform(0, 0.02),
    "to_two": _uniform(0, 2),
    "outside_nan": _with(_slow, np.nan, _OUTSIDE, inside=False),
    "sequence_nan": _with(_slow, np.nan, slice(*_ENDS[2:4]), inside=False),
}
for _name, _usual in (("unit", unit), ("decay", _decay), ("gate", _gate), ("normal", _normal)):
    FILLS |= {f"{_name}-nan": _with(_usual, np.nan, _BAD_ROW), f"{_name}-inf": _with(_usual, np.inf, _BAD_ROW)}


def chunked(rounded: Callable[[F64], F64], stored: Callable[[F64], F64] = lambda state: state) -> Any:
    """What makes of a recurrence the chunked form of the spec, whose operands are rounded.

    `stored` is what becomes of the state between chunks.
    """

    def of_sequence(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        for start in range(0, len(o), CHUNK):
            rows = slice(start, start + CHUNK)
            q, k, v, g, beta = (np.swapaxes(part[rows], 0, 1) for part in parts)  # [HV, rows, ...]
            total = np.cumsum(np.maximum(g, oracle.RESET), axis=1)
            decay = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None], 0)))
            mixed = np.tril(beta[:, :, None] * decay * (k @ k.swapaxes(1, 2)), -1)
            inverse = rounded(np.linalg.inv(np.eye(mixed.shape[1]) + mixed))
            u = rounded(inverse @ rounded(beta[:, :, None] * v))
            w = rounded(inverse @ rounded((beta * np.exp(total))[:, :, None] * k))
            d = rounded(u - w @ rounded(state))
            p = rounded(decay * (q @ k.swapaxes(1, 2)))
            o[rows] = np.swapaxes(rounded(np.exp(total)[:, :, None] * q) @ rounded(state) + p @ d, 0, 1)
            kept = rounded(decay[:, -1, :, None] * k).swapaxes(1, 2)
            state = stored(np.exp(total[:, -1])[:, None, None] * state + kept @ d)
        return o, state

    return lambda recurrence: of_sequence


def to_bits(bits: int) -> Callable[[F64], F64]:
    """The function that rounds to so many significant bits, to nearest."""

    def rounded(x: F64) -> F64:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)

    return rounded


def _exact(x: F64) -> F64:
    return x


def _in(dtype: str, mutant: Mutant) -> Mutant:
    """A mutant for one dtype, right for the others."""
    kept = changed(NAME, lambda values: {})
    return lambda **values: (mutant if dtype_name(values["q"].dtype) == dtype else kept)(**values)


def _operands(bits: int, dtype: str) -> Mutant:
    """The chunked form with operands of so many bits."""
    return _in(dtype, patched(NAME, oracle, "recurrence", chunked(to_bits(bits))))


def _stepped(change: Callable[..., tuple[F64, F64]]) -> Mutant:
    """Another step of the recurrence: `change` gets the right one, its row and the state."""

    def make(step: Any) -> Any:
        return lambda *row, state: change(step, *row, state=state)

    return patched(NAME, oracle, "step", make)


def _decayed(g: F64, state: F64) -> F64:
    return np.exp(g)[:, None, None] * state


def _decay_last(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
    o, after = step(q, k, v, 0 * beta, beta, state=state)
    return o, _decayed(g, after)


def _decay_of_the_update(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
    before = _decayed(g, state)
    _, after = step(q, k, v, g, beta, state=state)
    after = before + _decayed(g, after - before)
    return oracle.answer(after, q), after


def _corrected(answer: Callable[..., F64]) -> Mutant:
    """Another d: `answer` of the row, the state before it and that state decayed."""

    def change(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
        before = _decayed(g, state)
        after = before + oracle.outer(k, answer(q, k, v, beta[:, None], state, before))
        return oracle.answer(after, q), after

    return _stepped(change)


def _output_before(step: Any, q: F64, *row: F64, state: F64) -> tuple[F64, F64]:
    _, after = step(q, *row, state=state)
    return oracle.answer(_decayed(row[2], state), q), after


def _bfloat16_state(step: Any, *row: F64, state: F64) -> tuple[F64, F64]:
    o, after = step(*row, state=state)
    return o, to_bits(8)(after)


def _nan_of_a_reset(step: Any, *row: F64, state: F64) -> tuple[F64, F64]:
    """A decay of -infinity less -infinity."""
    o, after = step(*row, state=state)
    reset = np.isneginf(row[3])[:, None]
    return np.where(reset, np.nan, o), np.where(reset[:, None], np.nan, after)


def _leaking(recurrence: Any) -> Any:
    """Each sequence goes on from the state of the one before it."""
    last: list[F64] = []

    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o, after = recurrence(parts, last.pop() if last else state)
        last.append(after)
        return o, after

    return wrong


def _one_row_early(recurrence: Any) -> Any:
    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o, _ = recurrence(parts, state)
        return o, recurrence([part[:-1] for part in parts], state)[1]

    return wrong


def _whole_chunks(recurrence: Any) -> Any:
    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        rows = slice(len(o) // CHUNK * CHUNK)
        o[rows], state = recurrence([part[rows] for part in parts], state)
        return o, state

    return wrong


def _chunks_forgotten(recurrence: Any) -> Any:
    """Every chunk begins without a state."""

    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        for start in range(0, len(o), CHUNK):
            rows = slice(start, start + CHUNK)
            o[rows], state = recurrence([part[rows] for part in parts], state if start == 0 else 0 * state)
        return o, state

    return wrong


def _other_group(x: Array, heads_v: int) -> Array:
    return x[:, np.arange(heads_v) % x.shape[1]]


def _scaled(power: float) -> Mutant:
    """A scale of a power of the key width."""
    return changed(NAME, lambda v: {"scale": max(v["q"].shape[-1], 1) ** power})


def _rolled(values: dict[str, Any]) -> dict[str, Any]:
    state = values["initial_state"]
    return {"initial_state": None if state is None else np.roll(state, 1, axis=0)}


def _one_plus(values: dict[str, Any]) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        return {"g": np.log(np.maximum(1 + values["g"], 0))}


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "state_leaks_across_sequences": patched(NAME, oracle, "recurrence", _leaking),
    "initial_state_ignored": changed(NAME, lambda v: {"initial_state": None}),
    "initial_state_of_another_sequence": changed(NAME, _rolled),
    "decay_after_the_update": _stepped(_decay_last),
    "decay_of_the_update_too": _stepped(_decay_of_the_update),
    "correction_before_the_decay": _corrected(lambda q, k, v, beta, s, b: beta * (v - oracle.answer(s, k))),
    "beta_of_v_alone": _corrected(lambda q, k, v, beta, s, b: beta * v - oracle.answer(b, k)),
    "no_correction": _corrected(lambda q, k, v, beta, s, b: beta * v),
    "q_in_the_correction": _corrected(lambda q, k, v, beta, s, b: beta * (v - oracle.answer(b, q))),
    "output_before_the_update": _stepped(_output_before),
    "no_exponential_of_g": changed(NAME, _one_plus),
    "nan_of_a_reset": _stepped(_nan_of_a_reset),
    "scale_twice": _scaled(-1.0),
    "scale_missing": _scaled(0.0),
    "given_scale_ignored": changed(NAME, lambda v: {"scale": None}),
    "final_state_one_row_early": patched(NAME, oracle, "recurrence", _one_row_early),
    "last_partial_chunk_dropped": patched(NAME, oracle, "recurrence", _whole_chunks),
    "state_lost_between_chunks": patched(NAME, oracle, "recurrence", _chunks_forgotten),
    "key_heads_of_the_wrong_group": patched(NAME, oracle, "per_value_head", lambda _: _other_group),
    "q_and_k_swapped": changed(NAME, lambda v: {"q": v["k"], "k": v["q"]}),
    "bfloat16_operands_in_float32": _operands(8, "float32"),
    "tf32_operands_in_float32": _operands(11, "float32"),
    "bfloat16_operands_in_float16": _operands(8, "float16"),
    "operands_of_5_bits_in_bfloat16": _operands(5, "bfloat16"),
}
for _dtype in FLOATS:
    MUTANTS |= {
        f"bfloat16_state_each_row_in_{_dtype}": _in(_dtype, _stepped(_bfloat16_state)),
        f"bfloat16_state_between_chunks_in_{_dtype}": _in(
            _dtype, patched(NAME, oracle, "recurrence", chunked(_exact, stored=to_bits(8)))
        ),
    }
