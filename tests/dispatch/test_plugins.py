"""Backends of other packages, found through the entry-point group, in an interpreter of their own."""

import sys
import textwrap
from types import ModuleType

import pytest

from polyfuse import BackendError
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS
from tests import forked

GOOD = """
    from polyfuse.dispatch import Backend
    print("loaded", __name__)
    BACKEND = Backend("mychip", "torch", "mychip", implements={"pos_embed_interpolate": 2, "gdn_post_conv": 99})
"""
KERNEL = """
    import torch
    from polyfuse.spec import Capability
    CAPABILITY = Capability(attrs={"mode": ("bilinear",)})
    def pos_embed_interpolate(table, grid_thw, **options):
        return torch.full((4, table.shape[1]), 7.0)
"""


@pytest.fixture
def install(tmp_path):
    """Write packages with entry points into a folder, as an installer lays them out; run code that sees them."""

    def write(package, entry, files):
        (tmp_path / package).mkdir()
        for name, text in files.items():
            (tmp_path / package / name).write_text(textwrap.dedent(text))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[polyfuse.backends]\n{entry}\n")

    def run(code):
        return forked.run("import polyfuse, torch\n" + textwrap.dedent(code), tmp_path)

    run.write = write
    return run


CALL = "polyfuse.pos_embed_interpolate(torch.ones(4, 8), [[1, 2, 2]], backend='mychip', "


def test_a_plugin_is_metadata_until_it_is_asked_for(install):
    install.write("mychip", "mychip = mychip:BACKEND", {"__init__.py": GOOD, "pos_embed_interpolate.py": KERNEL})
    out = install(
        f"""
        polyfuse.pos_embed_interpolate(torch.ones(4, 8), [[1, 2, 2]])
        print("before")
        print({CALL}mode="bilinear")[0, 0].item())
        for call in (lambda: {CALL}mode="bicubic"), lambda: polyfuse.gdn_post_conv(torch.ones(1, 3), torch.ones(1, 1),
                     torch.ones(1, 1), torch.ones(1), torch.ones(1), num_k_heads=1, head_k_dim=1, head_v_dim=1,
                     backend="mychip")):
            try:
                call()
            except (polyfuse.Unsupported, polyfuse.BackendError) as error:
                print(type(error).__name__, error)
        """
    )
    lines = out.splitlines()
    assert lines[:3] == ["before", "loaded mychip", "7.0"]
    assert lines[3].startswith("Unsupported pos_embed_interpolate: no backend of [mychip] (backend= on the call)")
    assert lines[4].endswith("mychip: implements version 99 of gdn_post_conv, this is version 2")


def test_a_broken_plugin_breaks_only_itself(install):
    install.write("bad", "mychip = bad:BACKEND", {"__init__.py": "raise OSError('no driver')"})
    install.write("thief", "triton = thief:BACKEND", {"__init__.py": "from mychip2 import BACKEND"})
    out = install(
        f"""
        print(polyfuse.pos_embed_interpolate(torch.ones(4, 8), [[1, 2, 2]])[0, 0].item())
        try:
            {CALL})
        except polyfuse.BackendError as error:
            print(error)
        from polyfuse.cli import main
        main(["info"], standalone_mode=False)
        """
    )
    assert out.splitlines()[0] == "1.0"
    assert "backend 'mychip': OSError: no driver" in out
    assert "backend mychip cannot be used: Traceback" in out
    assert "backend triton cannot be used: Traceback" in out
    assert "  triton" in out


def test_two_plugins_of_one_name_are_both_named(install):
    for package in ("one", "two"):
        install.write(package, f"mychip = {package}:BACKEND", {"__init__.py": "BACKEND = None"})
    out = install("from polyfuse.cli import main; main(['info'], standalone_mode=False)")
    assert "two installed packages provide it: one:BACKEND and two:BACKEND" in out


def test_a_broken_plugin_and_two_of_one_name_leave_everything_else_working(install):
    for package in ("one", "two"):
        install.write(package, f"mychip = {package}:BACKEND", {"__init__.py": "BACKEND = None"})
    install.write("bad", "bad = bad:BACKEND", {"__init__.py": "raise OSError('no driver')"})
    out = install(
        """
        print(polyfuse.pos_embed_interpolate(torch.ones(4, 8), [[1, 2, 2]])[0, 0].item())
        from polyfuse.cli import main; main(['info'], standalone_mode=False)
        """
    )
    assert out.splitlines()[0] == "1.0"
    assert "backend mychip cannot be used: two installed packages provide it: one:BACKEND and two:BACKEND" in out
    assert "backend bad cannot be used: Traceback" in out
    assert "OSError: no driver" in out
    assert " ".join(out.split()).count("numpy jax pallas torch triton") == 1


@pytest.mark.parametrize(
    ("init", "kernel", "error"),
    [
        (GOOD, KERNEL + "    def\n", "SyntaxError: invalid syntax"),
        pytest.param(
            GOOD,
            "import no_such_module",
            "ModuleNotFoundError: No module named 'no_such_module'",
            marks=pytest.mark.slow,
        ),
        (GOOD, "", "AttributeError: module 'mychip.pos_embed_interpolate' has no attribute 'pos_embed_interpolate'"),
        pytest.param(
            GOOD,
            KERNEL + "    CAPABILITY = {}\n",
            "expected a polyfuse.spec.Capability, got a dict",
            marks=pytest.mark.slow,
        ),
        (GOOD + "    def unavailable():\n        return 1 / 0\n", KERNEL, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_op_is_shown_with_its_traceback(install, init, kernel, error):
    install.write("mychip", "mychip = mychip:BACKEND", {"__init__.py": init, "pos_embed_interpolate.py": kernel})
    out = install("from polyfuse.cli import main; main(['info'], standalone_mode=False)")
    _, shown = out.split("backend mychip cannot run pos_embed_interpolate: Traceback (most recent call last):")
    assert error in " ".join(shown.split())


def test_an_unavailable_that_raises_is_the_backends_error(monkeypatch):
    module = ModuleType("mychip")
    module.unavailable = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "mychip", module)
    backend = Backend("mychip", "numpy", "mychip", implements={"gdn_in_proj": OPS["gdn_in_proj"].version})
    with pytest.raises(BackendError, match=r"mychip: unavailable\(\) failed: ZeroDivisionError: division by zero"):
        backend.missing("gdn_in_proj")


def test_an_op_that_does_not_exist_is_an_error(install):
    init = GOOD.replace('"pos_embed_interpolate"', '"pos_embed"')
    install.write("mychip", "mychip = mychip:BACKEND", {"__init__.py": init, "pos_embed_interpolate.py": KERNEL})
    out = install(
        f"""
        try:
            {CALL})
        except polyfuse.BackendError as error:
            print(error)
        from polyfuse.cli import main
        main(["info"], standalone_mode=False)
        """
    )
    called, shown = " ".join(out.split()).split("backend mychip cannot be used: Traceback")
    for text in called, shown:
        assert f"backend 'mychip': implements: expected ops of {', '.join(OPS)}, got pos_embed" in text


def test_a_taken_name_needs_override():
    with pytest.raises(BackendError, match=r"backend 'torch' \(mine\) exists already \(built in\); try override=True"):
        registry().add(Backend("torch", "torch", "mine"))


def test_a_capability_that_does_not_speak_of_its_op_is_an_error(install):
    kernel = KERNEL.replace('"mode": ("bilinear",)', '"modus": ("bilinear",)')
    install.write("mychip", "mychip = mychip:BACKEND", {"__init__.py": GOOD, "pos_embed_interpolate.py": kernel})
    out = install(
        f"""
        try:
            {CALL}mode="bilinear")
        except polyfuse.BackendError as error:
            print(error)
        """
    )
    assert "mychip: pos_embed_interpolate: CAPABILITY: attrs: expected one of merge_size, mode" in out


def test_an_op_without_a_module_is_not_implemented(install):
    install.write("mychip", "mychip = mychip:BACKEND", {"__init__.py": GOOD, "gdn_post_conv.py": ""})
    out = install(
        """
        from polyfuse.dispatch import registry
        backend = registry().get("mychip")
        print(backend.missing("pos_embed_interpolate"), backend.missing("gdn_in_proj"), sep="\\n")
        """
    )
    assert "does not implement pos_embed_interpolate: there is no module mychip.pos_embed_interpolate" in out
    assert "('not_implemented', 'does not implement gdn_in_proj')" in out
