"""Options that several commands have, and the checks of what is given for them."""

from collections.abc import Sequence
from pathlib import Path

import click

from polyfuse.configs import model_names
from polyfuse.spec import OPS, canonical

ops_option = click.option(
    "--op", "op_names", multiple=True, help=f"An op; repeat for several. Default: all. One of {', '.join(OPS)}."
)
CONFIGURED = f"One of {', '.join(model_names())}."
backends_option = click.option(
    "--backend",
    "backends",
    multiple=True,
    help="A backend: numpy, jax, pallas, torch, triton, or one of a package; repeat for several. Default: all.",
)
family_option = click.option(
    "--family",
    type=click.Choice(["torch", "jax", "numpy"]),
    default="torch",
    show_default=True,
    help="Kind of arrays.",
)
device_option = click.option("--device", default=None, help="cpu, cuda, ...; the accelerator if there is one.")
tiny_option = click.option("--tiny", is_flag=True, help="Take a tiny model instead of the real one.")
out_option = click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON file.")
vision_model_option = click.option(
    "--model",
    type=click.Choice(["qwen3_vl", "qwen3_5", "qwen2_5_vl", "siglip"]),
    default="qwen3_vl",
    show_default=True,
    help="Its weights are random.",
)


def known_ops(names: Sequence[str]) -> tuple[str, ...]:
    """The ops by the names that they have now. Raises `SpecError` for a name that is no op's."""
    return tuple(canonical(name) for name in names)


def check_backends(names: Sequence[str]) -> list[str]:
    """The array family of each named backend. Raises `BackendError` for a name that is no backend's."""
    from polyfuse.dispatch import registry

    return [registry().get(name).family for name in names]
