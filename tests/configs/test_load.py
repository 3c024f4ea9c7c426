"""Configuration files: what is read, and the one-line error of each mistake."""

import re

import pytest

import polyfuse
from polyfuse import SpecError
from polyfuse.configs import model_configs, platform_order, profile, user_config
from polyfuse.spec import OPS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend: [triton", "polyfuse.yaml: line 2 is not valid YAML"),
        ("- triton", "polyfuse.yaml: expected a mapping, got list"),
        ("backends: triton", "backends: Extra inputs are not permitted, got 'triton'; known keys are backend, ops"),
        ("backend: 3", "polyfuse.yaml: backend: Input should be a valid list, got 3"),
        ("backend: []", "polyfuse.yaml: backend: Value should have at least 1 item"),
        ("ops: {silu: torch}", f"ops: Value error, expected one of {', '.join(OPS)}, got 'silu'"),
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


def test_platforms():
    assert platform_order("cuda", "torch", "pos_embed_interpolate")[0][0] == "triton"
    assert platform_order("cpu", "torch", "pos_embed_interpolate")[0][0] == "torch"
    assert platform_order("npu", "torch", "pos_embed_interpolate") == (("torch",), "configs/platforms/default.yaml")


def test_every_packaged_file_is_valid():
    models = model_configs()
    assert {op for m in models.values() for op in m.ops} == set(OPS)
    assert {op for m in models.values() for op in m.bench} == set(OPS)
    assert all(m.source for m in models.values())
    for name in ("quick", "standard", "full"):
        assert profile(name).max_elements > 0
