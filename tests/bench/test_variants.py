"""The variants of a text model: which a machine has, and that each runs its own delta rule."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import polyfuse
from polyfuse.bench.baseline import compare, variants_of
from polyfuse.bench.model import run_model_bench
from polyfuse.bench.model.rules import delta_rules
from polyfuse.bench.subjects import gated_delta_net
from polyfuse.bench.subjects.text import TextModel
from polyfuse.bench.subjects.variants import choose_variants, implementation, packages_called, rules_of
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS, Capability
from polyfuse.torch_impl.gated_delta_rule import gated_delta_rule

RULES = {"torch_chunk_gated_delta_rule": "chunk", "torch_recurrent_gated_delta_rule": "fused_recurrent"}
SIZES = [("prefill", 1, 16), ("decode", 2, 1)]
MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"
PYTORCH = {
    "prefill": f"{MODELING}.torch_chunk_gated_delta_rule",
    "decode": f"{MODELING}.torch_recurrent_gated_delta_rule",
}
IN_FLA = {
    "prefill": "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
    "decode": "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_op():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fla(monkeypatch):
    """Transformers as it is where flash-linear-attention is installed; lists the calls that get to the package."""
    called = []
    functions = {}
    for name, kind in RULES.items():
        functions[f"{kind}_gated_delta_rule"] = _of_package(inspect.unwrap(getattr(modeling, name)), kind, called)
    module = ModuleType("fla")
    monkeypatch.setattr(module, "ops", SimpleNamespace(gated_delta_rule=SimpleNamespace(**functions)), raising=False)
    monkeypatch.setitem(sys.modules, "fla", module)
    for name, kind in RULES.items():
        decorate = use_kernel_func_from_hub_with_fallback(f"{kind}_gated_delta_rule", "fla")
        monkeypatch.setattr(modeling, name, decorate(inspect.unwrap(getattr(modeling, name))))
    return called


def _of_package(rule, kind, called):
    def function(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
        called.append(kind)
        return rule(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )

    function.__module__ = "fla.ops.gated_delta_rule"
    function.__qualname__ = f"{kind}_gated_delta_rule"
    return function


@pytest.fixture
def backend(monkeypatch):
    """A backend of the name `fla`, which is installed beside the built-in ones."""
    package, op = ModuleType("a_backend"), ModuleType("a_backend.gated_delta_rule")
    monkeypatch.setattr(op, "gated_delta_rule", gated_delta_rule, raising=False)
    monkeypatch.setattr(op, "CAPABILITY", Capability(), raising=False)
    monkeypatch.setitem(sys.modules, "a_backend", package)
    monkeypatch.setitem(sys.modules, "a_backend.gated_delta_rule", op)
    polyfuse.refresh()
    implements = {"gated_delta_rule": OPS["gated_delta_rule"].version}
    registry().add(Backend("fla", "torch", "a_backend", implements=implements))
    yield op
    registry.cache_clear()
    polyfuse.refresh()


def tiny():
    return TextModel("qwen3_5", "cpu", tiny=True)


def test_without_any_package():
    variants, (first, second) = choose_variants(modeling)
    assert variants == ["untouched", "accelerated"]
    assert first == "flash-linear-attention is not installed: untouched models run Transformers' PyTorch delta rule"
    assert second == "no variant 'accelerated + fla': polyfuse-fla is not installed"
    assert packages_called(modeling) == []


def test_a_package_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(
        "polyfuse.bench.subjects.variants.version", lambda name: {"flash-linear-attention": "0.6"}[name]
    )
    _, (note, _) = choose_variants(modeling)
    assert note.startswith("flash-linear-attention 0.6 is installed, but Transformers cannot import it here: ")


def test_with_the_package(fla):
    variants, notes = choose_variants(modeling)
    assert variants == ["untouched", "untouched + fla", "accelerated"]
    assert notes == ["no variant 'accelerated + fla': polyfuse-fla is not installed"]


def test_with_package_and_backend(fla, backend):
    assert choose_variants(modeling) == (["untouched", "untouched + fla", "accelerated", "accelerated + fla"], [])


def test_a_backend_that_cannot_run(backend, monkeypatch):
    monkeypatch.setattr(sys.modules["a_backend"], "unavailable", lambda: "no kernels here", raising=False)
    variants, (*_, note) = choose_variants(modeling)
    assert variants == ["untouched", "accelerated"]
    assert note == "no variant 'accelerated + fla': no kernels here"


def test_another_package_has_a_variant_too(monkeypatch):
    def causal_conv1d_fn(*args, **kwargs):
        raise NotImplementedError

    causal_conv1d_fn.__module__ = "causal_conv1d"
    module = ModuleType("causal_conv1d")
    monkeypatch.setattr(module, "causal_conv1d_fn", causal_conv1d_fn, raising=False)
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    decorate = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")
    own = inspect.unwrap(modeling.causal_conv1d_fn)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", decorate(own))
    variants, notes = choose_variants(modeling)
    assert variants == ["untouched", "untouched + causal_conv1d", "accelerated"]
    assert notes[0].startswith("flash-linear-attention is not installed")
    with rules_of("untouched", modeling, "cpu"):
        assert modeling.causal_conv1d_fn is own
    with rules_of("untouched + causal_conv1d", modeling, "cpu"):
        assert implementation(modeling.causal_conv1d_fn) is causal_conv1d_fn


@pytest.mark.parametrize("variant", ["untouched", "accelerated"])
def test_a_plain_variant_calls_transformers_own_functions(fla, variant):
    before = {name: getattr(modeling, name) for name in RULES}
    with rules_of(variant, modeling, "cpu"):
        for name, function in before.items():
            assert getattr(modeling, name) is inspect.unwrap(function)
    assert {name: getattr(modeling, name) for name in RULES} == before


def test_other_functions_stay(fla):
    conv = modeling.causal_conv1d_fn
    with rules_of("untouched", modeling, "cpu"):
        assert modeling.causal_conv1d_fn is conv


def test_untouched_rules(fla):
    subject = tiny()
    x = subject.hidden(1, 16)
    found = {}
    for variant in ("untouched", "untouched + fla"):
        with torch.no_grad(), subject.variant(variant):
            subject.layer(x)
            found[variant] = list(fla)
    assert found == {"untouched": [], "untouched + fla": ["chunk"]}


def test_the_rules_that_run_are_named(fla, backend):
    subject, notes = tiny(), []
    with torch.no_grad():
        found = delta_rules(subject, SIZES, notes)
    assert notes == []
    assert list(found.items()) == [
        ("untouched", PYTORCH),
        ("untouched + fla", IN_FLA),
        ("accelerated", {"prefill": "polyfuse.gated_delta_rule (torch)", "decode": "polyfuse.gdn_decode (torch)"}),
        ("accelerated + fla", {"prefill": "polyfuse.gated_delta_rule (fla)", "decode": "polyfuse.gdn_decode (torch)"}),
    ]


def test_an_accelerated_layer_that_takes_its_own_path_is_named_so(fla):
    subject, notes = tiny(), []
    subject.layer.activation = "gelu"
    with torch.no_grad():
        found = delta_rules(subject, SIZES, notes)
    assert found["accelerated"] == PYTORCH


def test_flash_qla_is_named_where_it_runs(monkeypatch):
    module = ModuleType("flash_qla")
    monkeypatch.setattr(module, "chunk_gated_delta_rule", lambda: None, raising=False)
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    parts = tiny().parts
    assert parts.rule_that_runs("prefill", module.chunk_gated_delta_rule) == PYTORCH["prefill"]
    call = lambda: module.chunk_gated_delta_rule()  # noqa: E731  looked up anew at each call, as FLA does
    assert parts.rule_that_runs("prefill", call) == f"{PYTORCH['prefill']} (flash_qla)"
    assert module.__name__ == gated_delta_net.FLASH_QLA


def test_a_package_that_fails_is_noted(fla, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no GPU here\nat all")

    def accelerated_only(subject, variant, sizes):
        if variant == "untouched + fla":
            broken()
        return PYTORCH

    monkeypatch.setattr("polyfuse.bench.model.rules._rules_of", accelerated_only)
    notes = []
    assert list(delta_rules(tiny(), SIZES, notes)) == ["untouched", "accelerated"]
    assert notes == ["no variant 'untouched + fla': ValueError: no GPU here"]


def test_a_backend_that_takes_no_call_is_noted(backend, monkeypatch):
    monkeypatch.setattr(backend, "CAPABILITY", Capability(devices=("cuda",)))
    subject, notes = tiny(), []
    with torch.no_grad():
        assert list(delta_rules(subject, SIZES, notes)) == ["untouched", "accelerated"]
    assert notes == ["no variant 'accelerated + fla': the backend fla takes none of these calls"]


def test_all_variants_are_measured(fla, backend):
    result = run_model_bench(tiny(), [16], [2], compiled=False, parts=["rows", "layer"])
    names = ["untouched", "untouched + fla", "accelerated", "accelerated + fla"]
    assert result.notes == []
    assert [row.variant for row in result.rows] == [row.variant for row in result.layer] == names * 2
    assert set(fla) == {"chunk", "fused_recurrent"}
    rows = [vars(row) for row in result.rows]
    assert variants_of(rows) == (names[:2], names[2:])
    for call in compare(rows):
        best = min(call.ms["untouched"], call.ms["untouched + fla"])
        assert call.ms[call.before] == best
        assert call.gain("accelerated") == best / call.ms["accelerated"]
        assert call.gain("accelerated + fla") == best / call.ms["accelerated + fla"]


def test_the_baseline_is_the_fastest_untouched_variant_of_the_same_call():
    call = {"phase": "decode", "batch": 1, "tokens": 1}
    rows = [
        call | {"mode": "eager", "variant": "untouched", "ms": 4.0},
        call | {"mode": "graph", "variant": "untouched", "ms": 1.0},
        call | {"mode": "eager", "variant": "untouched + fla", "ms": 6.0},
        call | {"mode": "eager", "variant": "accelerated", "ms": 2.0},
    ]
    eager, graph = compare(rows)
    assert (eager.before, eager.gain("accelerated"), eager.gain("untouched + fla")) == ("untouched", 2.0, 4 / 6)
    assert (graph.before, graph.gain("accelerated")) == ("untouched", None)
