"""What is generated and committed is what `make generate` would write now."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    found = spec_from_file_location("generate", ROOT / "scripts/generate.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


GENERATED = load_script().generated()


@pytest.mark.parametrize("path", GENERATED, ids=str)
def test_the_file_is_up_to_date(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == GENERATED[path], f"{path}: run `make generate`"
