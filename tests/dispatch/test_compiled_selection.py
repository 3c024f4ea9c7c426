"""`use_backend` and compiled functions: around their calls it decides each time, inside of them it raises."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.spec import OPS, Capability

TABLE = torch.full((36, 8), -1.0)  # of which the backends that compute give 0 after the addition in `embed`
GRID = [[1, 2, 4]]
OP = "pos_embed_interpolate"
RULE = (
    "use_backend: with: expected a block around the call of the compiled function, "
    "got one inside of it, where a graph holds no names"
)


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    """Three out-of-tree backends, which give 1, 2 and 3; the third cannot run bicubic calls."""
    polyfuse.refresh()
    torch._dynamo.reset()
    added = {}
    load = Backend.load
    monkeypatch.setattr(Backend, "load", lambda self, op: added.get(self.name) or load(self, op))
    for i, name in enumerate(("one", "two", "picky"), 1):
        modes = {"mode": ("bilinear",)} if name == "picky" else {}
        added[name] = Implementation(lambda *_, i=i, **__: torch.full((8, 8), float(i)), Capability(attrs=modes))
        registry().add(Backend(name, "torch", "polyfuse.torch_impl", implements={OP: OPS[OP].version}))
    yield
    polyfuse.refresh()


def ran():
    return {name: count for (_, name), count in polyfuse.call_counts().items()}


def embed(table, mode="bilinear"):
    """The op between two others, so that a graph has more to hold."""
    return polyfuse.pos_embed_interpolate(table + 1, GRID, mode=mode) * 10


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_around_a_compiled_function_each_call_follows_its_own_block(backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(embed, fullgraph=True, backend=counter)
    with polyfuse.use_backend("one"):
        assert (compiled(TABLE) == 10).all()
        with polyfuse.use_backend("two"):
            assert (compiled(TABLE) == 20).all()
        assert (compiled(TABLE) == 10).all()
    assert ran() == {"one": 2, "two": 1}
    assert (compiled(TABLE) == 0).all()
    assert ran() == {"one": 2, "two": 1, "torch": 1}
    assert counter.frame_count == 1


def test_around_a_compiled_function_strict_mode_holds():
    compiled = torch.compile(lambda table: embed(table, "bicubic"), fullgraph=True, backend="eager")
    with polyfuse.use_backend(["picky", "two"]):
        assert (compiled(TABLE) == 20).all()
        text = r"no backend of \[picky\] \(strict, polyfuse.use_backend\) can run this call: .*mode='bicubic'"
        with polyfuse.use_backend(strict=True), pytest.raises(Unsupported, match=text):
            compiled(TABLE)
        assert (compiled(TABLE) == 20).all()
    assert ran() == {"two": 2}


@pytest.mark.parametrize("options", [{"backend": "one"}, {"strict": True}], ids=["backend", "strict"])
@pytest.mark.parametrize("outer", [False, True])
def test_inside_a_full_graph_a_block_raises(options, outer):
    def inner(table):
        with polyfuse.use_backend(**options):
            return embed(table)

    compiled = torch.compile(inner, fullgraph=True, backend="eager")
    with polyfuse.use_backend("two" if outer else None):
        with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
            compiled(TABLE)
        assert RULE in str(caught.value)
        assert RULE in str(caught.value.__cause__)
        assert (torch.compile(embed, fullgraph=True, backend="eager")(TABLE) == (20 if outer else 0)).all()


def test_without_a_full_graph_a_block_inside_decides():
    @torch.compile(backend="eager")
    def compiled(table):
        first = embed(table)
        with polyfuse.use_backend("one"):
            second = embed(table)
            with polyfuse.use_backend("two"):
                third = embed(table)
        return first + second + third

    for _ in range(2):
        assert (compiled(TABLE) == 30).all()
    with polyfuse.use_backend("picky"):
        assert (compiled(TABLE) == 60).all()
    assert ran() == {"torch": 2, "one": 3, "two": 3, "picky": 1}


def test_a_recorded_call_follows_the_block_around_its_run_and_a_block_inside_raises():
    def inner(table):
        with polyfuse.use_backend("one"):
            return embed(table)

    with torch.no_grad():
        with pytest.raises(SpecError, match=f"^{RULE}$"):
            make_fx(inner)(TABLE)
        with polyfuse.use_backend("one"):
            graph = make_fx(lambda table: embed(table))(TABLE)
        with polyfuse.use_backend("two"):
            assert (graph(TABLE) == 20).all()


def test_an_exported_program_follows_the_block_around_its_run():
    class Model(torch.nn.Module):
        def forward(self, table):
            return embed(table)

    class Inner(torch.nn.Module):
        def forward(self, table):
            with polyfuse.use_backend("one"):
                return embed(table)

    with polyfuse.use_backend("one"):
        program = torch.export.export(Model(), (TABLE,)).module()
    with polyfuse.use_backend("two"):
        assert (program(TABLE) == 20).all()
    with pytest.raises(SpecError, match=RULE):
        torch.export.export(Inner(), (TABLE,))
