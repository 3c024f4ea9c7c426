"""What an op is, as data.

Everything else is derived from an `OpSpec`: argument validation, output shapes and dtypes, conformance
cases and error bounds, rooflines, documentation and the stubs of a new backend.

A dimension is written as a string: a name (`"D"`), or an arithmetic expression over names of dimensions
and attributes (`"2*D"`, `"N*N"`), or a choice between two of these, `"D if up else 2*D"`, by the truth of an attribute
or by whether an optional array is given. `"..."` as the first dimension stands for any number of leading ones, the same
for all arguments that have it.
A dtype is the name NumPy and ml_dtypes give it (`"bfloat16"`), or a dtype variable (`"T"`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "int64")

FP32_ROUNDOFF = 2.0**-24  # unit roundoff of float32, the compute dtype of every op
FP32_TINY = 2.0**-126  # least normal float32; an accelerator may flush what is smaller


class Required:
    """What stands for the default of an attribute that has none, where a value would stand."""


REQUIRED: Any = Required()
AttrKind = Literal["int", "float", "bool", "enum", "dtype"]


@dataclass(frozen=True)
class Boundaries:
    """Says of an array that its numbers, which do not decrease, divide the rows of a call into groups.

    They are where each group ends, which is where the next one begins. With `starts` the first of them is where the
    first group begins (`cu_seqlens`); without it that is row 0 (`expert_ends`). `alignment` names the integer attribute
    to a multiple of which a group's begin is rounded up; without boundaries it has its default.
    """

    starts: bool = False
    alignment: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """One array argument.

    `dtypes` lists the accepted dtypes; arguments that share a `dtype_var` must have the same one.
    `host_unless` marks an argument that may also be a nested host sequence; as a tensor it is read back
    to the host and checked, except when the attribute named here is given: then it stays on the device.
    `split` names an integer attribute: the last dimension may also come as two, of which the first is that attribute.
    `shape` and the names bound to it are the same in both forms. Where it has leading dimensions `"..."`, an argument
    before it says how many.
    An `optional` argument is given by keyword, unless it is `by_position`: then it is given always, and may be None.
    `updated` marks an argument that the op writes in place: the formula says where, and what it then holds.
    Each of its elements has memory of its own. Where arrays cannot be written (JAX, and the oracle, which leaves its
    arguments alone), the updated arguments that are given come back behind the results.
    `boundaries` says of an array that it divides the rows into groups, and how.
    """

    name: str
    shape: tuple[str, ...]
    dtypes: tuple[str, ...]
    doc: str
    dtype_var: str = ""
    optional: bool = False
    host_unless: str = ""
    split: str = ""
    updated: bool = False
    by_position: bool = False
    boundaries: Boundaries | None = None

    @property
    def shapes(self) -> tuple[tuple[str, ...], ...]:
        """`shape`, then the one with its last dimension split where that may be."""
        if not self.split:
            return (self.shape,)
        *lead, last = self.shape
        return (self.shape, (*lead, self.split, f"{last}/{self.split}"))

    def is_split(self, shape: tuple[Any, ...], lead: int) -> bool:
        """Whether an argument of this shape has its last dimension split; `"..."` stands for `lead` dimensions."""
        declared = len(self.shape) + (lead - 1 if self.shape[:1] == ("...",) else 0)
        return bool(self.split) and len(shape) == declared + 1

    def merged(self, shape: tuple[Any, ...], lead: int) -> tuple[Any, ...]:
        """The shape of an argument in the form of `shape`: a split last dimension as one."""
        return (*shape[:-2], shape[-2] * shape[-1]) if self.is_split(shape, lead) else shape


@dataclass(frozen=True)
class AttrSpec:
    """One keyword argument that is not an array. `kind="enum"` takes one of `values`, `"dtype"` too.

    `minimum` is the least number accepted; `default` is `REQUIRED` where the caller must give one. None is a value too
    where it is the default, or with `nullable`.
    """

    name: str
    kind: AttrKind
    default: Any
    doc: str
    values: tuple[str, ...] = ()
    minimum: float | None = None
    nullable: bool = False

    @property
    def optional(self) -> bool:
        """Whether None is a value of it."""
        return self.nullable or self.default is None


@dataclass(frozen=True)
class OutputSpec:
    """One result. `dtype` is a dtype name, a dtype variable or a name that `OpSpec.derive` adds. A name in `shape` may
    stand for several dimensions if `OpSpec.derive` gives them as a tuple.

    `strides` names the tuple of element strides that `OpSpec.derive` adds; empty means contiguous. JAX arrays
    have no strides and ignore it. A `sliced` result may be part of the columns of one buffer with another such result.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    doc: str
    strides: str = ""
    sliced: bool = False


Count = float | Callable[[Mapping[str, Any]], float]  # a number, or a function of a call's attributes and dimensions


@dataclass(frozen=True)
class ErrorBound:
    """How far a value of the formula may be from the exact one before the result's one rounding.

    `value` names an output, or an intermediate value whose error the outputs after it inherit. The oracle gives the
    exact value and a magnitude (the same formula on absolute values, or what `reason` says); the allowed error is

        steps * 2**-24 * magnitude  +  flushes * 2**-126 * (what one flushed number can change, as `reason` says)

    A result is right when it lies between the two ends of that interval, each rounded to the output's dtype. `steps`
    counts float32 roundings on the longest path through the formula, or what a sum of many of them comes to; `flushes`
    counts subnormal numbers that a backend may take for zero. Both 0 means bit-exact.
    """

    value: str
    steps: Count
    reason: str
    flushes: Count = 0

    def error(self, names: Mapping[str, Any]) -> tuple[float, float]:
        """(relative to the magnitude, absolute): `steps * 2**-24` and `flushes * 2**-126` of a call.

        `names` are the call's attributes and dimensions.
        """
        steps, flushes = (n(names) if callable(n) else n for n in (self.steps, self.flushes))
        return steps * FP32_ROUNDOFF, flushes * FP32_TINY


@dataclass(frozen=True)
class Cost:
    """The least work of a call: bytes that must cross device memory once, and arithmetic."""

    bytes_read: int
    bytes_written: int
    flops: int


@dataclass(frozen=True)
class Output:
    """A result of one call: its shape (a size only the device knows is `None`), dtype name and element strides.

    `strides` is `None` for a contiguous result.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: str
    strides: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Call:
    """A validated call: every name bound, every default filled in.

    `dims` may hold `None` for a size that only the device knows. `updated` are the arguments that the call writes.
    """

    op: "OpSpec"
    dims: Mapping[str, Any]
    attrs: Mapping[str, Any]
    dtypes: Mapping[str, str]
    host: Mapping[str, Any]
    outputs: tuple["Output", ...] = ()
    updated: tuple["Output", ...] = ()

    @property
    def results(self) -> tuple["Output", ...]:
        """The outputs, and behind them the updated arguments: what a call returns where it cannot write."""
        return (*self.outputs, *self.updated)


@dataclass(frozen=True)
class Step:
    """One step of what an op fuses, in words, with the arrays that it is the first to read, and those that it gives."""

    does: str
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """The definition of one op.

    `check(call)` raises `SpecError` for what shapes and dtypes cannot express. `derive(call)` returns
    further dims and dtypes that the outputs are written in. `rows` is the first dimension of the arguments
    that grow with the batch; in an `independent` op the results of a row, or of a packed sequence, or of an image, are
    the same bits whatever lies beside it in the call. `groups` are the dimensions that count groups of rows, such as
    experts or sequences: an argument that begins with one has an element for each. `core` names the conformance cases
    without which a backend does not have the op. `steps` is what the op fuses, for its picture; a backend may compute
    it in another order. `example` is a call on torch tensors, for its page, and what it prints.
    """

    name: str
    version: int
    summary: str
    formula: str
    source: str
    rows: str
    tensors: tuple[TensorSpec, ...]
    attrs: tuple[AttrSpec, ...]
    outputs: tuple[OutputSpec, ...]
    errors: tuple[ErrorBound, ...]
    edge_cases: tuple[str, ...]
    core: tuple[str, ...]
    cost: Callable[[Call], Cost]
    check: Callable[[Call], None] = lambda call: None
    derive: Callable[[Call], Mapping[str, Any]] = lambda call: {}
    independent: bool = False
    groups: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    example: tuple[str, str] | None = None

    @property
    def boundaries(self) -> TensorSpec | None:
        """The array that divides the rows into groups, if the op has one."""
        return next((t for t in self.tensors if t.boundaries), None)

    @property
    def positional(self) -> tuple[str, ...]:
        """The parameters that a call may give by position: those without a default."""
        return tuple(t.name for t in self.tensors if not t.optional or t.by_position)

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter with its default, in the order of the public function; `REQUIRED` where it has none.

        The arrays that a call must give come first, by position; then, by keyword, the optional arrays and the
        attributes.
        """
        optional = [t.name for t in self.tensors if t.name not in self.positional]
        defaults = dict.fromkeys(self.positional, REQUIRED) | dict.fromkeys(optional)
        return defaults | {a.name: a.default for a in self.attrs}

    @property
    def updated(self) -> tuple[str, ...]:
        """The arguments that the op writes in place."""
        return tuple(t.name for t in self.tensors if t.updated)

    def bound(self, value: str) -> ErrorBound:
        """The error bound of an output, of an updated argument or of an intermediate value."""
        return next(e for e in self.errors if e.value == value)


@dataclass(frozen=True)
class Deferral:
    """Calls that a backend can run, but that another one of the platform's order runs faster, as `reason` says.

    They are those on `device` whose dimensions are multiples of `multiples`. The backend comes last for them, unless it
    is asked for by name.
    """

    device: str
    reason: str
    multiples: Mapping[str, int]

    def concerns(self, call: Call, device: str) -> bool:
        """Whether the call is one of these."""
        return device == self.device and not any(call.dims[name] % n for name, n in self.multiples.items())


@dataclass(frozen=True)
class Capability:
    """What a backend's implementation of one op can run. Whatever is not restricted here, it claims.

    `devices` are device kinds (`"cpu"`, `"cuda"`, `"rocm"`, `"xpu"`, `"tpu"`, ..., or `"*"`).
    `min_arch` is the least architecture per device kind, as (major, minor). `dtypes` restricts an
    argument's dtype, `attrs` an attribute's values, `multiples` a dimension's divisor, and `ranges` its least
    and greatest size. `defers` are calls that it claims, but not as the first choice.
    `differentiable` says that gradients flow through it (autograd or `jax.grad`) where the call updates no argument.
    `interpreted` are the devices on which it is emulated: right, but slow, so that conformance gives it small cases.
    `compiled` are the devices on which a kernel is compiled for each new kind of call, such as one with other strides:
    the first of them takes long, so that conformance makes fewer of them.
    `host_reads` are arrays whose values it reads on the host, such as boundaries that say what to launch: a call that
    gives one waits for the device, and is declined while a CUDA graph is captured.
    """

    devices: tuple[str, ...] = ("*",)
    min_arch: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    defers: tuple[Deferral, ...] = ()
    differentiable: bool = False
    interpreted: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    host_reads: tuple[str, ...] = ()

    def mistakes(self, spec: "OpSpec") -> list[str]:
        """What here does not speak of the op: names and values that its spec does not have."""
        tensors = {t.name: t.dtypes for t in spec.tensors}
        choices = {a.name: a.values for a in spec.attrs}
        dtypes = tensors | {a.name: a.values for a in spec.attrs if a.kind == "dtype"}
        words = {word for t in spec.tensors for size in t.shape for word in re.findall(r"[A-Za-z_]\w*", size)}
        dims = words - set(spec.parameters) - {"if", "else"}
        found = []
        devices: Any = self.devices
        fields: Any = (("attrs", self.attrs, choices), ("dtypes", self.dtypes, dtypes))
        for field_name, given, known in fields:
            for name, values in given.items():
                if name not in known:
                    found.append(f"{field_name}: expected one of {', '.join(known)}, got {name!r}")
                elif not isinstance(values, tuple):
                    found.append(f"{field_name}[{name!r}]: expected a tuple of values, got {values!r}")
                elif known[name]:
                    unknown = [value for value in values if value is not None and value not in known[name]]
                    if unknown:
                        expected = ", ".join(map(repr, known[name]))
                        found.append(f"{field_name}[{name!r}]: expected values of {expected}, got {unknown[0]!r}")
        sizes = [("multiples", self.multiples), ("ranges", self.ranges)]
        sizes += [("defers", deferral.multiples) for deferral in self.defers]
        for field_name, names in sizes:
            for name in names:
                if name not in dims:
                    found.append(f"{field_name}: expected one of {', '.join(sorted(dims))}, got {name!r}")
        if not isinstance(devices, tuple):
            found.append(f"devices: expected a tuple of device kinds, got {devices!r}")
        host_reads: Any = self.host_reads
        if not isinstance(host_reads, tuple):
            found.append(f"host_reads: expected a tuple of arrays, got {host_reads!r}")
        else:
            unknown = [name for name in host_reads if name not in tensors]
            found += [f"host_reads: expected arrays of {', '.join(tensors)}, got {name!r}" for name in unknown]
        return found

    def no_backward(self, call: Call) -> str | None:
        """Why no gradient flows through this call, or None if one does."""
        if call.updated:
            return f"{', '.join(output.name for output in call.updated)} is updated in place: no backward"
        return None if self.differentiable else "no backward"

    def refusal(
        self, call: Call, device: str, arch: tuple[int, int] | None = None, needs_grad: bool = False
    ) -> str | None:
        """Why this call cannot run here, or None if it can."""
        no_backward = self.no_backward(call) if needs_grad else None
        if no_backward:
            return f"an input requires grad: {no_backward}; call under torch.no_grad() or detach"
        if "*" not in self.devices and device not in self.devices:
            return f"device={device}: runs on {', '.join(self.devices)}"
        least = self.min_arch.get(device)
        if least is not None and (arch is None or arch < least):
            return f"arch={arch}: needs {device} {least[0]}.{least[1]} or later"
        for name, allowed in self.dtypes.items():
            given = call.attrs.get(name) or call.dtypes.get(name)  # a dtype that is asked for may be stored as another
            if given is not None and given not in allowed:
                return f"{name}.dtype={given}: supports {', '.join(allowed)}"
        for name, values in self.attrs.items():
            if call.attrs[name] not in values:
                return f"{name}={call.attrs[name]!r}: supports {', '.join(map(repr, values))}"
        for name, divisor in self.multiples.items():
            if call.dims[name] % divisor:
                return f"{name}={call.dims[name]}: must be a multiple of {divisor}"
        for name, (least_size, greatest) in self.ranges.items():
            if not least_size <= call.dims[name] <= greatest:
                return f"{name}={call.dims[name]}: must be {least_size} to {greatest}"
        return None

    def read_on_host(self, call: Call) -> tuple[str, ...]:
        """The arrays of this call whose values are read on the host."""
        return tuple(name for name in self.host_reads if name in call.dtypes)

    def deferral(self, call: Call, device: str) -> str | None:
        """Why this call is not for this backend where another one can run it, or None if it is."""
        return next((deferral.reason for deferral in self.defers if deferral.concerns(call, device)), None)
