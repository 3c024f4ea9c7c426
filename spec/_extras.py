"""Which extra of polyfuse brings a package, and the errors that say so."""

from importlib.util import find_spec

# By the name that is imported.
EXTRAS = {
    "torch": "torch",
    "triton": "triton",
    "jax": "jax",
    "transformers": "transformers",
    "skimage": "transformers",
    "PIL": "transformers",
    "matplotlib": "plots",
}


def how_to_install(module: str) -> str:
    """`"jax is not installed: pip install 'polyfuse[jax]'"`; without a command for a package that no extra brings."""
    package = module.partition(".")[0]
    said = f"{package} is not installed"
    return f"{said}: pip install 'polyfuse[{EXTRAS[package]}]'" if package in EXTRAS else said


def not_installed(user: str, *modules: str) -> ModuleNotFoundError | None:
    """The error to raise where `user` needs modules of which one is not installed; None if they all are."""
    for module in modules:
        if find_spec(module) is None:
            return ModuleNotFoundError(f"{user}: {how_to_install(module)}", name=module)
    return None
