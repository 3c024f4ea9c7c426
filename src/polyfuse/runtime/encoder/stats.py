"""`EncoderStats`: what an encoder's manager counts."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EncoderStats:
    """What a manager has done since it was made or cleared. Tokens are output tokens."""

    requests: int = 0
    items: int = 0
    replays: Counter[int] = field(default_factory=Counter)  # per budget
    eager_batches: int = 0
    eager_items: int = 0
    tokens: int = 0  # of items that were replayed
    padding: int = 0  # replayed for nothing
    capture_failures: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # of the model, after each of which all graphs were dropped
    capture_seconds: float = 0.0  # with the measuring
    pool_bytes: int = 0
    buffer_bytes: int = 0
    costs: dict[int, float] = field(default_factory=dict)  # seconds of a replay, per captured budget

    @property
    def waste(self) -> float:
        """Padding as a share of all replayed tokens."""
        return self.padding / max(1, self.padding + self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """The counts and `waste` as JSON has them."""
        return asdict(self) | {"replays": dict(self.replays), "changes": dict(self.changes), "waste": self.waste}
