"""Which bench cases are asked for, what they cost, and that every option of the quantising ops has one."""

import numpy as np
import pytest
from click.testing import CliRunner

from polyfuse.bench import measure, one_case, ops
from polyfuse.bench.cases import BenchCase, bench_cases
from polyfuse.bench.measure import live_share
from polyfuse.bench.ops import LeftOut, run_bench
from polyfuse.cli import main
from polyfuse.configs import model_configs
from polyfuse.conformance import Case, make_inputs
from polyfuse.spec import OPS, SpecError

OP = "silu_mul_block_quant"
TARGETS = {
    "E256_T64_D2048_8_live": 8 / 64,
    "E256_T64_D2048_64_live": 1.0,
    "E32_T1024_D2048_700_live": 700 / 1024,
    "E8_T4096_D7168_all_live": 1.0,
    "E128_T128_D768_20_live": 20 / 128,
}


def named(op: str, name: str) -> BenchCase:
    (found,) = bench_cases([op], patterns=[name])
    return found


def test_all_cases_are_asked_for_by_default():
    count = sum(len(shapes) for config in model_configs().values() for shapes in config.bench.values())
    assert len(bench_cases()) == count > 60


def test_a_pattern_of_names():
    found = bench_cases([OP], "qwen3_5_35b_a3b", ["E256*", "T1_*"])
    assert [case.name for case in found] == ["T1_D2048", "E256_T64_D2048_8_live", "E256_T64_D2048_64_live"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "qwen9"}, "--model: expected one of qwen3_5_35b_a3b, qwen3_5_397b_a17b, "),
        (
            {"ops": ["block_quant"], "model": "qwen3_5_9b"},
            "--model qwen3_5_9b --op block_quant: no bench case; expected one of gdn",
        ),
        ({"ops": ["gdn_in_proj"], "patterns": ["T1", "B*"]}, "--case B*: no bench case; expected one of T1, T256, "),
        ({"model": "siglip_so400m"}, "--model siglip_so400m: no bench case; expected one of qwen3_5_35b_a3b, "),
    ],
)
def test_a_filter_that_matches_nothing_names_the_choices(asked, said):
    with pytest.raises(SpecError) as caught:
        bench_cases(**asked)
    assert str(caught.value).startswith(said)


def test_the_command_fails_for_such_a_filter():
    done = CliRunner().invoke(main, ["bench", "--device", "cpu", "--op", OP, "--case", "T3"])
    assert done.exit_code == 2
    assert "--case T3: no bench case; expected one of T1_D2048, " in done.output


@pytest.mark.parametrize(("name", "share"), TARGETS.items())
def test_the_masked_cells_by_name_and_the_share_of_their_rows(name, share):
    few = named(OP, name).few_rows()
    assert few is not None
    assert few.dims["..."] == (1, min(256, named(OP, name).case.dims["..."][1]))
    values = make_inputs(OPS[OP], few)
    rows = few.dims["..."][1]
    live = share * named(OP, name).case.dims["..."][1]
    assert live_share(values) == min(1.0, live / rows)


def test_the_share_of_packed_experts_and_of_rows_without_experts():
    few = named(OP, "T4096_D768_expert_ends").few_rows()
    assert few is not None
    assert live_share(make_inputs(OPS[OP], few)) == 1.0  # the first expert has 300 rows, the call 256
    assert live_share(make_inputs(OPS[OP], Case("", {"...": (3,), "D": 128}, dtypes={"x": "bfloat16"}))) == 1.0


def test_every_option_of_the_quantising_ops_has_a_bench_case():
    calls = {op: [case.call() for case in bench_cases([op])] for op in (OP, "block_quant", "rms_norm_block_quant")}

    def has(op, **attrs):
        return any(all(call.attrs[name] == value for name, value in attrs.items()) for call in calls[op])

    assert has(OP, interleaved=True, alpha=1.702, up_offset=1.0, limit=7.0)
    assert has(OP, materialize=True)
    for op in calls:
        assert has(op, quant_dtype="float4_e2m1", scale_format="e4m3", scale_layout="swizzled_128x4"), op
    assert has(OP, quant_dtype="float4_e2m1", scale_format="ue8m0", group_size=32)
    assert has(OP, quant_dtype="float8_e4m3fn", scale_format="ue8m0", group_size=32)
    assert has("block_quant", quant_dtype="float8_e4m3fn", scale_format="ue8m0", group_size=32)
    arrays = {op: set().union(*(call.dtypes for call in found)) for op, found in calls.items()}
    assert {"up", "num_rows", "expert_ends"} <= arrays[OP]
    assert "num_rows" in arrays["block_quant"]
    assert "residual" in arrays["rms_norm_block_quant"]


def test_cases_whose_rows_are_named_are_not_made_smaller():
    assert named("gated_delta_rule", "decode_64").few_rows() is None
    assert named("pos_embed_interpolate", "16x16").few_rows() is None
    smaller = named("gdn_decode", "B256").few_rows()
    assert smaller is not None
    assert smaller.dims["..."] == (256,)
    assert named("gated_rms_norm", "L32768").few_rows().dims["..."] == (256, 32)


def test_a_case_of_which_one_call_takes_too_long_is_left_out_and_said():
    result = run_bench([OP], ["torch"], cases=["T16384_D2048"], budget=0.01)
    assert result.rows == []
    (left,) = result.left_out
    assert (left.op, left.case, left.what) == (OP, "T16384_D2048", "all")
    assert left.reason.startswith("about ")
    assert left.reason.endswith(" s for one call of PyTorch, of a budget of 0.01 s")


def test_what_is_left_out_is_printed():
    asked = ["bench", "--device", "cpu", "--op", OP, "--case", "T16384_D2048", "--budget", "0.01"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0
    assert "left out silu_mul_block_quant T16384_D2048 of qwen3_5_35b_a3b: all: about " in done.stdout


def test_each_step_is_told_before_it_begins():
    told = []
    run_bench([OP], ["torch"], cases=["T16384_D2048"], budget=0.01, on_start=told.append)
    assert told == ["stream ceiling", "silu_mul_block_quant T16384_D2048 of qwen3_5_35b_a3b: estimate"]


def test_a_used_up_budget_leaves_torch_compile_out(monkeypatch):
    class Spent(one_case.Budget):
        def left(self):
            return 0.4 * self.seconds

    monkeypatch.setattr(one_case, "Budget", Spent)
    result = run_bench([OP], ["torch"], cases=["T1_D2048"], budget=2.0)
    assert [(left.what, left.case) for left in result.left_out] == [("torch.compile", "T1_D2048")]
    assert result.rows[0].compile_ratio is None


def test_bytes_of_rows_that_do_not_count_are_not_counted(monkeypatch):
    """Of a masked call with half of its rows valid, half of the bytes move."""
    monkeypatch.setattr(ops, "stream_ceiling", lambda _: 1.0)
    case = Case("half", {"...": (2, 16), "D": 128, "E": 2}, dtypes={"x": "bfloat16"}, present=("num_rows",),
                fill={"num_rows": "rows_8"})  # fmt: skip
    monkeypatch.setattr(ops, "bench_cases", lambda *_: [BenchCase(OP, "m", "half", case)])
    monkeypatch.setattr(one_case, "measure", lambda *_: measure.Times(1000.0, 1.0, None))
    (row,) = run_bench([OP], ["torch"], compiled=False).rows
    per_row = 2 * 128 * 2 + 128 + 4
    assert row.gigabytes_per_s == pytest.approx(16 * per_row / 1000 / 1e3, abs=0.051)
    assert row.fraction == pytest.approx(16 * per_row / 1e6, abs=5e-5)


def test_a_row_that_was_left_out_reads_as_a_sentence():
    assert str(LeftOut("op", "m", "c", "all", "too long")) == "op c of m: all: too long"


def test_inputs_of_a_measurement_repeat_rows_where_they_are_many():
    case = Case("large", {"...": (3, 50), "D": 64}, dtypes={"x": "bfloat16"})
    x = make_inputs(OPS[OP], case, most=1024)["x"]
    assert x.shape == (3, 50, 128)
    rows = x.reshape(150, 128)
    assert (rows[8:] == rows[:-8]).all()
    assert len(np.unique(rows[:8].astype(np.float32))) > 500
    assert (make_inputs(OPS[OP], case, most=3 * 50 * 128)["x"] == make_inputs(OPS[OP], case)["x"]).all()
