"""`polyfuse new-backend`: what it writes, what it refuses, and the way from there to a conformant op."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml
from click.testing import CliRunner

import polyfuse
from polyfuse.cli import main
from polyfuse.cli.new_backend import render
from polyfuse.conformance import cases, make_inputs
from polyfuse.spec import OPS, bind, docstring

ROOT = Path(__file__).parents[2]
TREE = ("configs", "conformance", "reference", "spec", "src", "templates", "torch_impl", "triton_impl")
FILES = {
    ".github/workflows/ci.yml",
    "README.md",
    "pyproject.toml",
    "src/polyfuse_mychip/__init__.py",
    "tests/test_conformance.py",
    *(f"src/polyfuse_mychip/{op}.py" for op in OPS),
}


@pytest.fixture(params=["torch", "jax", "numpy"])
def family(request):
    return request.param


def executed(text):
    names = {}
    exec(text, names)
    return names


def test_every_rendered_file_parses(family):
    files = render("mychip", family)
    assert set(files) == FILES
    for path, text in files.items():
        assert not re.search(r"\{\{|\{%|NAME", text), path
        if path.endswith(".py"):
            compile(text, path, "exec")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["entry-points"]["polyfuse.backends"] == {"mychip": "polyfuse_mychip:BACKEND"}
    extra = {"torch": "[torch]", "jax": "[jax]", "numpy": ""}[family]
    assert project["dependencies"] == [f"polyfuse{extra}>={polyfuse.__version__}"]
    assert list(yaml.safe_load(files[".github/workflows/ci.yml"])["jobs"]) == ["conformance"]


def test_an_op_is_implemented_once_its_line_is_uncommented(family):
    text = render("mychip", family)["src/polyfuse_mychip/__init__.py"]
    backend = executed(text)["BACKEND"]
    assert (backend.name, backend.family, backend.module) == ("mychip", family, "polyfuse_mychip")
    assert backend.implements == {}
    assert backend.missing("gdn_in_proj") == ("not_implemented", "does not implement gdn_in_proj")
    uncommented = re.sub(r'# (".*": \d+,)', r"\1", text)
    assert executed(uncommented)["BACKEND"].implements == {op: spec.version for op, spec in OPS.items()}


@pytest.mark.parametrize("op", OPS)
def test_a_stub_has_the_public_signature_and_the_whole_definition(op, family):
    stub = executed(render("mychip", family)[f"src/polyfuse_mychip/{op}.py"])[op]
    parameters = dict(inspect.signature(getattr(polyfuse, op)).parameters)
    del parameters["backend"]
    assert [(p.name, p.kind, p.default) for p in inspect.signature(stub).parameters.values()] == [
        (p.name, p.kind, p.default) for p in parameters.values()
    ]
    text = [line for line in docstring(OPS[op]).splitlines() if not line.startswith("    backend:")]
    assert stub.__doc__.split() == " ".join(text).split()
    with pytest.raises(NotImplementedError, match=f"mychip: {op} is not written yet"):
        stub(**dict.fromkeys(parameters))


@pytest.mark.parametrize("op", OPS)
def test_a_stub_keeps_the_lines_of_the_formula(op):
    doc = inspect.getdoc(executed(render("mychip", "torch")[f"src/polyfuse_mychip/{op}.py"])[op])
    definition = OPS[op].formula.strip().partition("\n")[2].strip("\n")  # the summary stands for the first line
    assert definition in doc


@pytest.mark.parametrize("op", OPS)
def test_a_stub_claims_every_call_until_values_are_deleted(op):
    capability = executed(render("mychip", "torch")[f"src/polyfuse_mychip/{op}.py"])["CAPABILITY"]
    for case in cases(op):
        call = bind(OPS[op], make_inputs(OPS[op], case))
        assert capability.refusal(call, "cpu") is None, case.name
    assert set(capability.attrs) == {a.name for a in OPS[op].attrs if a.kind in ("enum", "bool")}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MyChip"], "new-backend: NAME: expected a lowercase identifier, got 'MyChip'; try mychip"),
        (["my-chip"], "new-backend: NAME: expected a lowercase identifier, got 'my-chip'"),
        (["triton"], "NAME: expected none of the known backends numpy, jax, pallas, torch, triton, got 'triton'"),
        (["mychip", "--family", "tf"], "Invalid value for '--family': 'tf' is not one of 'torch', 'jax', 'numpy'."),
        (["mychip", "--dir", "full"], "new-backend: DIR: expected a new or empty folder, got full, which holds mine"),
        (["mychip", "--dir", "full/mine"], "new-backend: DIR: expected a new or empty folder, got the file full/mine"),
    ],
)
def test_what_is_refused_writes_nothing(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("kept")
    result = CliRunner().invoke(main, ["new-backend", *args])
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine"]
    assert (tmp_path / "full/mine").read_text() == "kept"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["new-backend", "mychip", "--dir", str(tmp_path / "empty")])
    assert result.exit_code == 0, result.output
    written = {path.relative_to(tmp_path / "empty").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == FILES
    assert all(f"created {tmp_path / 'empty' / name}" in result.output for name in FILES)
    assert len(result.output.split("next:\n")[1].splitlines()) == 3


@pytest.fixture(scope="module")
def porter(tmp_path_factory):
    """Runs commands as a porter does: polyfuse comes from its wheel, what it depends on from this environment."""
    home = tmp_path_factory.mktemp("porter")
    (home / "tree").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (home / "tree" / name).write_bytes((ROOT / name).read_bytes())
    for name in TREE:
        copytree(ROOT / name, home / "tree" / name, symlinks=True, ignore=ignore_patterns("__pycache__", "*.egg-info"))
    venv.create(home / "venv", symlinks=True)
    (packages,) = home.glob("venv/lib/python*/site-packages")
    binaries = home / "venv/bin"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "POLYFUSE_", "PYTEST_"))}
    environment |= {"PATH": f"{binaries}:{environment['PATH']}", "PIP_NO_INDEX": "1", "COLUMNS": "200"}

    def run(*command, status=0):
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--quiet", "--no-deps")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "tree")
    run(*pip, *map(str, (home / "dist").glob("*.whl")))
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    run.home, run.pip = home, pip
    return run


def test_the_way_to_a_first_conformant_op(porter):
    where = porter("python", "-c", "import polyfuse; print(polyfuse.__file__)")
    assert where.startswith(str(porter.home / "venv"))

    created = [line for line in porter("polyfuse", "new-backend", "mychip").splitlines() if line.startswith("created ")]
    assert sorted(created) == sorted(f"created polyfuse-mychip/{name}" for name in FILES)
    package = porter.home / "polyfuse-mychip"
    porter(*porter.pip, "--no-build-isolation", "--editable", str(package))
    (listed,) = [b for b in json.loads(porter("polyfuse", "info", "--json"))["backends"] if b["name"] == "mychip"]
    assert listed["origin"].startswith("entry point")
    assert {verdict["status"] for verdict in listed["ops"].values()} == {"not_implemented"}

    conformance = ("polyfuse", "conformance", "--backend", "mychip", "--level", "quick", "--device", "cpu")
    out = porter(*conformance, "--report", "report", status=1)
    assert f"mychip: 0 of {len(OPS)} ops conformant" in out
    assert "0 passed, 0 failed" in out
    assert json.loads((porter.home / "report/conformance.json").read_text())["conformant"] == {"mychip": []}

    two = ("--polyfuse-op", "gdn_in_proj", "--polyfuse-op", "gdn_post_conv")
    out = porter("python", "-m", "pytest", *two, "polyfuse-mychip", status=1)
    assert "mychip: 0 of 2 ops conformant" in out

    module = package / "src/polyfuse_mychip/gdn_in_proj.py"
    stub, _, _ = module.read_text().partition("    raise NotImplementedError")
    body = """
    def project(weights, bias):
        weight = torch.cat([w for w in weights if w is not None]).float()
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)

    return project((w_qkvz, w_z), bias_qkvz), project((w_ba, w_a), bias_ba)
"""
    module.write_text(stub + body)
    init = package / "src/polyfuse_mychip/__init__.py"
    init.write_text(init.read_text().replace('# "gdn_in_proj"', '"gdn_in_proj"'))
    out = porter(*conformance, "--op", "gdn_in_proj", "--op", "gdn_post_conv", "--report", "report")
    assert "mychip: 1 of 2 ops conformant" in out
    assert "0 failed" in out
    report = json.loads((porter.home / "report/conformance.json").read_text())
    assert report["conformant"] == {"mychip": ["gdn_in_proj"]}

    out = porter("python", "-m", "pytest", "-rs", *two, "polyfuse-mychip")
    assert f"{report['counts']['passed']} passed, {report['counts']['skipped']} skipped" in out
    assert "does not implement gdn_post_conv" in out
    _, summary = out.split("= polyfuse conformance, level quick =")
    assert "mychip: 1 of 2 ops conformant" in summary
