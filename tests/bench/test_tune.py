"""A sweep keeps what is faster, passes conformance and changes no bit, and a device's file says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from polyfuse.bench import tune
from polyfuse.bench.tune import Sweep, Tuned, sweep_op, tunable
from polyfuse.cli import main
from polyfuse.configs import tuned_ranges, tuning_file
from polyfuse.conformance import Case
from polyfuse.spec import SpecError
from polyfuse.triton_impl import gated_rms_norm as module
from tests.triton_impl.helpers import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, on infinities
OP = "gated_rms_norm"
TILES = module.TILES
real = module.gated_rms_norm
CALLS = [Case(f"rows_{n}", {"...": (n,), "V": 32}, dtypes={"x": "bfloat16"}) for n in (1, 2, 40)]


@pytest.fixture(autouse=True)
def few_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TILES, "ranges", ((64, (32, 1)), (2**63, (64, 2))))
    monkeypatch.setattr(TILES, "choices", ((32, 64, 128), (1, 2)))


def measured(times: dict[tuple[int, int], float]) -> Callable[[Any], float]:
    """Times by what a call runs with; 10 us for all others."""
    return lambda call: times.get(TILES.choose(0, torch.device(DEVICE)), 10.0)


def sweep(times: dict[tuple[int, int], float]) -> list[Sweep]:
    return list(sweep_op(OP, TILES, CALLS, DEVICE, measured(times)))


def described(elements: int, warps: int) -> dict[str, int]:
    return {"elements": elements, "warps": warps}


def test_the_fastest_is_kept_for_each_range() -> None:
    assert sweep({(128, 1): 5.0, (64, 1): 8.0}) == [
        Sweep(OP, 64, ("rows_1", "rows_2"), described(32, 1), described(128, 1), 0.5, 6, {}),
        Sweep(OP, None, ("rows_40",), described(64, 2), described(128, 1), 0.5, 6, {}),
    ]


def test_noise_is_no_gain() -> None:
    assert [found.chosen for found in sweep({(128, 1): 9.9})] == [described(32, 1), described(64, 2)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda y: y.nextafter(y.new_tensor(9.0)), "other bits in rows_1"),
        (lambda y: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_changes_a_bit_or_raises_is_rejected(
    wrong: Callable[[torch.Tensor], torch.Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        y = real(x, *args, **options)
        return wrong(y) if TILES.choose(y.numel(), x.device) == (128, 1) else y

    monkeypatch.setattr(module, OP, changed)
    small, large = sweep({(128, 1): 5.0, (128, 2): 6.0})
    assert small.rejected == {"(128, 1)": reason}
    assert large.rejected == {"(128, 1)": reason.replace("rows_1", "rows_40")}
    assert small.chosen == large.chosen == described(128, 2)
    assert small.ratio == 0.6


def test_a_winner_passes_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that were timed are right with it; one of the core cases is not."""

    def changed(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        y = real(x, *args, **options)
        return y * 2 if TILES.choose(y.numel(), x.device) == (128, 1) and x.dtype == torch.float32 else y

    monkeypatch.setattr(module, OP, changed)
    for found in sweep({(128, 1): 5.0, (128, 2): 6.0}):
        assert found.rejected["(128, 1)"].partition(":")[0] in tune.OPS[OP].core
        assert found.chosen == described(128, 2)


def test_the_file_holds_for_this_source_triton_and_architecture(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other entries and keys of the file stay; the user's cache comes before what the package ships."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuning_file("NVIDIA X")
    assert path == tmp_path / "polyfuse" / "tuning" / "nvidia_x.yaml"
    path.parent.mkdir(parents=True)
    other = {"op": OP, "source": "old", "triton": "3.6.0", "arch": "sm_90", "ranges": [{"parameters": described(1, 1)}]}
    path.write_text("device: NVIDIA X\nversions: {}\n# kept\n" + yaml.safe_dump({"launch": [other]}))
    result = Tuned("NVIDIA X", "sm_90", sweep({(128, 1): 5.0}), {OP: TILES.source()})
    for _ in range(2):  # the second time it replaces its own entry
        assert result.save() == path
    text = path.read_text()
    assert "# kept" in text
    assert len(yaml.safe_load(text)["launch"]) == 2
    now = TILES.source(), tune.triton.__version__, "sm_90"
    assert tuned_ranges("NVIDIA X", OP, *now) == ((64, described(128, 1)), (None, described(128, 1)))
    for changed in (("other", *now[1:]), (now[0], "0.0", now[2]), (*now[:2], "sm_80")):
        assert tuned_ranges("NVIDIA X", OP, *changed) is None
    assert tuned_ranges("NVIDIA X", OP, "old", "3.6.0", "sm_90") == ((None, described(1, 1)),)


def test_every_op_with_tiles_can_be_swept() -> None:
    found = tunable()
    assert {"pos_embed_interpolate", "gdn_post_conv", OP} <= found.keys()
    for tiles in found.values():
        assert len(tiles.names) == len(tiles.choices) == len(tiles.ranges[0][1])
        assert tiles.ranges[-1][0] == 2**63


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "gdn_decode", "--device", "cpu"], "tune: op: expected one of pos_embed_interpolate, "),
        (["--device", "cpu"], "tune: device: expected an accelerator: on a CPU kernels are interpreted,"),
    ],
)
def test_what_cannot_be_tuned(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["tune", *args])
    assert result.exit_code == 2
    assert message in result.output


def test_the_command_shows_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    swept = [Sweep(OP, None, ("a", "b"), described(64, 2), described(128, 1), 0.5, 6, {"(32, 1)": "other bits in a"})]
    monkeypatch.setattr(tune, "tune", lambda *_: Tuned("NVIDIA X", "sm_90", swept, {OP: "abc"}))
    result = CliRunner().invoke(main, ["tune", "--op", OP, "--device", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "elements=128 warps=1" in result.output
    assert "rejected for gated_rms_norm: (32, 1): other bits in a" in result.output
    assert yaml.safe_load((tmp_path / "nvidia_x.yaml").read_text())["launch"][0]["source"] == "abc"


@pytest.mark.skipif(DEVICE == "cpu", reason="no time means anything where kernels are interpreted")
def test_on_a_gpu() -> None:
    result = tune.tune([OP], "cuda")
    assert [found.op for found in result.sweeps] == [OP, OP]
    assert all(found.ratio <= 1 for found in result.sweeps)


def test_another_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rule itself: there is nothing to compare with."""
    monkeypatch.setattr(module, OP, lambda **_: (_ for _ in ()).throw(SpecError("broken")))
    with pytest.raises(SpecError, match="broken"):
        sweep({})
