"""docs/compatibility.md: what the tests and the committed results cover, as tables.

`python -m polyfuse.bench.compatibility` writes the page from a checkout: its pyproject.toml, the matrix of its CI, the
classes that `accelerate` knows, the models and platforms in configs, and benchmarks/results.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from polyfuse.bench.measured import Result, read
from polyfuse.bench.page import table
from polyfuse.configs import model_configs
from polyfuse.integrations.transformers._gated_delta_net_checks import LAYERS
from polyfuse.integrations.transformers._graphs import ENCODERS

TEMPLATE = "compatibility.md.j2"
PACKAGES = ("torch", "triton", "jax", "transformers")


def render(root: Path) -> str:
    """The page that a checkout gives."""
    results = {path.stem: read(path) for path in sorted((root / "benchmarks/results").glob("*.json"))}
    tables = {
        "versions": versions(root, list(results.values())),
        "devices": devices(results),
        "platforms": platforms(root, results),
        "parts": parts(),
        "shapes": shapes(),
        "measured": measured(results),
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string((root / "benchmarks" / TEMPLATE).read_text(encoding="utf-8")).render(tables)


def versions(root: Path, results: Sequence[Result]) -> str:
    """Of Python and each framework: what pyproject.toml allows, what CI tests, and what results were made with."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    constraints = (root / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)(?:==)?([\d.<>=,]\S*)$", constraints, flags=re.MULTILINE))
    jobs = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())["jobs"]
    pythons = jobs["versions"]["strategy"]["matrix"]["python"]
    other = re.findall(r"make test-transformers VERSION=(\S+)", (root / ".ci/run").read_text())
    rows = [("Python", project["requires-python"], ", ".join(pythons), _found(results, "python"))]
    required = [text for texts in project["optional-dependencies"].values() for text in texts]
    for name in PACKAGES:
        (bounds,) = {match[1] for text in required if (match := re.fullmatch(rf"{name}([<>=].+)", text))}
        (oldest,) = re.findall(r">=([\d.]+)", bounds)
        run = {f"{oldest}.*": None, pinned.get(name, ""): None, "the newest allowed": None}
        extra = other if name == "transformers" else []
        rows.append((name, bounds, ", ".join(filter(None, [*run, *extra])), _found(results, name)))
    return table(("package", "allowed", "tested in CI", "in committed results"), rows, texts=4)


def _found(results: Sequence[Result], package: str) -> str:
    return ", ".join(sorted({data["versions"][package] for data in results if package in data["versions"]}))


def devices(results: Mapping[str, Result]) -> str:
    """Of each device the ops with a committed conformance run, and the other files."""
    rows = []
    for device in sorted({_chip(data) for data in results.values()}):
        names = [name for name, data in results.items() if _chip(data) == device]
        ran: dict[str, set[str]] = {}
        for data in (results[name] for name in names if name.startswith("conformance_")):
            for row in data["results"]:
                if row["status"] == "passed":
                    ran.setdefault(row["backend"], set()).add(row["op"])
        conforming = ", ".join(f"{name} {len(ops)}" for name, ops in sorted(ran.items())) or "-"
        others = [_file(name) for name in names if not name.startswith("conformance_")]
        rows.append((device, conforming, ", ".join(others)))
    return table(("device", "ops with a conformance run, by backend", "measurements"), rows, texts=3)


def _chip(data: Result) -> str:
    return re.sub(r"cuda:\d+", "cuda", data["device"])


def _file(name: str) -> str:
    return f"[{name}](../benchmarks/results/{name}.json)"


def platforms(root: Path, results: Mapping[str, Result]) -> str:
    """Of each kind of device the order of its backends for tensors and JAX arrays, and what is known of it."""
    seen = {_chip(data).partition(" ")[0] for data in results.values()}
    rows = []
    for path in sorted((root / "configs/platforms").glob("*.yaml")):
        orders = yaml.safe_load(path.read_text())
        known = "results above" if path.stem in seen else "no committed run"
        known = "the tests of CI, and results above" if path.stem == "cpu" else known
        name = "any other" if path.stem == "default" else path.stem
        rows.append((name, ", ".join(orders["torch"]), ", ".join(orders["jax"]), known))
    return table(("kind of device", "PyTorch", "JAX", "what was run on it"), rows, texts=4)


def parts() -> str:
    """The classes of Transformers in which `accelerate` finds each kind of part."""
    rows = [("vision", ", ".join(f"`{name}`" for name in ENCODERS))]
    rows.append(("gated_delta_net", ", ".join(f"`{name}`" for name in LAYERS)))
    rows.append(("fp8_mlp", "any MLP that computes SiLU, product and block-scaled FP8 linear layers"))
    rows.append(("fp8_experts", "Transformers' FP8Experts with SiLU where they are one launch, else only if named"))
    rows.append(("torchao_mlp", "such an MLP with MXFP8 or MXFP4 weights of torchao; NVFP4 only where it is named"))
    return table(("kind", "classes"), rows, texts=2)


def shapes() -> str:
    """The models whose shapes are cases of conformance, and the ops that they have."""
    rows = []
    for name, config in model_configs().items():
        ops = ", ".join(f"[`{op}`](ops/{op}.md)" for op in config.ops)
        rows.append((f"[{name}](../configs/models/{name}.yaml)", config.source, ops))
    return table(("model", "sizes from", "ops"), rows, texts=3)


def measured(results: Mapping[str, Result]) -> str:
    """The whole models and towers that were measured, by architecture."""
    rows: list[tuple[Any, ...]] = []
    for name, data in results.items():
        if "model" in data:
            made = data["made"]
            rows.append((data["model"], data.get("dtype", "-"), _chip(data), made["date"], made["commit"], _file(name)))
    return table(("architecture", "dtype", "device", "date", "commit", "file"), rows, texts=6)


def main() -> None:
    """Write docs/compatibility.md of the checkout that this is run in."""
    Path("docs/compatibility.md").write_text(render(Path()), encoding="utf-8")


if __name__ == "__main__":
    main()
