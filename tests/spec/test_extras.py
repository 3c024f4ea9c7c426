"""What is not installed is named with the extra that brings it, and the extra does bring it."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from polyfuse.spec import EXTRAS, how_to_install, not_installed

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def distributions(extra):
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in PROJECT[extra]}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_the_extra_brings_the_package(module, extra):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    assert distributions(extra) & {name.lower() for name in packages_distributions()[module]}


def test_all_is_every_extra_of_users():
    (everything,) = PROJECT["all"]
    assert everything == f"polyfuse[{','.join(dict.fromkeys(['torch', 'triton', 'jax', 'transformers', 'plots']))}]"
    assert set(EXTRAS.values()) == {"torch", "triton", "jax", "transformers", "plots"}


def test_the_install_page_says_what_each_extra_brings():
    page = (ROOT / "docs/install.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE))
    assert rows.pop("all") == "all of the above"
    assert {name: set(brings.split(", ")) for name, brings in rows.items()} == {
        name: distributions(name) for name in set(EXTRAS.values())
    }


def test_a_hint_names_the_extra_or_no_command():
    assert how_to_install("skimage.data") == "skimage is not installed: pip install 'polyfuse[transformers]'"
    assert how_to_install("no_such_thing") == "no_such_thing is not installed"
    error = not_installed("a command", "re", "no_such_thing", "neither")
    assert (str(error), error.name) == ("a command: no_such_thing is not installed", "no_such_thing")
    assert not_installed("a command", "re") is None


@pytest.mark.parametrize(
    ("code", "missing", "message"),
    [
        (
            "import polyfuse.integrations.transformers",
            "transformers",
            "transformers is not installed: pip install 'polyfuse[transformers]'",
        ),
        ("import polyfuse.runtime", "torch", "polyfuse.runtime: torch is not installed: pip install 'polyfuse[torch]'"),
        ("import polyfuse.torch_ops", "torch", "torch is not installed: pip install 'polyfuse[torch]'"),
        ("import polyfuse.unfused", "torch", "torch is not installed: pip install 'polyfuse[torch]'"),
        ("import polyfuse.compat.vllm", "torch", "torch is not installed: pip install 'polyfuse[torch]'"),
        ("import polyfuse.compat.sglang", "torch", "torch is not installed: pip install 'polyfuse[torch]'"),
        (
            "import polyfuse; polyfuse.warmup('qwen3_vl_8b')",
            "torch",
            "polyfuse.warmup: torch is not installed: pip install 'polyfuse[torch]'",
        ),
        (
            "import numpy as np; from polyfuse.conformance import place; place({'x': np.ones(1)}, 'torch', 'cpu')",
            "torch",
            "torch arrays: torch is not installed: pip install 'polyfuse[torch]'",
        ),
        (
            "import numpy as np; from polyfuse.conformance import place; place({'x': np.ones(1)}, 'jax', 'cpu')",
            "jax",
            "jax arrays: jax is not installed: pip install 'polyfuse[jax]'",
        ),
        (
            "from polyfuse.conformance import run; run(['gated_rms_norm'], ['torch'], device='cuda')",
            "torch",
            "got 'cuda' (torch is not installed: pip install 'polyfuse[torch]')",
        ),
        (
            "import numpy as np, polyfuse; polyfuse.silu_mul_block_quant(np.ones((1, 256), 'f4'), backend='jax')",
            "jax",
            "jax is not installed: pip install 'polyfuse[jax]'",
        ),
    ],
)
def test_what_needs_an_extra_says_so(code, missing, message):
    hide = "import importlib.util as u; f = u.find_spec\n"
    hide += f"u.find_spec = lambda name, *a: None if name == {missing!r} else f(name, *a)\n"
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
