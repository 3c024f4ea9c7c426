"""Print constraints for the oldest or the newest frameworks that pyproject.toml allows: `constraints_of.py oldest`."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "triton", "jax", "transformers")


def constraints(which: str) -> list[str]:
    """`oldest`: each framework's lower bound; `newest`: none, so that pip takes the newest that fit together."""
    if which == "newest":
        return []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = {}
    for requirement in (text for name in FRAMEWORKS for text in extras[name]):
        match = re.match(r"(\w+)>=([\d.]+)", requirement)
        if match and match[1] in FRAMEWORKS:
            bounds[match[1]] = match[2]
    return [f"{name}=={bounds[name]}.*" for name in FRAMEWORKS]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
