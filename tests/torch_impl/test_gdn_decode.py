"""`gdn_decode` in plain PyTorch: every case, in place and nowhere else, nothing read back, step after step."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import polyfuse
from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.inputs import make_inputs, place
from polyfuse.dispatch import to_numpy
from polyfuse.spec import OPS
from polyfuse.torch_impl.gdn_conv_prep import gdn_conv_prep
from polyfuse.torch_impl.gdn_decode import gdn_decode

SPEC = OPS["gdn_decode"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
STATES = ("conv_state", "recurrent_state")
HEADS = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
BF16 = dict.fromkeys(("T", "z", "a", "b", "conv_weight", "norm_weight", "conv_state"), "bfloat16")
DIMS = {"...": (2,), "HV": 32, "W": 4, "n": 4, "conv_slots": 3, "slots": 2}
CASES = [
    *cases(SPEC.name),
    Case("qwen3_next_80b", DIMS, HEADS, BF16, present=("z",)),
    Case("qwen3_next_80b-bfloat16", DIMS, HEADS, BF16 | {"recurrent_state": "bfloat16"}, present=("z",)),
]
TOKENS = ("tokens_4-int32-accepted", "tokens_4-padded")


def arguments(name: str, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """What the dispatcher passes of a case."""
    [case] = [case for case in CASES if case.name == name]
    return place(make_inputs(SPEC, case, seed), "torch", device)


def run(values: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = gdn_decode(**values)
    return out


def bits(tensor: torch.Tensor) -> bytes:
    return to_numpy(tensor).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, device: str) -> None:
    trial = Trial(SPEC.name, case, seed=3)
    made, call = trial.inputs()
    values = place(made, "torch", device)
    inputs = {n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor) and n not in STATES}
    out = run(values)
    assert out.is_contiguous()
    assert trial.check((out, *(values[name] for name in STATES)), call) is None
    assert all(bits(values[name]) == bits(value) for name, value in inputs.items())


def test_only_named_slots_are_written() -> None:
    values = arguments("indices_int32-h2-hv4")
    before = {name: values[name].clone() for name in STATES}
    run(values)
    named = {int(slot) for slot in values["state_indices"] if slot >= 0}
    assert 0 < len(named) < len(values["state_indices"])
    for name, old in before.items():
        for slot in range(len(old)):
            assert (bits(old[slot]) == bits(values[name][slot])) == (slot not in named)


@pytest.mark.parametrize("first", [0, 3])
def test_many_rows_without_a_slot(first: int) -> None:
    """They share one slot with a row that has it, of which nothing may be lost."""
    values = arguments("batch_1")
    rows = {name: values[name].repeat(7, *[1] * (values[name].ndim - 1)) for name in ("x", "z", "a", "b")}
    rows["x"][:first] = torch.nan
    rows["x"][first + 1 :] = torch.nan
    indices = torch.full((7,), -1)
    indices[first] = 0
    other = {name: values[name].clone() for name in STATES}
    out = run(values | rows | {"state_indices": indices} | other)
    want = run(values)
    assert bits(out[first]) == bits(want[0])
    assert torch.count_nonzero(out) == torch.count_nonzero(want)
    for name in STATES:
        assert bits(other[name]) == bits(values[name])


def test_no_row_with_a_slot_changes_nothing() -> None:
    values = arguments("batch_1")
    for name in STATES:
        values[name][0] = torch.nan
    before = {name: values[name].clone() for name in STATES}
    out = run(values | {"state_indices": torch.tensor([-1])})
    assert not out.any()
    for name in STATES:
        assert bits(values[name]) == bits(before[name])


def test_two_steps_are_one_of_two_tokens() -> None:
    values = arguments("tokens_2-int32")
    indices = values["state_indices"]
    steps = []
    conv_state = values["conv_state"][:, :, 1:].clone()  # with W - 1 columns
    state = values["recurrent_state"].clone()
    for t in range(2):
        rows = {name: values[name][:, t] for name in ("x", "z", "a", "b")}
        changed = {"conv_state": conv_state, "recurrent_state": state, "state_indices": indices[:, 0]}
        steps.append(run(values | rows | changed))
    both = run(values)
    assert bits(torch.stack(steps, dim=1)) == bits(both)
    for b, (first, last) in enumerate(indices.tolist()):
        assert bits(state[first]) == bits(values["recurrent_state"][last]), b
        assert bits(conv_state[first]) == bits(values["conv_state"][first, :, 1:])


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_speculation_goes_on_behind_the_accepted_tokens(accepted: int) -> None:
    """Four tokens of which some are accepted, then two more: as those accepted and the two at once."""
    values = arguments("tokens_4-int64")
    rows = ("x", "z", "a", "b")
    more = {name: values[name].flip(1) for name in rows}
    start = {name: values[name].clone() for name in STATES}
    run(values)
    count = torch.full((len(values["x"]),), accepted, dtype=torch.int32)
    out = run(values | more | {"num_accepted": count})

    indices = values["state_indices"][:, :1]
    conv_state = start["conv_state"][:, :, 3:].clone()  # W - 1 columns, which one token has
    states = {"conv_state": conv_state, "recurrent_state": start["recurrent_state"], "state_indices": indices}
    for t in range(accepted):
        run(values | {name: values[name][:, t : t + 1] for name in rows} | states)
    for t in range(4):
        step = run(values | {name: more[name][:, t : t + 1] for name in rows} | states)
        assert bits(step[:, 0]) == bits(out[:, t])
    for b, slot in enumerate(indices[:, 0].tolist()):
        last = values["state_indices"][b, 3]
        assert bits(states["recurrent_state"][slot]) == bits(values["recurrent_state"][last])
        assert bits(conv_state[slot]) == bits(values["conv_state"][slot, :, 3:])


def test_the_conv_is_that_of_gdn_conv_prep() -> None:
    """A state of 0 makes o the value, times the query's part in the key."""
    values = arguments("state_zeros") | {"scale": 1.0, "norm_eps": 1e-30}
    before = values["conv_state"][: len(values["x"]), :, -3:].clone()
    out = run(values)
    names = {"weight": "conv_weight", "a": "a", "b": "b", "A_log": "A_log", "dt_bias": "dt_bias", "bias": "conv_bias"}
    heads = {name: values[name] for name in ("num_k_heads", "head_k_dim", "head_v_dim")}
    starts = torch.arange(len(before) + 1)
    given = {name: values[other] for name, other in names.items()}
    q, k, v, _, beta, _ = gdn_conv_prep(values["x"], **given, **heads, initial_state=before, cu_seqlens=starts)
    q, k = (part.repeat_interleave(v.shape[1] // part.shape[1], dim=1) for part in (q, k))
    o = v * beta[..., None] * (q * k).sum(-1, keepdim=True)
    normed = o * o.square().mean(-1, keepdim=True).rsqrt() * values["norm_weight"]
    want = normed * torch.nn.functional.silu(values["z"].reshape(normed.shape))
    torch.testing.assert_close(out.reshape(want.shape), want, rtol=1e-4, atol=1e-6)


def test_nan_stays_in_its_sequence() -> None:
    values = arguments("bias-float32", seed=1)
    clean = {name: values[name].clone() for name in STATES}
    want = run(values | clean)
    values["x"][1] = torch.nan
    out = run(values)
    others = [0, 2, 3]
    assert out[1].isnan().all()
    assert bits(out[others]) == bits(want[others])
    for name in STATES:
        assert bits(values[name][others]) == bits(clean[name][others])


@pytest.mark.parametrize(
    "name", ["float32-float32", "indices_int64-h2-hv4", "tokens_4-int32-accepted", "tokens_4-padded"]
)
def test_a_row_is_the_same_in_any_batch(name: str) -> None:
    values = arguments(name)
    alone = {state: values[state].clone() for state in STATES}
    out = run(values)
    indices = values["state_indices"]
    batch = len(values["x"])
    indices = torch.arange(batch) if indices is None else indices
    for b in range(batch):
        rows = {n: values[n][b : b + 1] for n in ("x", "z", "a", "b", "num_accepted") if values[n] is not None}
        assert bits(run(values | rows | alone | {"state_indices": indices[b : b + 1]})) == bits(out[b : b + 1])
    for state in STATES:
        assert bits(alone[state]) == bits(values[state])


@pytest.mark.parametrize("name", ["indices_int32-h2-hv4", *TOKENS])
def test_nothing_is_read_back(name: str) -> None:
    """A fake tensor has no values to read."""
    values = arguments(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        assert run(fake).shape == values["z"].shape


@pytest.mark.parametrize(
    "name", ["bfloat16-float32", "indices_int32-h2-hv4", "interleaved-bfloat16", "tokens_2-strided"]
)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    values, other = arguments(name), arguments(name)
    arrays = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
    options = {n: v for n, v in values.items() if n not in arrays}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        return polyfuse.gdn_decode(**options, **arrays | {"x": arrays["x"] * 1})

    want = run(other)
    assert bits(model(arrays)) == bits(want)
    for state in STATES:
        assert bits(values[state]) == bits(other[state])
