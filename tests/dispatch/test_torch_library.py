"""`torch.ops.polyfuse.*`: schema, fake kernel, opcheck, and full-graph compilation."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import polyfuse
from polyfuse.conformance import Trial, cases, make_inputs, place
from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS
from polyfuse.spec import OPS
from polyfuse.torch_ops import schemas

GRID = ((1, 4, 6), (2, 2, 2))


def arguments(op, case):
    return place(make_inputs(OPS[op], case), "torch", "cpu")


def test_no_string_enters_the_schema():
    assert set(schemas()) == set(OPS)
    for text in schemas().values():
        assert "str " not in text
    assert str(torch.ops.polyfuse.pos_embed_interpolate.default._schema) == (
        "polyfuse::pos_embed_interpolate(Tensor table, Tensor? grid_thw, SymInt[]? grid_thw_values, Tensor? base, "
        "SymInt merge_size, int mode, bool align_corners, int out_dtype, SymInt? out_rows, SymInt? table_height) "
        "-> Tensor"
    )


LONG = {"gated_delta_rule": pytest.mark.slow}  # half a minute


def can_be_checked(op, case):
    """opcheck takes NaN, and elements that are not written, for a difference, and its copies of arrays lie apart."""
    return (
        case.repeat == 1
        and not case.stacked
        and all(np.isfinite(e.low).all() for e in Trial(op, case, 0).exact().values())
    )


@pytest.mark.parametrize("op", [pytest.param(op, marks=LONG.get(op, ())) for op in OPS])
def test_opcheck(op):
    for case in islice((c for c in cases(op)[::9] if can_be_checked(op, c)), 4):
        values = arguments(op, case)
        args = _torch_library.flatten(CALLS[op], tuple(values[n] for n in CALLS[op].names))
        torch.library.opcheck(getattr(torch.ops.polyfuse, op).default, args)


@pytest.mark.parametrize("form", ["host", "tensor", "out_rows"])
def test_compiles_into_one_full_graph(form):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    grid = GRID if form == "host" else torch.tensor(GRID)
    rows = 40 if form == "out_rows" else None

    def model(table, x):
        return polyfuse.pos_embed_interpolate(table * 2, grid, base=x, out_rows=rows, mode="bicubic") + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for width in (8, 16):
        table, x = torch.randn(36, width), torch.randn(rows or 32, width)
        assert torch.equal(compiled(table, x), model(table, x))
    assert counter.frame_count == 1
    names = [n.target for n in counter.graphs[0].graph.nodes if n.op == "call_function"]
    assert (
        torch.ops.polyfuse.pos_embed_interpolate in names or torch.ops.polyfuse.pos_embed_interpolate.default in names
    )


def test_a_table_with_a_height_compiles_into_one_full_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda table: polyfuse.pos_embed_interpolate(table, GRID, table_height=3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for columns in (5, 12):  # 3 x 12 is no square of 6 x 6
        table = torch.randn(3 * columns, 8)
        want = polyfuse.pos_embed_interpolate(table, GRID, table_height=3)
        assert torch.equal(compiled(table), want)
    assert not torch.equal(polyfuse.pos_embed_interpolate(table, GRID), want)


@pytest.mark.parametrize("op", OPS)
def test_every_op_compiles_into_one_full_graph(op):
    torch._dynamo.reset()
    case = next(c for c in cases(op) if c.repeat == 1 and not c.fill and not c.layout)
    values = arguments(op, case)
    arrays = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
    options = {k: v for k, v in values.items() if k not in arrays}
    compiled = torch.compile(
        lambda arrays: getattr(polyfuse, op)(**arrays, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    other = arguments(op, case)
    wanted, results = getattr(polyfuse, op)(**other), compiled(arrays)
    updated = [(arrays[name], other[name]) for name in OPS[op].updated if name in arrays]
    pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, wanted)), strict=True)
    for result, want in (*pairs, *updated):
        assert (result.shape, result.dtype, result.stride()) == (want.shape, want.dtype, want.stride())
        assert result.flatten().view(torch.uint8).equal(want.flatten().view(torch.uint8))


@pytest.mark.parametrize("lead", ["rows", "experts"])
def test_gate_and_up_as_two_tensors_compile_into_one_full_graph(lead):
    """Column slices of wider buffers; the number of rows may change."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    num_rows = torch.tensor([3, 5], dtype=torch.int32) if lead == "experts" else None
    options = {"num_rows": num_rows, "group_size": 32, "scale_layout": "col_major_tma"}

    def model(wide, other):
        gate, up = wide[..., :64], other[..., 8:72]
        return polyfuse.silu_mul_block_quant(gate, up=up, **options)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (6, 9):
        shape = (2, rows) if lead == "experts" else (rows,)
        wide, other = torch.randn(*shape, 128), torch.randn(*shape, 80)
        q, scale = compiled(wide, other)
        joined = torch.cat([wide[..., :64], other[..., 8:72]], -1)
        want_q, want_scale = polyfuse.silu_mul_block_quant(joined, **options)
        assert scale.stride() == want_scale.stride()
        assert torch.equal(scale, want_scale)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]  # Dynamo begins the first frame anew, as the call has floats
    names = [n.target for n in counter.graphs[-1].graph.nodes if n.op == "call_function"]
    assert names.count(torch.ops.polyfuse.silu_mul_block_quant) == 1
    assert torch.cat not in names


def test_an_up_of_another_shape_is_refused_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, up: polyfuse.silu_mul_block_quant(x, up=up), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="up: expected D=256 in"):
        compiled(torch.randn(2, 256), torch.randn(2, 128))


def test_a_bad_call_is_refused_while_compiling():
    compiled = torch.compile(lambda t: polyfuse.pos_embed_interpolate(t, ((1, 3, 4),)), fullgraph=True)
    with pytest.raises(Exception, match="divisible by merge_size=2, got"):
        compiled(torch.randn(36, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "torch"}, "a compiled graph holds no names; try polyfuse.use_backend around it"),
        ({"mode": "cubic"}, "mode: expected one of bilinear, bicubic, got"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(options, message):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: polyfuse.pos_embed_interpolate(t, GRID, **options), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compiled(torch.randn(36, 8))
    assert message in str(caught.value.__cause__)


def test_a_compiled_graph_follows_use_backend():
    compiled = torch.compile(lambda t: polyfuse.pos_embed_interpolate(t, GRID), backend="eager", fullgraph=True)
    table = torch.randn(36, 8)
    with polyfuse.use_backend("triton"):
        out = compiled(table)
        assert torch.equal(out, polyfuse.pos_embed_interpolate(table, GRID, backend="triton"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradient_through_a_graph_raises_and_is_not_lost(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: polyfuse.pos_embed_interpolate(t, GRID).sum(), backend=backend, fullgraph=True)
    table = torch.randn(36, 8, requires_grad=True)
    with pytest.raises(Exception, match=r"it has no backward; try torch\.no_grad\(\)"):
        compiled(table).backward()
    with torch.no_grad():
        assert torch.isfinite(compiled(table))


@pytest.mark.parametrize("gradients", [False, True])
def test_make_fx_records_one_node_unless_gradients_are_wanted(gradients):
    """A node has no backward, the backend's own operations do."""
    table = torch.randn(36, 8)
    with torch.set_grad_enabled(gradients):
        graph = make_fx(lambda t: polyfuse.pos_embed_interpolate(t, GRID))(table)
        assert torch.equal(graph(table), polyfuse.pos_embed_interpolate(table, GRID))
        named = make_fx(lambda t: polyfuse.pos_embed_interpolate(t, GRID, backend="torch"))(table)
    node = torch.ops.polyfuse.pos_embed_interpolate.default
    assert (node in [n.target for n in graph.graph.nodes]) is not gradients
    assert node not in [n.target for n in named.graph.nodes]
