"""What every file of results says, and how it is written."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polyfuse.conformance import device_name, versions

__all__ = ["Results", "device_name", "write_json"]


@dataclass
class Results:
    """All that one measurement found, with the device, by its own name, and the versions that it was found with."""

    device: str
    versions: Mapping[str, str] = field(default_factory=versions, kw_only=True)

    @property
    def kind(self) -> str:
        """What the file's name begins with, before the device."""
        return ""

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write what there is so far into a JSON file named after the kind and the device; returns its path."""
        return write_json(folder, self.kind, self.device, self.as_dict())


def write_json(folder: Path, prefix: str, device: str, data: object) -> Path:
    """Write data into a JSON file named after the device; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = device.split("(")[-1].rstrip(")").lower().removeprefix("nvidia ").replace(" ", "_")
    path = folder / f"{prefix}{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path
