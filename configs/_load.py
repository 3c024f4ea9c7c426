"""The schemas of the YAML files, and how they are read."""

import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from polyfuse.configs._environment import ENCODER, did_you_mean
from polyfuse.spec import FORMER_NAMES, OPS, SpecError, canonical
from polyfuse.spec._validate import one_line

ROOT = Path(__file__).parent


def _as_list(value: Any) -> Any:
    """A name as a list of one."""
    if not isinstance(value, (str, list)):
        raise ValueError("expected a name or a list of names")
    return [value] if isinstance(value, str) else value


def _known_ops(value: Any) -> Any:
    """Ops by the names that they have now."""
    if not isinstance(value, dict):
        return value
    for name in value:
        if name not in OPS and name not in FORMER_NAMES:
            raise ValueError(f"expected one of {', '.join(OPS)}, got {name!r}")
    return {canonical(name): setting for name, setting in value.items()}


Order = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlatformConfig(_Strict):
    """Order of preference per array family on one platform, and the ops that differ from it."""

    torch: Order
    jax: Order
    numpy: Order
    ops: Annotated[dict[str, dict[str, Order]], BeforeValidator(_known_ops)] = {}


class EncoderConfig(_Strict):
    """How a vision encoder runs in graphs.

    `budgets` are output tokens, one graph each; None is a ladder of at most `max_graphs` from `smallest` to `largest`.
    A replay holds at most `max_items` items and `max_frames` attention segments (None: 64, and an item with more runs
    eagerly; an item with more than a given `max_frames` is refused). `memory_bytes` bounds the graphs' pool. Replays of
    a `policy` "greedy" are filled as other managers do, for comparison. `compile_blocks` None compiles where graphs are
    captured. `capture` "lazy" captures a budget when it is first chosen. `log_every` logs the stats after that many
    replays.
    """

    budgets: list[Annotated[int, Field(ge=1)]] | None = None
    smallest: int = Field(default=64, ge=1)
    largest: int = Field(default=4096, ge=1)
    max_graphs: int = Field(default=40, ge=1)
    max_items: int = Field(default=16, ge=1)
    max_frames: int | None = Field(default=None, ge=1)
    memory_bytes: int | None = Field(default=None, ge=1)
    policy: Literal["optimal", "greedy"] = "optimal"
    compile_blocks: bool | None = None
    capture: Literal["eager", "lazy"] = "eager"
    log_every: int = Field(default=0, ge=0)


class UserConfig(_Strict):
    """`polyfuse.yaml`: a backend, or a list in order of preference, for all ops and for single ones; `strict` allows
    the first of them only; the encoder's settings.
    """

    backend: Order | None = None
    strict: bool = False
    ops: Annotated[dict[str, Order], BeforeValidator(_known_ops)] = {}
    encoder: EncoderConfig = EncoderConfig()


class ModelCase(_Strict):
    """One real shape of an op in a model; the fields are those of `polyfuse.conformance.Case`."""

    name: str
    dims: dict[str, int | list[int]] = {}
    attrs: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    host: dict[str, list[list[int]] | list[int]] = {}
    present: list[str] = []
    fill: dict[str, str] = {}
    as_tensor: list[str] = []


class ModelConfig(_Strict):
    """A model's real shapes, per op, for conformance and (larger) for the bench. `source` says where they were read."""

    model: str
    source: str
    ops: Annotated[dict[str, list[ModelCase]], BeforeValidator(_known_ops)] = {}
    bench: Annotated[dict[str, list[ModelCase]], BeforeValidator(_known_ops)] = {}


class StrategyRange(_Strict):
    """Strategies from fastest to slowest for calls of up to `rows` rows; the last range has no limit."""

    rows: int | None = None
    ranking: list[str]


class ProjectionEntry(_Strict):
    """Measured strategies of `gdn_in_proj` for results of `n1` and `n2` columns, from two weights or four."""

    hidden: int
    n1: int
    n2: int
    dtype: str = "bfloat16"
    ranges: list[StrategyRange]


class LaunchRange(_Strict):
    """Launch parameters for calls of up to a size; the last range has no limit."""

    size: int | None = None
    parameters: dict[str, int]


class LaunchEntry(_Strict):
    """Measured launch parameters of an op's Triton kernel: of that source, Triton and architecture alone."""

    op: str
    source: str
    triton: str
    arch: str
    ranges: Annotated[list[LaunchRange], Field(min_length=1)]


class Tuning(_Strict):
    """What was measured on one device, and with what. `launch` is written by `polyfuse tune`."""

    device: str
    versions: dict[str, str]
    gdn_in_proj: list[ProjectionEntry] = []
    launch: list[LaunchEntry] = []


Cases = Literal["all", "sample", "core", "none"]


class Level(_Strict):
    """How much a conformance run does; `proves` says in a sentence what that shows.

    `checks` says on which of the level's cases a check runs, `others` what holds for the checks that it does not name:
    on all, on the core cases and one in `check_sample` of the others (`check_sample_slow` where kernels are
    emulated, or compiled for each new kind of call), on the core cases, or on none.
    `repeats` is how often a check calls a backend that looks for what one call in many shows; an emulated one it calls
    twice.

    A case runs if its results have no more elements than `max_elements`, or `max_elements_interpreted` where kernels
    are emulated; `max_elements_repeated` is for cases that only repeat smaller ones, on an accelerator. In a worker
    process it may take `time_limit` seconds on a backend, and add `memory_limit` GiB to what is resident.
    """

    proves: str
    seed: int = 0
    checks: dict[str, Cases] = {}
    check_sample: int = Field(default=1, ge=1)
    check_sample_slow: int = Field(default=1, ge=1)
    repeats: int = Field(default=1, ge=1)
    max_elements: int
    max_elements_interpreted: int
    max_elements_repeated: int = 0
    time_limit: float = Field(gt=0)
    memory_limit: float = Field(gt=0)

    def cases_of(self, check: str) -> Cases:
        """The cases on which a check runs."""
        return self.checks.get(check, self.checks.get("others", "all"))


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where PyYAML was built with it
_T = TypeVar("_T", bound=_Strict)


def _validate(schema: type[_T], data: Any, where: object, text: str = "") -> _T:
    """Data as a schema has it. Raises `SpecError` with the place: `text` is the file's, for the line in it."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [part for part in first["loc"] if not isinstance(part, int)]
        key = ".".join(map(str, first["loc"])) or "file"
        line = _line_of(text, loc)
        place = f"{where}: line {line}: {key}" if line else f"{where}: {key}"
        if first["type"] == "extra_forbidden":
            keys = list(_fields_at(schema, loc[:-1]))
            raise SpecError(f"{place}: unknown key{did_you_mean(str(loc[-1]), keys)}") from error
        expected = _expected(first)
        got = "" if ", got " in expected else f", got {one_line(repr(first['input']))}"
        raise SpecError(f"{place}: expected {expected}{got}") from error


# What a value should have been, by pydantic's name of the mistake.
_EXPECTED = {
    "list_type": "a list",
    "string_type": "a name",
    "too_short": "at least one entry",
    "dict_type": "a mapping",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def _expected(error: Any) -> str:
    """What a value should have been, in our words."""
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"]).removeprefix("expected ")
        case "literal_error":
            return f"one of {context['expected']}"
        case "greater_than_equal":
            return f"a number >= {context['ge']}"
        case "greater_than":
            return f"a number > {context['gt']}"
        case kind:
            return _EXPECTED.get(kind, "another kind of value")


def _fields_at(schema: type[BaseModel], loc: list[Any]) -> list[str]:
    """The keys of the part of a schema that `loc` leads to."""
    for key in loc:
        inner = schema.model_fields[key].annotation if key in schema.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        schema = inner
    return list(schema.model_fields)


def _line_of(text: str, loc: list[Any]) -> int | None:
    """The line of a YAML text on which a nested key stands, from 1; of the last key in `loc` that there is."""
    node, line = yaml.compose(text) if text else None, None
    for key in loc:
        if not isinstance(node, yaml.MappingNode):
            break
        found = [(k, v) for k, v in node.value if k.value == key]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line


def _read(path: Path, schema: type[_T]) -> _T:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, _LOADER)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SpecError(f"{path}:{where} is not valid YAML: {getattr(error, 'problem', error)}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping, got {type(data).__name__}")
    return _validate(schema, data, path, text)


def _names(folder: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / folder).glob("*.yaml"))


@lru_cache(maxsize=64)
def platform_order(kind: str, family: str, op: str) -> tuple[tuple[str, ...], str]:
    """The platform's order of preference and the file it comes from; an unknown kind has that of `default`."""
    name = kind if kind in _names("platforms") else "default"
    config = _read(ROOT / "platforms" / f"{name}.yaml", PlatformConfig)
    order = config.ops.get(op, {}).get(family) or getattr(config, family)
    return tuple(order), f"configs/platforms/{name}.yaml"


def user_config() -> tuple[UserConfig, str] | None:
    """The user's config file and its path: `$POLYFUSE_CONFIG`, else `./polyfuse.yaml`, else None."""
    named = os.environ.get("POLYFUSE_CONFIG")
    path = Path(named or "polyfuse.yaml")
    if not named and not path.is_file():
        return None
    return _read(path, UserConfig), str(path)


def encoder_config(**settings: Any) -> EncoderConfig:
    """The settings given, over `POLYFUSE_ENCODER_<SETTING>` (YAML values), over the config file's `encoder`.

    Raises `SpecError` for an unknown setting or a bad value, naming where it came from.
    """
    named = user_config()
    data = named[0].encoder.model_dump(exclude_unset=True) if named else {}
    for variable in sorted(v for v in os.environ if v.startswith(ENCODER)):
        key = variable.removeprefix(ENCODER).lower()
        try:
            value = yaml.safe_load(os.environ[variable])
        except yaml.YAMLError as error:
            raise SpecError(f"environment variable {variable}: not valid YAML, got {os.environ[variable]!r}") from error
        _validate(EncoderConfig, {key: value}, f"environment variable {variable}")
        data[key] = value
    return _validate(EncoderConfig, data | settings, "encoder")


def model_names() -> list[str]:
    """The names of the model files."""
    return _names("models")


@cache
def model_configs() -> Mapping[str, ModelConfig]:
    """Every model file, by its name."""
    return {name: _read(ROOT / "models" / f"{name}.yaml", ModelConfig) for name in model_names()}


@lru_cache(maxsize=16)
def projection_strategies(
    device: str,
) -> dict[tuple[int, int, int, str], tuple[tuple[int | None, tuple[str, ...]], ...]]:
    """(hidden, columns of qkvz, of ba, dtype) to the ranges of rows and their ranked strategies, as measured there."""
    name = device.lower().replace(" ", "_")
    if name not in _names("tuning"):
        return {}
    entries = _read(ROOT / "tuning" / f"{name}.yaml", Tuning).gdn_in_proj
    return {(e.hidden, e.n1, e.n2, e.dtype): tuple((r.rows, tuple(r.ranking)) for r in e.ranges) for e in entries}


def tuning_file(device: str, folder: Path | None = None) -> Path:
    """The file of what was measured on a device, in a folder: by default the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (folder or cache / "polyfuse" / "tuning") / f"{device.lower().replace(' ', '_')}.yaml"


def launch_entries(path: Path) -> list[LaunchEntry]:
    """What a file says of launches; nothing if there is none."""
    return _read(path, Tuning).launch if path.is_file() else []


def tuned_ranges(
    device: str, op: str, source: str, triton: str, arch: str
) -> tuple[tuple[int | None, dict[str, int]], ...] | None:
    """The measured launch parameters of a kernel by size, from the user's cache, else as they come with the package."""
    for path in (tuning_file(device), tuning_file(device, ROOT / "tuning")):
        for entry in launch_entries(path):
            if (entry.op, entry.source, entry.triton, entry.arch) == (op, source, triton, arch):
                return tuple((r.size, dict(r.parameters)) for r in entry.ranges)
    return None


@lru_cache(maxsize=8)
def level(name: str) -> Level:
    """A level of conformance by name. Raises `SpecError` for an unknown one."""
    if name not in _names("conformance"):
        raise SpecError(f"level: expected one of {', '.join(_names('conformance'))}, got {name!r}")
    return _read(ROOT / "conformance" / f"{name}.yaml", Level)
