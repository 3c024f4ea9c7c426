"""Selection: precedence, strictness, fall-through, and what explain says of it."""

import asyncio
import logging
import sys
import threading
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
import torch

import polyfuse
from polyfuse import BackendError, SpecError, Unsupported
from polyfuse.configs import platform_order
from polyfuse.dispatch import Backend, Device, Implementation, registry
from polyfuse.dispatch._select import clear_settings, preference
from polyfuse.spec import OPS, Capability, Deferral

TABLE = torch.randn(36, 8)
GRID = [[1, 2, 4]]
OP = "pos_embed_interpolate"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    polyfuse.refresh()
    yield
    polyfuse.refresh()


def winner(**kwargs):
    return polyfuse.explain(OP, TABLE, GRID, **kwargs)


def test_platform_default_on_cpu():
    decision = winner()
    assert (decision.winner, decision.preference.source) == ("torch", "configs/platforms/cpu.yaml")
    assert {c.name: c.status for c in decision.candidates} == {
        "torch": "chosen",
        "triton": "usable",
        "numpy": "wrong_family",
        "jax": "wrong_family",
        "pallas": "wrong_family",
    }


def test_precedence_from_the_lowest_to_the_highest(monkeypatch, tmp_path):
    (tmp_path / "polyfuse.yaml").write_text("backend: triton\n")
    polyfuse.refresh()
    assert (winner().winner, winner().preference.source) == ("triton", "polyfuse.yaml: backend")
    (tmp_path / "polyfuse.yaml").write_text(f"backend: triton\nops: {{{OP}: [torch]}}\n")
    polyfuse.refresh()
    assert (winner().winner, winner().preference.source) == ("torch", f"polyfuse.yaml: ops.{OP}")
    monkeypatch.setenv("POLYFUSE_BACKEND", "triton")
    polyfuse.refresh()
    assert (winner().winner, winner().preference.source) == ("triton", "environment variable POLYFUSE_BACKEND")
    monkeypatch.setenv("POLYFUSE_BACKEND_POS_EMBED_INTERPOLATE", "torch")
    polyfuse.refresh()
    assert winner().winner == "torch"
    with polyfuse.use_backend(["triton", "torch"]):
        assert (winner().winner, winner().preference.source) == ("triton", "polyfuse.use_backend")
        assert winner(backend="torch").winner == "torch"
    assert winner().winner == "torch"


def test_config_file_named_by_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("backend: triton\n")
    monkeypatch.setenv("POLYFUSE_CONFIG", str(path))
    polyfuse.refresh()
    assert winner().preference.source == f"{path}: backend"
    monkeypatch.setenv("POLYFUSE_CONFIG", str(tmp_path / "absent.yaml"))
    polyfuse.refresh()
    with pytest.raises(SpecError, match=r"absent\.yaml: cannot be read: No such file"):
        winner()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("use", ["call", "context", "environment", "config"])
def test_a_backend_of_other_arrays_gets_converted_ones_wherever_it_is_named(monkeypatch, tmp_path, use, strict):
    backend = None
    context = nullcontext()
    if strict:
        monkeypatch.setenv("POLYFUSE_STRICT", "1")
    if use == "call":
        backend = "jax"
    elif use == "context":
        context = polyfuse.use_backend("jax")
    elif use == "environment":
        monkeypatch.setenv("POLYFUSE_BACKEND", "jax")
    else:
        (tmp_path / "polyfuse.yaml").write_text("backend: jax\n")
        monkeypatch.chdir(tmp_path)
    polyfuse.refresh()
    with context:
        assert polyfuse.explain(OP, TABLE, GRID, backend=backend).winner == "jax"
        out = polyfuse.pos_embed_interpolate(TABLE, GRID, backend=backend)
    assert isinstance(out, torch.Tensor)
    assert polyfuse.call_counts() == {(OP, "jax"): 1}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "POLYFUSE_BACKEND_SILU_MUL_BLOK_QUANT",
            "torch",
            "unknown; did you mean POLYFUSE_BACKEND_SILU_MUL_BLOCK_QUANT",
        ),
        (
            "POLYFUSE_BACKENDS",
            "torch",
            "environment variable POLYFUSE_BACKENDS: unknown; did you mean POLYFUSE_BACKEND?",
        ),
        ("POLYFUSE_OF_NO_OP_AT_ALL", "1", "POLYFUSE_OF_NO_OP_AT_ALL: unknown; known are POLYFUSE_BACKEND, "),
        ("POLYFUSE_BACKEND", "trition", "environment variable POLYFUSE_BACKEND: .*got 'trition'; did you mean triton?"),
        ("POLYFUSE_STRICT", "true", "environment variable POLYFUSE_STRICT: expected 0 or 1, got 'true'"),
    ],
)
def test_a_variable_without_a_meaning_is_an_error_that_names_it(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    polyfuse.refresh()
    with pytest.raises((SpecError, BackendError), match=message):
        polyfuse.pos_embed_interpolate(TABLE, GRID)


def test_a_backend_registered_late_is_considered():
    with polyfuse.use_backend("torch"):
        before = polyfuse.pos_embed_interpolate(TABLE, GRID)
        late = Backend("torch", "torch", "polyfuse.late", implements={OP: OPS[OP].version}, override=True)
        sys.modules["polyfuse.late"] = ModuleType("polyfuse.late")
        module = ModuleType(f"polyfuse.late.{OP}")
        module.__dict__.update(CAPABILITY=Capability(), **{OP: lambda table, grid, **_: before + 1})
        sys.modules[module.__name__] = module
        try:
            registry().add(late)
            assert torch.equal(polyfuse.pos_embed_interpolate(TABLE, GRID), before + 1)
        finally:
            registry.cache_clear()
            polyfuse.refresh()


@pytest.mark.parametrize("use", ["call", "context", "environment"])
def test_an_unknown_name_lists_the_known_ones(monkeypatch, use):
    uses = {
        "call": lambda: polyfuse.pos_embed_interpolate(TABLE, GRID, backend="trition"),
        "context": lambda: polyfuse.use_backend("trition").__enter__(),
        "environment": lambda: polyfuse.pos_embed_interpolate(TABLE, GRID),
    }
    if use == "environment":
        monkeypatch.setenv("POLYFUSE_BACKEND", "trition")
        polyfuse.refresh()
    with pytest.raises(BackendError, match="expected one of numpy, jax, pallas, torch, triton, got 'trition'; did you"):
        uses[use]()


@pytest.fixture
def picky(monkeypatch):
    """A torch backend that refuses by capability (bicubic) and at the call (merge_size 1), else returns 7s."""

    def function(table, grid_thw, **attrs):
        if attrs["merge_size"] == 1:
            raise Unsupported("merge_size=1")
        return torch.full((8, 8), 7.0)

    backend = Backend("picky", "torch", "polyfuse.torch_impl", implements={OP: OPS[OP].version})
    implementation = Implementation(function, Capability(attrs={"mode": ("bilinear",)}, differentiable=True))
    monkeypatch.setattr(
        Backend, "load", lambda self, op, load=Backend.load: implementation if self is backend else load(self, op)
    )
    registry().add(backend)


def test_a_named_backend_that_refuses_raises_unless_the_list_goes_on(picky, caplog):
    assert polyfuse.pos_embed_interpolate(TABLE, GRID, backend="picky")[0, 0] == 7
    with pytest.raises(Unsupported, match=r"no backend of \[picky\].*mode='bicubic': supports 'bilinear'"):
        polyfuse.pos_embed_interpolate(TABLE, GRID, mode="bicubic", backend="picky")
    out = polyfuse.pos_embed_interpolate(TABLE, GRID, mode="bicubic", backend=["picky", "torch"])
    assert torch.equal(out, polyfuse.pos_embed_interpolate(TABLE, GRID, mode="bicubic", backend="torch"))


def test_a_backend_may_decline_at_the_call(picky, caplog):
    with pytest.raises(Unsupported, match="merge_size=1"):
        polyfuse.pos_embed_interpolate(TABLE, GRID, merge_size=1, backend="picky")
    with caplog.at_level(logging.WARNING, "polyfuse"):
        out = polyfuse.pos_embed_interpolate(TABLE, GRID, merge_size=1, backend=["picky", "torch"])
    assert torch.equal(out, polyfuse.pos_embed_interpolate(TABLE, GRID, merge_size=1))
    assert "picky declined this call (merge_size=1): passed over" in caplog.text


def test_one_warning_for_each_op_and_reason(picky, caplog):
    with caplog.at_level(logging.WARNING, "polyfuse"):
        for rows in (2, 4, 6):  # another signature each time
            polyfuse.pos_embed_interpolate(TABLE, [[1, rows, 4]], merge_size=1, backend=["picky", "torch"])
    assert caplog.text.count("picky declined this call (merge_size=1): passed over") == 1


@pytest.mark.parametrize("use", ["context", "environment", "config"])
def test_strict_mode_allows_the_first_name_only(picky, monkeypatch, tmp_path, use):
    names = ["picky", "torch"]
    if use == "environment":
        monkeypatch.setenv("POLYFUSE_STRICT", "1")
        clear_settings()
    if use == "config":
        (tmp_path / "polyfuse.yaml").write_text("strict: true\n")
        clear_settings()
    with polyfuse.use_backend(names, strict=True if use == "context" else None):
        assert polyfuse.pos_embed_interpolate(TABLE, GRID)[0, 0] == 7
        text = r"no backend of \[picky\] \(strict, polyfuse.use_backend\) can run this call: .*mode='bicubic'"
        with pytest.raises(Unsupported, match=text):
            polyfuse.pos_embed_interpolate(TABLE, GRID, mode="bicubic")
        with pytest.raises(Unsupported, match="merge_size=1"):
            polyfuse.pos_embed_interpolate(TABLE, GRID, merge_size=1)
        decision = winner(mode="bicubic")
        assert (decision.strict, decision.winner) == (True, None)
        assert "strict mode allows picky only" in str(decision)
        with polyfuse.use_backend(strict=False):
            assert winner(mode="bicubic").winner == "torch"


def test_a_strict_setting_is_checked(monkeypatch):
    monkeypatch.setenv("POLYFUSE_STRICT", "yes")
    with pytest.raises(SpecError, match="environment variable POLYFUSE_STRICT: expected 0 or 1, got 'yes'"):
        winner()


def test_what_ran_is_counted(picky):
    polyfuse.refresh()
    registry().add(Backend("picky", "torch", "polyfuse.torch_impl", implements={OP: OPS[OP].version}))
    for _ in range(3):
        polyfuse.pos_embed_interpolate(TABLE, GRID)
    polyfuse.pos_embed_interpolate(TABLE, GRID, backend="triton")
    with pytest.raises(SpecError):
        polyfuse.pos_embed_interpolate(TABLE, [[1, 3, 3]])
    assert polyfuse.call_counts() == {(OP, "torch"): 3, (OP, "triton"): 1}
    polyfuse.refresh()
    assert polyfuse.call_counts() == {}


def test_a_device_of_its_own_brings_its_backend_first(monkeypatch):
    registry().add(Backend("ours", "torch", "polyfuse.torch_impl", implements={OP: OPS[OP].version}, devices=("npu",)))
    wanted = preference(OP, "torch", Device("npu"), None)
    assert wanted.names == ("ours", "torch")
    assert wanted.source == "backends of other packages for npu, then configs/platforms/default.yaml"
    assert preference(OP, "torch", Device("cuda"), None).names == ("triton", "torch")


def rows_on_the_cpu(**kwargs):
    """What would run a call of the op whose default on CUDA names a backend of another package."""
    x = torch.zeros(2, 1, 8)
    return polyfuse.explain("gated_delta_rule", x, x, x, torch.zeros(2, 1), torch.zeros(2, 1), **kwargs)


@pytest.fixture
def defaults_of_cuda(monkeypatch):
    """Let calls on the CPU be preferred as those on CUDA are."""
    order = platform_order("cuda", "torch", "gated_delta_rule")
    assert order == (("fla", "triton", "torch"), "configs/platforms/cuda.yaml")
    monkeypatch.setattr("polyfuse.dispatch._select.platform_order", lambda *_: order)


def test_a_default_skips_a_name_that_no_installed_package_has(defaults_of_cuda, caplog):
    with caplog.at_level(logging.WARNING, "polyfuse"):
        decision = rows_on_the_cpu()
    assert decision.preference.names == ("triton", "torch")
    assert "fla" not in str(decision) + caplog.text
    with polyfuse.use_backend(strict=True):
        assert [c.reason for c in rows_on_the_cpu().candidates if c.name == "torch"] == [
            "strict mode allows triton only"
        ]
    with pytest.raises(BackendError, match="backend: expected one of numpy, jax, pallas, torch, triton, got 'fla'"):
        rows_on_the_cpu(backend="fla")


def test_a_default_begins_with_the_backend_of_another_package_once_it_is_there(defaults_of_cuda):
    version = {"gated_delta_rule": OPS["gated_delta_rule"].version}
    registry().add(Backend("fla", "torch", "polyfuse.torch_impl", implements=version))
    decision = rows_on_the_cpu()
    assert (decision.winner, decision.preference.names) == ("fla", ("fla", "triton", "torch"))


def test_a_default_says_that_a_backend_of_an_installed_package_is_broken(defaults_of_cuda, caplog):
    registry().problems.append(("fla", "two installed packages provide it"))
    x = torch.zeros(2, 1, 8)
    with caplog.at_level(logging.WARNING, "polyfuse"):
        polyfuse.gated_delta_rule(x, x, x, torch.zeros(2, 1), torch.zeros(2, 1))
    text = "gated_delta_rule: fla does not run this call (backend 'fla': two installed packages provide it): passed"
    assert text in caplog.text


def test_any_other_exception_is_a_bug_and_propagates(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("bug")

    implementation = Implementation(broken, Capability())
    monkeypatch.setattr(Backend, "load", lambda self, op: implementation)
    with pytest.raises(ZeroDivisionError, match="bug"):
        polyfuse.pos_embed_interpolate(TABLE, GRID, backend=["torch", "triton"])


def test_a_gradient_keeps_a_backend_without_backward_out():
    table = TABLE.clone().requires_grad_()
    assert polyfuse.explain(OP, table, GRID, backend=["triton", "torch"]).winner == "torch"
    polyfuse.pos_embed_interpolate(table, GRID).sum().backward()
    assert table.grad is not None
    assert torch.isclose(table.grad.sum(), torch.tensor(64.0))
    with torch.no_grad():
        assert polyfuse.explain(OP, table, GRID, backend=["triton", "torch"]).winner == "triton"


def test_use_backend_belongs_to_the_thread_and_to_the_task():
    seen = {}

    def other():
        seen["thread"] = winner().winner

    async def task(name, barrier):
        with polyfuse.use_backend(name):
            await barrier.wait()
            seen[name] = winner().winner

    async def both():
        barrier = asyncio.Barrier(2)
        await asyncio.gather(task("triton", barrier), task("torch", barrier))

    with polyfuse.use_backend("triton"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    asyncio.run(both())
    assert seen == {"thread": "torch", "triton": "triton", "torch": "torch"}


def test_explain_checks_the_call_it_explains():
    with pytest.raises(SpecError, match="divisible"):
        polyfuse.explain(OP, TABLE, [[1, 3, 3]])
    with pytest.raises(SpecError, match="op: expected one of pos_embed_interpolate"):
        polyfuse.explain("pos_embed", TABLE, GRID)
    with pytest.raises(SpecError, match=r"expected the parameters table, grid_thw.*got modus"):
        polyfuse.explain(OP, TABLE, GRID, modus="bilinear")
    assert "torch      chosen" in str(winner())
    assert winner().as_dict()["winner"] == "torch"


def test_mixed_arrays_are_refused():
    with pytest.raises(SpecError, match=r"base: expected a torch array on cpu as table, got numpy on cpu"):
        polyfuse.pos_embed_interpolate(TABLE, GRID, base=np.zeros((8, 8), np.float32))
    with pytest.raises(SpecError, match=r"grid_thw: expected a torch array on cpu as table, got torch on meta"):
        polyfuse.pos_embed_interpolate(TABLE, torch.ones((1, 3), dtype=torch.int64, device="meta"), out_rows=4)


@pytest.fixture
def deferring(monkeypatch):
    """The torch backend of the CPU, which comes first there, leaves tables of 8 columns to triton."""
    load = Backend.load
    torch_backend = registry().get("torch")
    capability = Capability(defers=(Deferral("cpu", "triton is faster", multiples={"D": 8}),), differentiable=True)
    mine = Implementation(load(torch_backend, OP).function, capability)
    monkeypatch.setattr(Backend, "load", lambda self, op: mine if self.name == "torch" else load(self, op))
    polyfuse.refresh()


def test_a_backend_that_defers_comes_last_in_a_platforms_order(deferring, caplog):
    with caplog.at_level(logging.WARNING, "polyfuse"):
        polyfuse.pos_embed_interpolate(TABLE, GRID)
    assert polyfuse.call_counts() == {(OP, "triton"): 1}
    assert caplog.text == ""
    reasons = {c.name: (c.status, c.reason) for c in winner().candidates}
    assert reasons["triton"] == ("chosen", "first usable of configs/platforms/cpu.yaml")
    assert reasons["torch"] == ("usable", "comes after triton: triton is faster")
    assert polyfuse.explain(OP, TABLE[:, :7], GRID).winner == "torch"
    with polyfuse.use_backend(strict=True):
        assert winner().winner == "triton"


def test_a_backend_that_defers_runs_where_it_is_named_or_alone(deferring):
    assert winner(backend=["torch", "triton"]).winner == "torch"
    with polyfuse.use_backend(["torch", "triton"]):
        assert winner().winner == "torch"
    assert polyfuse.pos_embed_interpolate(torch.randn(36, 8, requires_grad=True), GRID).requires_grad
