"""Right but unusual backends: other orders, other precisions, other ways of allocating. None of them may be failed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from polyfuse.conformance.defects._planted import by_name

Function = Callable[..., Any]
UNUSUAL: dict[str, tuple[str, Callable[[Function], Function]]] = {}


def unusual(op: str) -> Callable[[Callable[[Function], Function]], Callable[[Function], Function]]:
    """Register a backend of an op under the name of the function that makes it of the one in PyTorch."""

    def add(make: Callable[[Function], Function]) -> Callable[[Function], Function]:
        UNUSUAL[make.__name__] = op, make
        return make

    return add


@unusual("gated_rms_norm")
def summed_one_by_one(right: Function) -> Function:
    """Squares are added from the last column to the first, each row in the same order."""

    def function(x: Any, gate: Any, weight: Any, **attrs: Any) -> Any:
        squares = x.float().square()
        total = torch.zeros(*x.shape[:-1], 1, dtype=torch.float32)
        for i in reversed(range(x.shape[-1])):
            total = total + squares[..., i : i + 1]
        return gated(x, gate, weight, total, **attrs)

    return function


def gated(x: Any, gate: Any, weight: Any, total: Any, **attrs: Any) -> Any:
    """Rows over their root mean square, of which that is the sum, and gated: no element's place decides of its bits."""
    mean = total / max(x.shape[-1], 1)
    n = x.float() * (mean + max(attrs["eps"], 2.0**-126)).rsqrt()
    wide = gate.float()
    act = logsigmoid(wide).exp()
    act = wide * act if attrs["activation"] == "silu" else act
    return (n * (weight.float() + attrs["weight_offset"]) * act).to(x.dtype).contiguous()


@unusual("gated_rms_norm")
def in_float64(right: Function) -> Function:
    def function(x: Any, gate: Any, weight: Any, **attrs: Any) -> Any:
        wide = x.double().contiguous()
        squares = wide.square().sum(-1, keepdim=True)
        mean = squares / max(x.shape[-1], 1)
        n = wide / torch.sqrt(mean + max(attrs["eps"], 2.0**-126))
        sign = 1 / (1 + torch.exp(-gate.double()))
        act = gate.double() * sign if attrs["activation"] == "silu" else sign
        return (n * (weight.double() + attrs["weight_offset"]) * act).float().to(x.dtype).contiguous()

    return function


@unusual("silu_mul_block_quant")
def rows_in_chunks(right: Function) -> Function:
    """Seven rows at a time, the last ones first, into results that are allocated before.

    Rows whose scales lie in blocks of 128 rows, or that belong to experts, are computed together.
    """

    def function(x: Any, **keywords: Any) -> Any:
        together = "swizzled" in keywords["scale_layout"] or keywords["expert_ends"] is not None
        if x.dim() != 2 or keywords["num_rows"] is not None or len(x) == 0 or together:
            return right(x, **keywords)
        q, scale = (torch.empty_strided(y.shape, y.stride(), dtype=y.dtype) for y in right(x, **keywords))
        for start in reversed(range(0, len(x), 7)):
            rows = slice(start, start + 7)
            given = {name: keywords[name] for name in ("up", "row_weight") if keywords[name] is not None}
            own = {name: array[rows] for name, array in given.items()}
            q[rows], scale[rows] = right(x[rows], **{**keywords, **own})
        return q, scale

    return function


@unusual("gdn_in_proj")
def products_out_of_place(right: Function) -> Function:
    """Products with `out=`, in float32, of weights whose rows are taken in reverse."""

    def function(x: Any, *args: Any, **keywords: Any) -> Any:
        given = by_name("gdn_in_proj", (x, *args), keywords)
        results = []
        for names, bias in ((("w_qkvz", "w_z"), "bias_qkvz"), (("w_ba", "w_a"), "bias_ba")):
            weight = torch.cat([given[n] for n in names if given[n] is not None]).float().flip(0)
            wide = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32)
            torch.matmul(x.float(), weight.t(), out=wide)
            wide = wide.flip(-1)
            results.append((wide if given[bias] is None else wide + given[bias].float()).to(x.dtype).contiguous())
        return tuple(results)

    return function


@unusual("gdn_in_proj")
def results_as_slices(right: Function) -> Function:
    """The two results are columns of one buffer, which the spec allows."""

    def function(*args: Any, **keywords: Any) -> Any:
        qkvz, ba = right(*args, **keywords)
        return torch.cat([qkvz, ba], -1).split([qkvz.shape[-1], ba.shape[-1]], -1)

    return function


@unusual("gated_rms_norm")
def subnormal_numbers_flushed(right: Function) -> Function:
    """Zeros stay as they are: where all of a row is 0, the slope there is that of the norm."""

    def flushed(x: Any) -> Any:
        return torch.where((x != 0) & (x.float().abs() < 2.0**-126), torch.zeros_like(x), x)

    def function(x: Any, gate: Any, weight: Any, **attrs: Any) -> Any:
        return flushed(right(flushed(x), flushed(gate), flushed(weight), **attrs))

    return function


@unusual("gdn_post_conv")
def by_threads(right: Function) -> Function:
    """Halves of the rows in two threads of a pool that lives as long as the call."""

    def function(conv_out: Any, a: Any, b: Any, *args: Any, **keywords: Any) -> Any:
        middle = len(conv_out) // 2
        halves = slice(None, middle), slice(middle, None)
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda rows: right(conv_out[rows], a[rows], b[rows], *args, **keywords), halves))
        return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))

    return function


@unusual("gdn_post_conv")
def compiled(right: Function) -> Function:
    """Traced by torch.compile and run by its eager backend."""
    return torch.compile(right, backend="eager", dynamic=True)


@unusual("pos_embed_interpolate")
def results_in_larger_memory(right: Function) -> Function:
    """A contiguous result in the middle of a buffer of its own."""

    def function(*args: Any, **keywords: Any) -> Any:
        out = right(*args, **keywords)
        memory = out.new_empty(out.numel() + 32)
        part = memory[16 : 16 + out.numel()].view(out.shape)
        return part.copy_(out)

    return function


@unusual("gdn_decode")
def one_sequence_after_another(right: Function) -> Function:
    """A loop over the sequences in reverse, each with the slots that it owns."""

    def function(x: Any, z: Any, a: Any, b: Any, *args: Any, **keywords: Any) -> Any:
        out = torch.empty(*x.shape[:-1], len(args[1]) * keywords["head_v_dim"], dtype=x.dtype)
        indices = keywords["state_indices"]
        for i in reversed(range(len(x))):
            row = slice(i, i + 1)
            own = torch.arange(i, i + 1) if indices is None else indices[row]
            accepted = keywords["num_accepted"]
            more = {"state_indices": own, "num_accepted": None if accepted is None else accepted[row]}
            gate = None if z is None else z[row]
            out[row] = right(x[row], gate, a[row], b[row], *args, **{**keywords, **more})
        return out

    return function


@unusual("segment_attention")
def whole_scores_in_float64(right: Function) -> Function:
    """Every segment by itself, softmax and products in float64."""

    def function(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: Any, max_seqlen: Any) -> Any:
        out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
        ends = cu_seqlens.tolist()
        for start, end in pairwise(ends):
            a, b, c = (x[start:end].double().transpose(0, 1) for x in (q, k, v))
            out[start:end] = ((a @ b.mT * factor).softmax(-1) @ c).transpose(0, 1).to(v.dtype)
        return out

    return function
