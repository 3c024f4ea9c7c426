"""What both torch backends need to run projections of one activation, but for the products themselves.

Weights can be stacked and seen as one matrix, and a measured table says which strategy is the fastest.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch

from polyfuse._torch.streams import streams_enabled
from polyfuse.configs import projection_strategies
from polyfuse.spec import Unsupported

Pair = tuple[torch.Tensor, torch.Tensor]

FEW_ROWS = 64  # up to which `fused` took less time than two products for every size measured on an H200, in bfloat16
SMALL = 2**20  # bytes. With two weights of 128 KiB joined, four of an H200's products took 23.8 us in place of 27.4.


class Projection(NamedTuple):
    """What one of the two results is made of: x @ [weight | following].T + bias."""

    weight: torch.Tensor
    following: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights that there are."""
        return [self.weight] if self.following is None else [self.weight, self.following]

    @property
    def is_small(self) -> bool:
        """Whether a copy of its weights as one, made in a call, costs less than a second product of the activation."""
        return self.width * self.weight.shape[1] * self.weight.element_size() <= SMALL

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.weight.shape[0] + (0 if self.following is None else self.following.shape[0])


def stack_weights(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy weights [n_i, hidden] behind one another into one buffer; returns a view of it for each.

    `gdn_in_proj` runs these views as one matrix, where they come in the order [w_qkvz | w_z | w_ba | w_a]. They are
    what it reads: make them the weights in use, for instance with `linear.weight.data = view`, and drop the others.
    Whatever is written to them afterwards (by an optimizer, `copy_`, or through `.data`) is in the next call's result;
    what is written to the weights given here is not.

    Raises `ValueError` for weights of different widths, dtypes or devices.
    """
    if len({(w.shape[1:], w.dtype, w.device) for w in weights}) != 1:
        raise ValueError(f"expected weights of one width, dtype and device, got {[tuple(w.shape) for w in weights]}")
    return torch.cat([w.detach() for w in weights]).split([len(w) for w in weights])


def as_one_weight(*weights: torch.Tensor) -> torch.Tensor | None:
    """Weights [n_i, hidden] as one view of all rows, if each lies right behind the one before it in one storage.

    Those without elements lie anywhere. Gradients do not flow through the view.
    """
    first = next((w for w in weights if w.numel()), weights[0])
    step, end = first.stride(0), first.storage_offset()
    for weight in weights:
        if weight.numel():
            if weight.stride() != (step, 1) or weight.storage_offset() != end:
                return None
            if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                return None
            end += len(weight) * step
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), (step, 1))


def one_weight(large: Projection, small: Projection) -> torch.Tensor:
    """The weights of both as the one matrix that they are. Raises `Unsupported` if they are not."""
    weights = [*large.weights, *small.weights]
    view = as_one_weight(*weights)
    if view is None:
        raise Unsupported(
            f"gdn_in_proj: strategy merged: expected {len(weights)} weights that lie right behind one another in one "
            "storage, got others; try as weights the views that polyfuse.runtime.stack_weights makes, or strategy auto"
        )
    return view


def without_gaps(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous bias: with another one torch's float16 products on a CPU round before they add it."""
    return None if bias is None else bias.contiguous()


class _SumsInFloat32:
    """While a thread has entered this, a product that is split along `hidden` adds up its parts in float32.

    Unless told, PyTorch lets cuBLAS round them to bfloat16 or float16 first. That setting is the whole process': the
    last thread to leave puts it back, and until then other threads' products add up in float32 as well.
    """

    def __init__(self, setting: str) -> None:
        self._setting, self._lock = setting, Lock()
        self._inside = 0
        self._rounds = False  # whether the setting was on when the first of those inside entered

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._rounds = getattr(torch.backends.cuda.matmul, self._setting)
                if self._rounds:
                    setattr(torch.backends.cuda.matmul, self._setting, False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._rounds and not self._inside:
                setattr(torch.backends.cuda.matmul, self._setting, True)


_SUMS = {
    torch.bfloat16: _SumsInFloat32("allow_bf16_reduced_precision_reduction"),
    torch.float16: _SumsInFloat32("allow_fp16_reduced_precision_reduction"),
}
_AS_THEY_ARE = nullcontext()


def rounded_once(x: torch.Tensor) -> AbstractContextManager[None]:
    """What PyTorch's products of `x` run in, so that each is rounded once to its dtype."""
    return _SUMS.get(x.dtype, _AS_THEY_ARE) if x.device.type == "cuda" else _AS_THEY_ARE


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, rounded once: of a strided x of more dimensions `linear` rounds before it adds."""
    rows = x.flatten(0, -2)
    made = torch.nn.functional.linear(rows, weight) if bias is None else _with_bias(rows, weight, bias)
    return made.view(*x.shape[:-1], weight.shape[0])


def product_into(columns: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write rows @ weight.T + bias, rounded once, to some columns of a result."""
    if bias is None:
        torch.mm(rows, weight.t(), out=columns)
    else:
        columns.copy_(_with_bias(rows, weight, bias))


def _with_bias(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """rows @ weight.T + bias, rounded once: on a GPU `linear` and `addmm` round to 16 bits before they add a bias."""
    if rows.device.type == "cpu" or rows.dtype == torch.float32:
        return torch.nn.functional.linear(rows, weight, bias)
    if torch.version.hip is not None or is_recorded(rows, weight, bias):
        wide = torch.nn.functional.linear(rows.float(), weight.float(), bias.float())
    else:
        wide = torch.mm(rows, weight.t(), out_dtype=torch.float32).add_(bias)
    return wide.to(rows.dtype)


def one_bias(large: Projection, small: Projection) -> torch.Tensor | None:
    """The biases of both as one, with zeros for one that is missing; None if both are."""
    if large.bias is None and small.bias is None:
        return None
    return torch.cat([p.weight.new_zeros(p.width) if p.bias is None else p.bias for p in (large, small)])


def is_recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd or torch.compile records what is done with the tensors, so that none is written in place."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(
    x: torch.Tensor,
    w_qkvz: torch.Tensor,
    w_ba: torch.Tensor,
    available: tuple[str, ...],
    *,
    w_z: torch.Tensor | None = None,
    w_a: torch.Tensor | None = None,
) -> str:
    """The fastest of the available strategies by the device's measured table.

    The table knows the widths of the two results, and not of how many weights each is. `merged` counts as available
    only for weights that are one, `parallel` only with streams and inside a graph capture: launched one by one, its
    events take the host longer than the device saves. For sizes that the table lacks it is `sequential`; on a CUDA or
    ROCm device it is `fused` for up to `FEW_ROWS` rows of 16-bit numbers.
    """
    n1, n2 = Projection(w_qkvz, w_z).width, Projection(w_ba, w_a).width
    hidden = x.shape[-1]
    weights = [w for w in (w_qkvz, w_z, w_ba, w_a) if w is not None]
    for strategy in _ranking(x.device, hidden, n1, n2, x.dtype, x.numel() // max(hidden, 1)):
        if strategy not in available:
            continue
        if strategy == "merged" and as_one_weight(*weights) is None:
            continue
        if strategy == "parallel" and not (streams_enabled() and _capturing(x.device)):
            continue
        return strategy
    return "sequential"


def _ranking(device: torch.device, hidden: int, n1: int, n2: int, dtype: torch.dtype, rows: int) -> tuple[str, ...]:
    """The strategies by the device's table, the fastest first; for sizes that it lacks, what is likely to be."""
    table = _table(device)
    ranges = table.get((hidden, n1, n2, str(dtype).removeprefix("torch."))) if table else None
    if ranges is None:
        return ("fused",) if device.type == "cuda" and rows <= FEW_ROWS and dtype.itemsize == 2 else ()
    return next((ranking for limit, ranking in ranges if limit is None or rows <= limit), ())


@lru_cache(maxsize=16)
def _table(device: torch.device) -> dict[tuple[int, int, int, str], tuple[tuple[int | None, tuple[str, ...]], ...]]:
    return projection_strategies(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
