"""Every kernel compiles for GPUs of each generation, without one, and no model needs many forms of a kernel."""

from collections.abc import Callable

import pytest

KERNELS = {
    "pos_embed_interpolate _kernel",
    "gdn_post_conv _kernel",
    "gdn_conv_prep _kernel",
    "_conv_state _update_pool",
    "silu_mul_block_quant _kernel",
    "gdn_in_proj _kernel",
    "segment_attention _kernel",
    "gated_rms_norm _kernel",
    "gated_delta_rule _prepare",
    "gated_delta_rule _scan",
    "gdn_decode _kernel",
    "_expert_products _products",
    "_expert_products _route",
    "_expert_products _sums",
}
NEW = {
    name for name in KERNELS if name.startswith("_expert_products ")
}  # need float8_e4m3fn on matrix units: from sm_89 on
MOST_FORMS = 4  # of a kernel, in a model that chooses attributes, dtypes and arrays


def compiled(lines: list[str]) -> set[str]:
    """The kernels that there are binaries of."""
    return {line.rsplit(" ", 2)[0] for line in lines if ":" not in line}


def test_every_kernel_compiles_for_blackwell(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Of these GPUs the one whose compiler is least like that of the others, and that fewest people have run."""
    lines = run_uninterpreted("from tests.triton_impl.every_arch import main; main('once', 100)")
    assert compiled(lines) >= KERNELS


def test_every_choice_of_arrays_compiles(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Such as a bias of one of two products. States are small ones, of which a thread has one element of a column."""
    lines = run_uninterpreted(
        "from tests.triton_impl.every_arch import main; main('arrays', 90, 'gdn_decode', 'gdn_in_proj')"
    )
    assert compiled(lines) == {"gdn_decode _kernel", "gdn_in_proj _kernel"}
    assert len(lines) >= 12


@pytest.mark.slow
def test_every_case_of_level_quick_compiles(run_uninterpreted: Callable[[str], list[str]]) -> None:
    lines = run_uninterpreted("from tests.triton_impl.every_arch import main; main('quick', 90)")
    assert compiled(lines) >= KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_form_that_models_need_compiles(arch: int, run_uninterpreted: Callable[[str], list[str]]) -> None:
    lines = run_uninterpreted(f"from tests.triton_impl.every_arch import main; main('models', {arch})")
    assert compiled(lines) >= (KERNELS if arch > 80 else KERNELS - NEW)
    needed = [line.rsplit(" ", 1) for line in lines if ":" in line]
    assert {name: count for name, count in needed if int(count) > MOST_FORMS} == {}
