"""Time of a vision encoder, untouched and in graphs: what `polyfuse bench encoder` measures.

A latency is the wall time of one call with the device idle before and after it. Weights and pixels are random.
"""

from dataclasses import dataclass, field

from polyfuse.bench.encoder.tower import TowerRow
from polyfuse.bench.encoder.trace import TraceRow
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.subjects.vision import VisionModel


@dataclass
class EncoderBench(Results):
    """All that was measured of a vision encoder. `parallel` is one rank and then all `ranks`."""

    model: str
    dtype: str
    depth: int
    ranks: int = 1
    tower: list[TowerRow] = field(default_factory=list)
    trace: list[TraceRow] = field(default_factory=list)
    parallel: list[TraceRow] = field(default_factory=list)

    @classmethod
    def of(cls, subject: VisionModel, ranks: int = 1) -> "EncoderBench":
        """The results of a model of which nothing has been measured yet."""
        return cls(device_name(subject.device), subject.name, subject.dtype_name, subject.depth, ranks)

    @property
    def kind(self) -> str:
        return "encoder_" if self.ranks == 1 else f"encoder_{self.ranks}x_"
