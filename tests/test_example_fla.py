"""The example backend `examples/polyfuse-fla` on a CPU, where a stand-in with FLA's manners takes FLA's place."""

import logging
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import normalize

import polyfuse
from polyfuse import BackendError, Unsupported
from polyfuse.conformance import run
from polyfuse.dispatch import registry
from polyfuse.spec import OPS

EXAMPLE = Path(__file__).parents[1] / "examples/polyfuse-fla"
OP = "gated_delta_rule"


class StandIn:
    """`chunk_gated_delta_rule` row by row in PyTorch, with what FLA and FlashQLA ask for, leave out and keep.

    `calls` holds the rows and the sequences of each call, `claimed` what the backend claims of the real one.
    """

    def __init__(self):
        self.calls = []
        self.claimed = None
        self._boundaries = []

    def __call__(
        self,
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):
        assert q.dtype is torch.bfloat16
        assert q.shape[-1] <= 256
        assert all(x.data_ptr() % 16 == 0 and len(x) == 1 for x in (q, k, v, g, beta))
        rows, heads_v = v.shape[1:3]
        ends = [0, rows] if cu_seqlens is None else self._kept(cu_seqlens, cu_seqlens_cpu)
        self.calls.append((rows, len(ends) - 1))
        if min(end - start for start, end in pairwise(ends)) <= 0:
            raise ValueError(f"invalid sequence lengths: {ends}")
        if initial_state is not None and len(initial_state) != len(ends) - 1:
            raise ValueError("The number of initial states is expected to be equal to the number of input sequences")
        q, k = (x[0].float().repeat_interleave(heads_v // q.shape[2], 1) for x in (q, k))
        o = torch.full_like(v[0], torch.nan)
        g = torch.where(g[0].isneginf(), torch.nan, g[0])
        states = []
        for number, (start, end) in enumerate(pairwise(ends)):
            state = torch.zeros(heads_v, q.shape[2], v.shape[3])
            if initial_state is not None:
                state = initial_state[number].float()
            for row in range(start, end):
                state = g[row].exp()[:, None, None] * state
                d = beta[0, row, :, None] * (v[0, row].float() - torch.einsum("hkv,hk->hv", state, k[row]))
                state = state + k[row][:, :, None] * d[:, None, :]
                o[row] = (scale or q.shape[2] ** -0.5) * torch.einsum("hkv,hk->hv", state, q[row])
            states.append(state)
        return o[None], torch.stack(states) if output_final_state else None

    def _kept(self, cu_seqlens, cu_seqlens_cpu):
        """The boundaries that this very tensor had when it was last seen, among the last four."""
        for tensor, ends in self._boundaries:
            if tensor is cu_seqlens:
                return ends
        assert torch.equal(cu_seqlens, cu_seqlens_cpu)
        self._boundaries = [*self._boundaries[-3:], (cu_seqlens, cu_seqlens.tolist())]
        return self._boundaries[-1][1]


def modules(function, version="0.6.0"):
    """The modules that the backend imports of FLA."""
    names = ("fla", "fla.ops", "fla.ops.gated_delta_rule")
    found = {name: ModuleType(name) for name in names}
    for module in found.values():
        module.__path__ = []
    found["fla"].__version__ = version
    found["fla"].__spec__ = ModuleSpec("fla", None)
    found[names[-1]].chunk_gated_delta_rule = function
    return found


@pytest.fixture
def registered(monkeypatch):
    """The example's package, registered, without FLA; its modules are gone afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    before = set(sys.modules)
    polyfuse.refresh()
    yield registry().add(import_module("polyfuse_fla").BACKEND)
    for name in [name for name in set(sys.modules) - before if name.startswith("polyfuse_fla")]:
        del sys.modules[name]
    polyfuse.refresh()


@pytest.fixture
def fla(registered, monkeypatch):
    """The stand-in, with the backend's claims of devices lifted."""
    stand_in = StandIn()
    for name, module in modules(stand_in).items():
        monkeypatch.setitem(sys.modules, name, module)
    module = import_module(f"polyfuse_fla.{OP}")
    stand_in.claimed = module.CAPABILITY
    monkeypatch.setattr(module, "CAPABILITY", replace(module.CAPABILITY, devices=("cpu",)))
    return stand_in


def made(rows, sequences=1):
    """Arguments of a call with an initial state."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = (normalize(normal(rows, 2, 16), dim=-1).bfloat16() for _ in "qk")
    gates = {"g": -normal(rows, 4).abs(), "beta": normal(rows, 4).sigmoid()}
    return {"q": q, "k": k, "v": normal(rows, 4, 8).bfloat16(), **gates, "initial_state": normal(sequences, 4, 16, 8)}


def test_the_entry_point_is_the_backend(registered):
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["polyfuse.backends"] == {"fla": "polyfuse_fla:BACKEND"}
    assert registry().get("fla").name == "fla"


def test_without_fla_it_says_how_to_install_it(registered):
    with pytest.raises(BackendError, match="fla: fla is not installed: pip install flash-linear-attention"):
        polyfuse.gated_delta_rule(**made(3), backend="fla")
    assert "polyfuse_fla.gated_delta_rule" not in sys.modules


def test_an_older_fla_is_refused(registered, monkeypatch):
    for name, module in modules(None, version="0.5.3").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(BackendError, match=r"flash-linear-attention: expected 0\.6 or later, got 0\.5\.3"):
        polyfuse.gated_delta_rule(**made(3), backend="fla")


@pytest.mark.slow
def test_it_is_conformant(fla):
    report = run([OP], ["fla"], level="quick", only=OPS[OP].core)
    assert report.ok, [(r.case, r.detail) for r in report.results if r.status == "failed"]
    assert sum(r.status == "passed" for r in report.results) >= 8
    declared = (
        "unsupported: q.dtype=float32",
        "unsupported: q.dtype=float16",
        "unsupported: K=",
        "unsupported: V=",
        "not among the cases asked for",
    )
    assert all(r.detail.startswith(declared) for r in report.results if r.status == "skipped")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({name: torch.zeros(3, heads, 8).half() for name, heads in (("q", 2), ("k", 2), ("v", 4))}, "q.dtype=float16"),
        ({name: torch.zeros(3, heads, 8) for name, heads in (("q", 2), ("k", 2), ("v", 4))}, "q.dtype=float32"),
        ({name: torch.zeros(3, 2, 12).bfloat16() for name in "qk"} | {"v": torch.zeros(3, 4, 8).bfloat16()}, "K=12"),
        ({name: torch.zeros(3, 2, 264).bfloat16() for name in "qk"} | {"v": torch.zeros(3, 4, 8).bfloat16()}, "K=264"),
        ({"v": torch.zeros(3, 4, 9).bfloat16()}, "V=9"),
        ({"beta": torch.zeros(3, 4, requires_grad=True)}, "an input requires grad"),
    ],
)
def test_what_is_not_claimed_is_refused(fla, changes, reason):
    arguments = made(3) | changes | {"initial_state": None}
    with pytest.raises(Unsupported, match=f"fla: {reason}"):
        polyfuse.gated_delta_rule(**arguments, backend="fla")
    assert fla.calls == []


def test_the_device_is_claimed_to_be_cuda(fla):
    assert (fla.claimed.devices, fla.claimed.min_arch) == (("cuda",), {"cuda": (8, 0)})


def test_boundaries_changed_in_place_are_read_again(fla):
    arguments, ends = made(200, 2), torch.tensor([0, 70, 200])
    polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, backend="fla")
    ends.copy_(torch.tensor([0, 5, 200]))
    o, final = polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, output_final_state=True, backend="fla")
    want, want_final = polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, output_final_state=True, backend="torch")
    torch.testing.assert_close(o.float(), want.float(), atol=0.03, rtol=0.03)
    torch.testing.assert_close(final, want_final, atol=0.03, rtol=0.03)


def test_equal_boundaries_are_one_tensor_for_fla(fla):
    for ends in ([0, 70, 200], [0, 70, 200], [0, 70, 70, 200]):  # an empty sequence changes nothing for the others
        polyfuse.gated_delta_rule(
            **made(200) | {"initial_state": None}, cu_seqlens=torch.tensor(ends, dtype=torch.int32), backend="fla"
        )
    assert fla.calls == [(200, 2)] * 3
    assert len(fla._boundaries) == 1


def test_fla_gets_the_rows_of_sequences_alone(fla):
    arguments = made(12, 4)
    arguments["v"][:2] = arguments["v"][9:] = torch.nan
    ends = torch.tensor([2, 2, 5, 9, 9])
    o, final = polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, output_final_state=True, backend="fla")
    assert fla.calls == [(7, 2)]
    assert o[:2].eq(0).all()
    assert o[9:].eq(0).all()
    assert o[2:9].isfinite().all()
    assert torch.equal(final[[0, 3]], arguments["initial_state"][[0, 3]])
    assert not final[[1, 2]].eq(arguments["initial_state"][[1, 2]]).any()


@pytest.mark.parametrize("ends", [[0, 0, 0], [3, 3, 3]])
def test_without_rows_nothing_is_called_and_the_state_is_a_copy(fla, ends):
    arguments = made(3, 2)
    o, final = polyfuse.gated_delta_rule(
        **arguments, cu_seqlens=torch.tensor(ends), output_final_state=True, backend="fla"
    )
    assert fla.calls == []
    assert o.eq(0).all()
    assert torch.equal(final, arguments["initial_state"])
    assert final.data_ptr() != arguments["initial_state"].data_ptr()


def test_a_view_at_any_element_is_moved_to_where_a_tensor_map_can_begin(fla):
    arguments = made(3)
    v = torch.empty(arguments["v"].numel() + 1, dtype=torch.bfloat16)[1:].view_as(arguments["v"]).copy_(arguments["v"])
    assert v.data_ptr() % 16 != 0
    o, _ = polyfuse.gated_delta_rule(**arguments | {"v": v}, backend="fla")
    want, _ = polyfuse.gated_delta_rule(**arguments, backend="fla")
    assert torch.equal(o, want)


def test_packed_sequences_are_declined_in_a_capture_before_anything_is_read(fla, monkeypatch, caplog):
    assert fla.claimed.host_reads == ("cu_seqlens",)
    monkeypatch.setattr("polyfuse.dispatch._select.is_captured", lambda device: True)
    arguments, ends = made(9, 2), torch.tensor([0, 4, 9])
    with pytest.raises(
        Unsupported, match="cu_seqlens in the capture of a CUDA graph: fla reads the values on the host"
    ):
        polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, backend="fla")
    with caplog.at_level(logging.WARNING, "polyfuse"):
        polyfuse.gated_delta_rule(**arguments, cu_seqlens=ends, backend=["fla", "torch"])
    assert "gated_delta_rule: fla declined this call (cu_seqlens in the capture" in caplog.text
    assert fla.calls == []
    polyfuse.gated_delta_rule(**made(9), backend="fla")
    assert fla.calls == [(9, 1)]
