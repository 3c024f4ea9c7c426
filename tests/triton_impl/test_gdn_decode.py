"""`gdn_decode` in Triton: one launch, whose programs own the states that they write, in whatever order they run."""

from typing import Any

import pytest
import torch

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry, to_numpy
from polyfuse.triton_impl import gdn_decode as module
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl._plans import Plan, Plans
from polyfuse.triton_impl.gdn_decode import gdn_decode
from tests.triton_impl.helpers import DEVICE

OP = "gdn_decode"
# The interpreter takes a third of a second for each.
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 8 else []) for n, case in enumerate(cases(OP))]
STATES = "conv_state", "recurrent_state"
B, H, HV, K, V = 3, 2, 4, 16, 24
SLOTS = [4, -1, 0]  # of six

interpreted = pytest.mark.skipif(not INTERPRETED.value, reason="steers the interpreter's programs")
# NumPy's, from the interpreter: what an infinity gives.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def arguments(**changed: Any) -> dict[str, Any]:
    """One token of three sequences, of which the second has no slot; nobody's slots hold NaN."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE)

    channels = 2 * H * K + HV * V
    args: dict[str, Any] = {"x": normal(B, channels), "z": normal(B, HV * V), "a": normal(B, HV), "b": normal(B, HV)}
    args |= {"conv_weight": normal(channels, 4), "A_log": normal(HV), "dt_bias": normal(HV), "norm_weight": normal(V)}
    args |= {"conv_state": normal(6, channels, 4), "recurrent_state": normal(6, HV, K, V)}
    for name in STATES:
        args[name][[1, 2, 3, 5]] = torch.nan
    args |= {"state_indices": torch.tensor(SLOTS, device=DEVICE, dtype=torch.int32)}
    return {**args, "num_k_heads": H, "head_k_dim": K, "head_v_dim": V, **changed}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


def step(args: dict[str, Any]) -> tuple[bytes, ...]:
    """The bits of the output and of both states after a step."""
    out = gdn_decode(**args)
    return bits(out), *(bits(args[name]) for name in STATES)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")


def test_a_step_is_one_launch_that_writes_every_element(launches: list[tuple[int, ...]], poisoned_memory: None) -> None:
    out = gdn_decode(**arguments())
    assert out.isfinite().all()
    assert not out[1].any()
    assert launches == [(B * H, 1, 1)]


def test_no_sequences_is_no_launch(launches: list[tuple[int, ...]]) -> None:
    args = arguments()
    none = {name: args[name][:0] for name in ("x", "z", "a", "b", "state_indices")}
    assert gdn_decode(**args | none).shape == (0, HV * V)
    assert launches == []


def test_a_sequence_alone_has_the_same_bits() -> None:
    args = arguments()
    out, states = gdn_decode(**args), [args[name] for name in STATES]
    for i in (0, 2):
        alone = arguments()
        mine = {name: alone[name][i : i + 1] for name in ("x", "z", "a", "b", "state_indices")}
        assert bits(gdn_decode(**alone | mine)) == bits(out[i : i + 1])
        for name, state in zip(STATES, states, strict=True):
            assert bits(alone[name][SLOTS[i]]) == bits(state[SLOTS[i]])


@interpreted
@pytest.mark.parametrize("tokens", [1, 3])
def test_programs_run_in_any_order(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = step(several(tokens))
    for seed in range(4):
        order = torch.randperm(B * H, generator=torch.Generator().manual_seed(seed)).tolist()
        steer(monkeypatch, order)
        assert step(several(tokens)) == wanted


@interpreted
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_element_of_a_state_has_one_owner(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program alone writes no other one writes, and nobody else's elements are in what it writes."""
    all_of_them = several(tokens)
    out = gdn_decode(**all_of_them)
    owners = {name: torch.zeros(all_of_them[name].shape, dtype=torch.int32) for name in STATES}
    for program in range(B * H):
        sequence, head = divmod(program, H)
        run_only(monkeypatch, program)
        args = several(tokens)
        before = {name: args[name].clone() for name in STATES}
        gdn_decode(**args)
        written = {name: changed(args[name], before[name]) for name in STATES}
        for name in STATES:
            owners[name] += written[name].int()
        # The same program where all that it does not own is NaN.
        args = several(tokens)
        for name in STATES:
            args[name].masked_fill_(~owned(name, head, all_of_them[name].shape), torch.nan)
        mine = gdn_decode(**args).unflatten(-1, (HV, V))[sequence, ..., head * HV // H : (head + 1) * HV // H, :]
        assert bits(mine) == bits(out.unflatten(-1, (HV, V))[sequence, ..., head * HV // H : (head + 1) * HV // H, :])
    for name in STATES:
        assert owners[name].max() == 1
        live = [slot for slot in {*all_of_them["state_indices"].flatten().tolist()} if slot >= 0]
        expected = live if name == "recurrent_state" else [row[0] for row in slots(tokens) if row[0] >= 0]
        assert all(owners[name][slot].all() for slot in expected)


def several(tokens: int) -> dict[str, Any]:
    """The arguments of `tokens` tokens a sequence, each with a recurrent slot of its own."""
    args = arguments()
    if tokens == 1:
        return args
    random = torch.Generator().manual_seed(1)
    for name in ("x", "z", "a", "b"):
        args[name] = torch.randn(B, tokens, args[name].shape[-1], generator=random).to(DEVICE)
    args["conv_state"] = torch.randn(10, args["conv_state"].shape[1], 3 + tokens - 1, generator=random).to(DEVICE)
    args["recurrent_state"] = torch.randn(10, HV, K, V, generator=random).to(DEVICE)
    args["state_indices"] = torch.tensor(slots(tokens), device=DEVICE, dtype=torch.int32)
    args["num_accepted"] = torch.tensor([2, 1, 3], device=DEVICE, dtype=torch.int32)
    return args


def slots(tokens: int) -> list[list[int]]:
    """The slots of each sequence's tokens."""
    return [[slot] for slot in SLOTS] if tokens == 1 else [[4, 2, 7], [-1, -1, -1], [0, 9, 5]]


def owned(name: str, head: int, shape: torch.Size) -> torch.Tensor:
    """The elements that the programs of a key head own, in all slots."""
    mask = torch.zeros(shape, dtype=torch.bool)
    heads = slice(head * HV // H, (head + 1) * HV // H)
    if name == "recurrent_state":
        mask[:, heads] = True
        return mask
    q, k, v = mask.split([H * K, H * K, HV * V], dim=1)
    q[:, head * K : (head + 1) * K] = k[:, head * K : (head + 1) * K] = True
    v[:, heads.start * V : heads.stop * V] = True
    return mask


def changed(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (now != before) & ~(now.isnan() & before.isnan())


def run_only(monkeypatch: pytest.MonkeyPatch, program: int) -> None:
    """Let the next calls run one program of those that they have."""

    def planned(*call: Any) -> Plan:
        plan = module._plan(*call)
        plan.steps[0].grid = (1, 1, 1)
        return plan

    steer(monkeypatch, [program])
    monkeypatch.setattr(module, "_plans", Plans(planned))


def steer(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    """Let the interpreter run program `order[i]` where it would run program i."""
    from triton.runtime.interpreter import InterpreterBuilder

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        self.grid_idx = (order[x], y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


@pytest.mark.parametrize("apart", ["x", "z", "norm_weight", "A_log"])
def test_elements_that_lie_apart_are_read_right(apart: str) -> None:
    args = arguments()
    wanted = step(arguments())
    args[apart] = torch.stack([args[apart], args[apart]], dim=-1)[..., 0]
    assert args[apart].stride(-1) == 2
    assert step(args) == wanted


def test_plans_are_kept_apart() -> None:
    """A second call of another kind does not run as the first one."""
    wanted = step(arguments()), step(arguments(norm_eps=0.5)), step(arguments(scale=2.0))
    assert len({*wanted}) == 3
    assert (step(arguments()), step(arguments(norm_eps=0.5)), step(arguments(scale=2.0))) == wanted
    assert len({id(plan) for _, _, plan in module._plans.kinds.values()}) == len(module._plans.kinds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of an accelerator's memory")
def test_states_past_2_31_elements() -> None:
    """4,224 sequences with recurrent states of 2.2e9 elements, in slots in reverse: each run of 64 gives its bits."""
    rows, part, heads = 4224, 64, {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    channels, values = 8192, 32 * 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    few: dict[str, Any] = {"x": normal(part, channels), "z": normal(part, values)}
    few |= {"a": normal(part, 32), "b": normal(part, 32)}
    states = {"conv_state": normal(part, channels, 4), "recurrent_state": normal(part, 32, 128, 128) / 8}
    fixed = {"conv_weight": normal(channels, 4), "norm_weight": normal(128)}
    fixed |= {"A_log": normal(32).float(), "dt_bias": normal(32).float()}
    many = {name: x.repeat(rows // part, *[1] * (x.ndim - 1)) for name, x in few.items()}
    pools = {name: x.flip(0).repeat(rows // part, *[1] * (x.ndim - 1)) for name, x in states.items()}
    assert pools["recurrent_state"].numel() > 2**31
    slots = torch.arange(rows - 1, -1, -1, device=DEVICE)
    out = gdn_decode(**many, **fixed, **pools, **heads, state_indices=slots)
    wanted = gdn_decode(**few, **fixed, **states, **heads)
    assert torch.equal(out.view(-1, part, values), wanted.expand(rows // part, -1, -1))
    for name, state in states.items():
        assert torch.equal(pools[name].view(-1, *state.shape), state.flip(0).expand(rows // part, *state.shape)), name


def test_a_zero_row_gives_zeros_also_of_an_eps_below_float32():
    heads = {"num_k_heads": 1, "head_k_dim": 4, "head_v_dim": 4}
    dims = {"...": (2,), "HV": 1, "W": 2, "n": 1, "conv_slots": 2, "slots": 2}
    fill = {"x": "zeros", "conv_state": "zeros", "recurrent_state": "zeros"}
    case = Case("zeros-norm_eps", dims, heads | {"norm_eps": 1e-60, "l2norm_eps": 1e-60}, present=("z",), fill=fill)
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")
