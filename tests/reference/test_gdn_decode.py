"""The oracle of `gdn_decode` on numbers that a reader can check with a pencil.

One head with K = 1 and V = 2, whose four channels are q, k and v. Inputs of 40 and more make SiLU the identity, and a
key or a query of one column has length 1. An `a` of 0 makes the decay 1/2, a `b` of 0 makes beta 1/2. The conv adds the
input before to a channel's own.
"""

from typing import Any

import numpy as np
import pytest

from polyfuse.reference import oracle
from polyfuse.spec import SpecError

gdn_decode = oracle("gdn_decode")

HEADS: dict[str, Any] = {"num_k_heads": 1, "head_k_dim": 1, "head_v_dim": 2}
TAPS = np.ones((4, 2), np.float32)
X = [50.0, 60.0, 45.0, 52.0]


def array(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def arguments(x: np.ndarray, conv_state: np.ndarray, recurrent_state: np.ndarray, **more: Any) -> dict[str, Any]:
    """A call whose gates are 1/2, and whose z of 40 and weights of 1 multiply the norm by 40."""
    lead = x.shape[:-1]
    given: dict[str, Any] = {
        "x": x,
        "z": np.full((*lead, 2), 40, np.float32),
        "a": np.zeros((*lead, 1), np.float32),
        "b": np.zeros((*lead, 1), np.float32),
        "conv_weight": TAPS,
        "A_log": array(0),
        "dt_bias": array(0),
        "norm_weight": array(1, 1),
        "conv_state": conv_state,
        "recurrent_state": recurrent_state,
    }
    return given | HEADS | more


def pools(*states: Any, columns: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A conv state of zeros and these S, one for each slot."""
    return np.zeros((len(states), 4, columns), np.float32), array(*states).reshape(len(states), 1, 1, 2)


def normed(*o: float) -> list[float]:
    """40 * o over its root mean square."""
    return [40 * value / ((o[0] ** 2 + o[1] ** 2) / 2) ** 0.5 for value in o]


def close(got: np.ndarray, want: Any) -> None:
    np.testing.assert_allclose(got.reshape(-1), np.array(want).reshape(-1), rtol=1e-6)


def test_one_step() -> None:
    out, conv_state, state = gdn_decode(**arguments(array(X), *pools([10, 20])))
    # exp(g) S = 5, 10; d = (45 - 5) / 2, (52 - 10) / 2
    close(state, [25, 31])
    close(out, normed(25, 31))
    close(conv_state, X)


def test_nothing_is_written() -> None:
    values = arguments(array(X), *pools([10, 20]))
    gdn_decode(**values)
    close(values["recurrent_state"], [10, 20])
    assert not values["conv_state"].any()


def test_the_conv_reads_its_last_columns_and_all_are_shifted() -> None:
    conv_state, state = pools([0, 0], columns=3)
    conv_state[0, 2] = 1_000, 2_000, 5  # channel v0
    _, new, S = gdn_decode(**arguments(array(X), conv_state, state))
    assert new[0].tolist() == [[0, 0, 50], [0, 0, 60], [2_000, 5, 45], [0, 0, 52]]
    close(S, [25, 26])  # (45 + 5) / 2, 52 / 2


def test_the_conv_state_holds_inputs_in_its_own_dtype() -> None:
    conv_state, state = pools([0, 0])
    x = array([50, 60, 45.0001, 52])
    _, new, S = gdn_decode(**arguments(x, conv_state.astype(np.float16), state))
    assert new.dtype == np.float16
    assert new[0, :, 0].tolist() == [50, 60, 45, 52]
    close(S, [45.0001 / 2, 26])  # this step itself uses x as it is


def test_o_is_of_the_state_before_it_is_rounded() -> None:
    conv_state, state = pools([8_192, 0])
    out, _, S = gdn_decode(**arguments(array([50, 60, 45.5, 52]), conv_state, state.astype(np.float16)))
    assert S.reshape(-1).tolist() == [2_070, 26]  # 2070.75, where float16 has every second number
    close(out, normed(2_070.75, 26))


def test_gates() -> None:
    values = arguments(array(X), *pools([10, 20]), a=array([1_000]), b=array([1_000]))
    close(gdn_decode(**values)[2], [45, 52])  # nothing kept, all written
    values = arguments(array(X), *pools([10, 20]), a=array([-1_000]), b=array([-1_000]))
    close(gdn_decode(**values)[2], [10, 20])  # all kept, nothing written


def test_weight_gate_and_scale() -> None:
    values = arguments(array(X), *pools([10, 20]), norm_weight=array(1, 3), z=array([50, 80]))
    first, second = normed(25, 31)
    close(gdn_decode(**values)[0], [first * 50 / 40, second * 3 * 80 / 40])
    for scale in (2, -1):  # eps is inside the root: (50^2 + 62^2) / 2 + 828 = 4000
        out, _, _ = gdn_decode(**arguments(array(X), *pools([10, 20]), scale=scale, norm_eps=793 * scale**2))
        close(out, [40 * scale * o / (2 * 793 * scale**2) ** 0.5 for o in (25, 31)])


def test_the_default_scale_is_one_over_the_root_of_k() -> None:
    """Two columns of q and of k, of length 0.8 and 0.6."""
    x = array([80, 60, 80, 60, 45, 52])
    heads = {"head_k_dim": 2, "conv_weight": np.ones((6, 2), np.float32), "norm_eps": 1e4}
    state = np.zeros((1, 1, 2, 2), np.float32)
    out, _, S = gdn_decode(**arguments(x, np.zeros((1, 6, 1), np.float32), state, **heads))
    close(S, [0.8 * 22.5, 0.8 * 26, 0.6 * 22.5, 0.6 * 26])
    o = [part / 2**0.5 for part in (22.5, 26)]
    close(out, [40 * part / ((o[0] ** 2 + o[1] ** 2) / 2 + 1e4) ** 0.5 for part in o])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slots_by_index(dtype: Any) -> None:
    conv_state, state = pools([np.nan, np.nan], [np.nan, np.nan], [10, 20], [30, 40])
    conv_state[:2] = np.nan
    indices = np.array([3, -1, 2], dtype)
    values = arguments(array(X, [np.nan] * 4, X), conv_state, state, state_indices=indices)
    out, new, S = gdn_decode(**values)
    close(S[2:], [25, 31, 30, 36])
    close(out, [normed(30, 36), [0, 0], normed(25, 31)])
    assert np.isnan(S[:2]).all()
    assert np.isnan(new[:2]).all()
    kept = {name: exact.kept for name, exact in gdn_decode.intervals(**values).items()}
    assert kept["out"] is None
    assert [part.all() for part in kept["recurrent_state"]] == [True, True, False, False]
    assert [part.all() for part in kept["conv_state"]] == [True, True, False, False]


def test_value_heads_share_their_key_head() -> None:
    """Two key heads with K = 1 and four value heads with V = 1: the keys of the second are 0."""
    x = array([50, 50, 60, 0, 45, 45, 45, 45])
    given = arguments(
        x,
        np.zeros((1, 8, 1), np.float32),
        np.full((1, 4, 1, 1), 10, np.float32),
        num_k_heads=2,
        head_v_dim=1,
        conv_weight=np.ones((8, 2), np.float32),
        norm_weight=array(1),
        **dict.fromkeys(("a", "b"), np.zeros((1, 2, 2), np.float32)),
        **dict.fromkeys(("A_log", "dt_bias"), np.zeros(4, np.float32)),
        z=np.full((1, 4), 40, np.float32),
    )
    close(gdn_decode(**given)[2], [25, 25, 5, 5])


def test_interleaved() -> None:
    values = arguments(array([*X, 40, 40]), *pools([10, 20]), interleaved=True, z=None)
    out, conv_state, state = gdn_decode(**values)
    close(state, [25, 31])
    close(out, normed(25, 31))
    close(conv_state, X)


def test_tokens_follow_one_another() -> None:
    x = array([X, [50, 60, 0, 0]])  # of the second token's v the conv makes 45 and 52
    conv_state, state = pools([np.nan] * 2, [10, 20], [np.nan] * 2, columns=2)
    out, new, S = gdn_decode(**arguments(x, conv_state, state, state_indices=np.array([[1, 2]])))
    close(S[1:], [25, 31, 12.5 + (45 - 12.5) / 2, 15.5 + (52 - 15.5) / 2])
    close(out, [normed(25, 31), normed(28.75, 33.75)])
    assert new[1].tolist() == [[50, 50], [60, 60], [45, 0], [52, 0]]
    assert not new[[0, 2]].any()


def test_num_accepted_says_where_reading_begins() -> None:
    """After a call of three tokens of which two were accepted; W - 1 = 1 input is read, of column 1."""
    x = array([X, X, X])
    conv_state, state = pools([1, 1], [10, 20], [3, 3], columns=3)
    conv_state[2, 2] = 7, 5, 9
    values = arguments(x, conv_state, state, state_indices=np.array([[2, 1, 0]]), num_accepted=np.array([2]))
    _, new, S = gdn_decode(**values)
    close(S[2], [5 + (50 - 5) / 2, 31])  # stored in the slot of the first token, which is the second token's to read
    assert new[2, 2].tolist() == [45, 45, 45]
    _, _, S = gdn_decode(**values | {"num_accepted": None})
    close(S[2], [1.5 + (54 - 1.5) / 2, 1.5 + (52 - 1.5) / 2])  # the slot of the first token, and the last column


def test_a_window_begins_behind_the_accepted_tokens() -> None:
    """W = 3 and T = 2: of three columns the first two are read after one accepted token, the last two after two."""
    taps = np.tile(array(100, 10, 1), (4, 1))
    conv_state, state = pools([0, 0], [0, 0], columns=3)
    conv_state[0, 2] = 1, 2, 3
    values = arguments(array([X, X]), conv_state, state, conv_weight=taps, state_indices=np.array([[0, 1]]))
    for accepted, v, column in ((1, 120 + 45, 2), (2, 230 + 45, 3), (None, 230 + 45, 3)):
        count = None if accepted is None else np.array([accepted])
        _, new, S = gdn_decode(**values | {"num_accepted": count})
        close(S[0, 0, 0, 0], v / 2)
        assert new[0, 2].tolist() == [column, 45, 45]


def test_padding_tokens() -> None:
    x = array([X, X, X], [X, X, X])
    conv_state, state = pools(*[[10, 20]] * 4, columns=3)
    conv_state[:, 0] = 7, 8, 9
    indices = np.array([[1, -1, 2], [-1, 0, 3]])
    out, new, S = gdn_decode(**arguments(x, conv_state, state, state_indices=indices, num_accepted=np.array([1, 9])))
    close(S[[0, 2, 3]], [10, 20] * 3)
    close(S[1], [25, 31])
    assert out[0, 0].all()
    assert not out[0, 1:].any()
    assert not out[1].any()
    assert new[1, 0].tolist() == [50, 8, 9]  # W - 2 + 1 columns are written
    assert new[[0, 2, 3], 0].tolist() == [[7, 8, 9]] * 3


def test_an_accepted_slot_behind_padding_is_read() -> None:
    x = array([X, X, X])
    indices, count = np.array([[0, -1, 1]]), np.array([3])
    _, _, S = gdn_decode(**arguments(x, *pools([8, 8], [10, 20], columns=3), state_indices=indices, num_accepted=count))
    close(S, [25, 31, 10, 20])


def test_an_accepted_slot_of_none_reads_zero() -> None:
    x = array([X, X])
    values = arguments(x, *pools([10, 20], columns=2), state_indices=np.array([[0, -1]]), num_accepted=np.array([2]))
    close(gdn_decode(**values)[2], [22.5, 26])


@pytest.mark.parametrize("columns", [1, 3])
def test_no_sequences(columns: int) -> None:
    out, conv_state, state = gdn_decode(**arguments(np.zeros((0, 4), np.float32), *pools([10, 20], columns=columns)))
    assert out.shape == (0, 2)
    assert state.reshape(-1).tolist() == [10, 20]
    assert conv_state.shape == (1, 4, columns)


BAD: dict[str, dict[str, Any]] = {
    "z: expected an array, got None": {"z": None},
    "z: expected None with interleaved=True": {"interleaved": True, "x": np.zeros((1, 6), np.float32)},
    "norm_eps: expected a finite number > 0": {"norm_eps": 0.0},
    "l2norm_eps: expected a finite number > 0": {"l2norm_eps": float("inf")},
    "conv_weight: expected a width of 2 to 4": {"conv_weight": np.ones((4, 5), np.float32)},
    "conv_state: expected n >= W - 1 = 2 columns": {"conv_weight": np.ones((4, 3), np.float32)},
    "num_accepted: expected None for x [B, C]": {"num_accepted": np.array([1])},
    "recurrent_state: expected at least 1 slots without state_indices": {"recurrent_state": pools()[1]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("[", r"\[").replace("+", r"\+")):
        gdn_decode(**arguments(array(X), *pools([10, 20])) | BAD[message])


BAD_TOKENS: dict[str, dict[str, Any]] = {
    "x: expected 1 to 8 tokens T": {"tokens": 9},
    "state_indices: expected a slot for each token": {"state_indices": None},
    "conv_state: expected n = W - 1 \\+ T - 1 = 2 columns": {"columns": 3},
    "num_accepted: expected B=1 elements": {"num_accepted": np.array([1, 1])},
    "state_indices: expected leading dimensions": {"state_indices": np.array([0, 1])},
}


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_bad_calls_with_tokens(message: str) -> None:
    changes = dict(BAD_TOKENS[message])
    tokens, columns = changes.pop("tokens", 2), changes.pop("columns", 2)
    x = np.tile(array(X), (1, tokens, 1))
    with pytest.raises(SpecError, match=message):
        gdn_decode(**arguments(x, *pools([0, 0], columns=columns), state_indices=np.zeros((1, tokens), int)) | changes)
