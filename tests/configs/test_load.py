"""Configuration files: what is read, and the one-line error of each mistake."""

import re

import pytest

import polyfuse
from polyfuse import SpecError
from polyfuse.configs import encoder_config, level, model_configs, platform_order, user_config
from polyfuse.spec import OPS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend: [triton", "polyfuse.yaml: line 2 is not valid YAML"),
        ("- triton", "polyfuse.yaml: expected a mapping, got list"),
        ("strict: true\nbackends: triton", "polyfuse.yaml: line 2: backends: unknown key; did you mean backend?"),
        ("quux: 1", "line 1: quux: unknown key; known are backend, strict, ops, encoder"),
        ("backend: 3", "polyfuse.yaml: line 1: backend: expected a name or a list of names, got 3"),
        ("backend: [torch, 3]", "polyfuse.yaml: line 1: backend.1: expected a name, got 3"),
        ("backend: []", "polyfuse.yaml: line 1: backend: expected at least one entry, got []"),
        ("strict: maybe", "polyfuse.yaml: line 1: strict: expected true or false, got 'maybe'"),
        ("ops: {silu: torch}", f"line 1: ops: expected one of {', '.join(OPS)}, got 'silu'"),
        ("encoder:\n  policy: best", "line 2: encoder.policy: expected one of 'optimal' or 'greedy', got 'best'"),
        ("encoder:\n  max_item: 3", "line 2: encoder.max_item: unknown key; did you mean max_items?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "polyfuse.yaml").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        user_config()
    assert "\n" not in str(caught.value)


def test_a_name_stands_for_a_list_of_one(tmp_path, monkeypatch):
    (tmp_path / "polyfuse.yaml").write_text("backend: torch\nops: {pos_embed_interpolate: [triton, torch]}\n")
    monkeypatch.chdir(tmp_path)
    settings, path = user_config()
    assert (settings.backend, path) == (["torch"], "polyfuse.yaml")
    assert settings.ops == {"pos_embed_interpolate": ["triton", "torch"]}


def test_no_file_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert user_config() is None


def test_an_unknown_name_in_the_file_is_refused_at_the_first_call(tmp_path, monkeypatch):
    import numpy as np

    (tmp_path / "polyfuse.yaml").write_text("backend: tritn\n")
    monkeypatch.chdir(tmp_path)
    polyfuse.refresh()
    with pytest.raises(polyfuse.BackendError, match="got 'tritn'"):
        polyfuse.pos_embed_interpolate(np.zeros((4, 8), np.float32), [[1, 2, 2]])
    monkeypatch.chdir("/")
    polyfuse.refresh()


def test_encoder_settings_given_win_over_the_environment_over_the_file(tmp_path, monkeypatch):
    (tmp_path / "polyfuse.yaml").write_text("encoder: {max_items: 3, policy: greedy, largest: 512}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYFUSE_ENCODER_POLICY", "optimal")
    monkeypatch.setenv("POLYFUSE_ENCODER_BUDGETS", "[64, 256]")
    config = encoder_config(largest=128)
    assert (config.max_items, config.policy, config.budgets, config.largest) == (3, "optimal", [64, 256], 128)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BUDGETS", "64", "environment variable POLYFUSE_ENCODER_BUDGETS: budgets: expected a list, got 64"),
        ("BUDGET", "[64]", "environment variable POLYFUSE_ENCODER_BUDGET: budget: unknown key; did you mean budgets?"),
        ("BUDGETS", "[64", "environment variable POLYFUSE_ENCODER_BUDGETS: not valid YAML"),
    ],
)
def test_encoder_variables_are_checked(variable, value, message, monkeypatch):
    monkeypatch.setenv(f"POLYFUSE_ENCODER_{variable}", value)
    with pytest.raises(SpecError, match=re.escape(message)):
        encoder_config()


def test_encoder_settings_in_the_file_are_checked(tmp_path, monkeypatch):
    (tmp_path / "polyfuse.yaml").write_text("encoder: {max_items: 0}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SpecError, match=re.escape("polyfuse.yaml: line 1: encoder.max_items: expected a number >= 1, got 0")
    ):
        encoder_config()


def test_platforms():
    assert platform_order("cuda", "torch", "pos_embed_interpolate")[0][0] == "triton"
    assert platform_order("cpu", "torch", "pos_embed_interpolate")[0][0] == "torch"
    assert platform_order("npu", "torch", "pos_embed_interpolate") == (("torch",), "configs/platforms/default.yaml")


def test_every_packaged_file_is_valid():
    models = model_configs()
    proven = {op for m in models.values() for op in m.ops}
    assert {op for m in models.values() for op in m.bench} == proven
    assert {"pos_embed_interpolate", "gdn_conv_prep", "segment_attention"} <= proven
    assert all(m.source for m in models.values())
    for name in ("quick", "standard", "full"):
        assert level(name).proves.endswith(".")
