"""`polyfuse golden`: what it prints, and the exit status that a script of a vendor relies on."""

import json

import pytest
from click.testing import CliRunner

from polyfuse.cli import main
from polyfuse.conformance.golden._files import write
from polyfuse.reference import oracle
from polyfuse.spec import OPS
from tests.conformance.golden_files import results

OP = "gated_rms_norm"
CASES = len(OPS[OP].core)


def invoke(*args):
    return CliRunner().invoke(main, ["golden", *map(str, args)])


@pytest.fixture
def golden(tmp_path):
    done = invoke("export", tmp_path / "golden", "--op", OP)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{CASES} cases, 0.2 MB in ")
    return tmp_path / "golden"


@pytest.fixture
def outputs(golden, tmp_path):
    for entry in json.loads((golden / "manifest.json").read_text())["cases"]:
        for result in entry["results"]:
            write(tmp_path / "outputs" / result["file"], results(entry, oracle(OP))[result["name"]])
    return tmp_path / "outputs"


@pytest.mark.parametrize("command", ["export", "verify"])
def test_each_has_help_with_an_example(command):
    assert f"polyfuse golden {command}" in invoke(command, "--help").output.split("Example:")[1]


def test_the_size_of_the_default_is_what_the_help_says(tmp_path):
    words = invoke("export", tmp_path / "golden").output.split()
    assert 8 < float(words[words.index("MB") - 1]) < 14
    assert "about 10 MB" in invoke("export", "--help").output


def test_right_outputs_exit_with_0(golden, outputs):
    done = invoke("verify", golden, outputs)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == f"{CASES} of {CASES} cases right"
    assert done.output.count(f"right  {OP}/") == CASES


def test_a_wrong_and_a_missing_output_exit_with_1(golden, outputs):
    wrong = sorted(outputs.rglob("y.npy"))
    data = bytearray(wrong[0].read_bytes())
    data[-1] ^= 0x80  # the sign of the last element
    wrong[0].write_bytes(data)
    wrong[1].unlink()
    done = invoke("verify", golden, outputs)
    assert done.exit_code == 1
    problems = sorted(line for line in done.output.splitlines() if line.startswith("WRONG"))
    assert len(problems) == 2
    assert f"WRONG  {OP}/{wrong[0].parent.name}: y: 1 of " in problems[0]
    assert problems[1] == f"WRONG  {OP}/{wrong[1].parent.name}: y: {wrong[1]}: missing"
    assert done.output.splitlines()[-1] == f"{CASES - 2} of {CASES} cases right"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "{tmp}", "--op", "nope"], "op: expected one of"),
        (["export", "{tmp}", "--case", "nope"], "case: expected a pattern that a case of"),
        (["export", "{tmp}", "--cases", "few"], "'few' is not one of 'core', 'all'"),
        (["export", "{golden}"], "expected an empty folder, or none"),
        (["verify", "{tmp}/none", "{outputs}"], "manifest.json: missing"),
        (["verify", "{outputs}", "{outputs}"], "manifest.json: missing"),
    ],
)
def test_errors_are_one_line_and_status_2(golden, outputs, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    done = invoke(*(arg.format(tmp=tmp_path / "empty", golden=golden, outputs=outputs) for arg in args))
    assert done.exit_code == 2
    assert message in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("Error: ")]) == 1


def test_what_is_left_out_is_said(tmp_path):
    done = invoke("export", tmp_path / "golden", "--op", OP, "--max-elements", 1)
    assert done.exit_code == 0
    assert done.output.count("left out  ") == CASES
    assert "elements, more than 1" in done.output
    assert invoke("verify", tmp_path / "golden", tmp_path).exit_code == 1, "nothing was judged"
