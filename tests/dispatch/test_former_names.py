"""A former name of an op works for one more release, and says what the op is called now."""

import numpy as np
import pytest

import polyfuse
from polyfuse.configs import user_config
from polyfuse.conformance import cases, make_inputs
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS

OLD, NEW = "gdn_conv_post", "gdn_conv_prep"
RENAMED = f"{OLD} is now {NEW}"
VALUES = make_inputs(OPS[NEW], cases(NEW)[0])


def test_the_function():
    with pytest.warns(DeprecationWarning, match=RENAMED):
        function = getattr(polyfuse, OLD)
    assert function is polyfuse.gdn_conv_prep


def test_explain():
    with pytest.warns(DeprecationWarning, match=RENAMED):
        assert polyfuse.explain(OLD, **VALUES).op == NEW


def test_the_environment_variable(monkeypatch):
    monkeypatch.setenv(f"POLYFUSE_BACKEND_{OLD.upper()}", "numpy")
    polyfuse.refresh()
    with pytest.warns(DeprecationWarning, match=RENAMED):
        preference = polyfuse.explain(NEW, **VALUES).preference
    assert preference.source == f"environment variable POLYFUSE_BACKEND_{OLD.upper()}"


def test_the_config_file(monkeypatch, tmp_path):
    (tmp_path / "polyfuse.yaml").write_text(f"ops:\n  {OLD}: numpy\n")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DeprecationWarning, match=RENAMED):
        settings = user_config()
    assert settings is not None
    assert settings[0].ops == {NEW: ["numpy"]}


def test_a_backend_of_another_package(monkeypatch, tmp_path):
    folder = tmp_path / "backend_of_before"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / f"{OLD}.py").write_text(
        "from polyfuse.reference import oracle\nfrom polyfuse.spec import Capability\n"
        f"CAPABILITY = Capability()\n{OLD} = oracle({NEW!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    backend = Backend("before", "numpy", "backend_of_before", implements={OLD: OPS[NEW].version})
    try:
        with pytest.warns(DeprecationWarning, match=RENAMED):
            registry().add(backend)
        q, *_ = polyfuse.gdn_conv_prep(**VALUES, backend="before")
    finally:
        registry.cache_clear()
        polyfuse.refresh()
    np.testing.assert_array_equal(q, polyfuse.gdn_conv_prep(**VALUES).q)
