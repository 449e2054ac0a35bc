"""The stages of the reuse ladder, and how many times each took how long: what a worker tells its host.

A *cold* answer is the first one of an enclave's life, a *warm* one waited for keys or for its model to be
opened and built, a *hot* one for neither. Users find their own answer's stages in it. The host gets counts in
coarse buckets alone, over all models and users of a worker (docs/threat-model.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cloister.errors import FormatError

REUSE: Final = ("cold", "warm", "hot")
# What the host takes part in anyway, and may know of each time; then what it may know of many requests only.
STARTING: Final = ("start", "launch", "attest", "release", "open", "build")
ANSWERING: Final = ("decrypt", "queue", "run", "encode", "encrypt")
STAGES: Final = STARTING + ANSWERING
# Upper bounds of all buckets but the last, in seconds.
BOUNDS: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MAX_COUNT: Final = 2**53  # what JSON's numbers hold exactly


@dataclass(slots=True)
class Histogram:
    """How many times something took how long.

    Attributes:
        counts: One for each of `BOUNDS`, and one beyond the last.
        seconds: Their sum.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def add(self, other: Histogram) -> None:
        """Count all that another counted."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds

    def since(self, before: Histogram) -> Histogram:
        """What was counted after ``before``; all of it where this began anew in between."""
        counts = [now - then for now, then in zip(self.counts, before.counts, strict=True)]
        if min(counts) < 0 or self.seconds < before.seconds:
            return Histogram(list(self.counts), self.seconds)
        return Histogram(counts, self.seconds - before.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A worker's histograms by stage.

    Attributes:
        age: Seconds since they began.
        stages: Those of `STAGES` that were counted.
    """

    age: float
    stages: Mapping[str, Histogram]

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        stages = {name: [*each.counts, round(each.seconds, 6)] for name, each in self.stages.items()}
        return {"age_s": round(self.age, 3), "stages": stages}

    @classmethod
    def from_data(cls, data: Any) -> Figures:
        """Read what `to_data` gave; raises FormatError."""
        match data:
            case {"age_s": int() | float() as age, "stages": dict(stages), **rest} if not rest:
                if 0 <= age <= MAX_COUNT and stages.keys() <= set(STAGES):
                    found = {name: _histogram(each) for name, each in stages.items()}
                    return cls(age=float(age), stages=found)
        raise _format()


def _histogram(data: Any) -> Histogram:
    if not isinstance(data, list) or len(data) != len(BOUNDS) + 2:
        raise _format()
    *counts, seconds = data
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        raise _format()
    if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_COUNT:
        raise _format()
    return Histogram(counts, float(seconds))


def _format() -> FormatError:
    return FormatError(
        "not a worker's stages", code="format.stages", claim="stages", expected="counts by stage and bucket"
    )


def server_timing(stages: Iterable[tuple[str, float]], *, reuse: str, batch: int) -> bytes:
    """A ``server-timing`` field (W3C Server Timing): milliseconds of stages, the ladder's step, the batch."""
    parts = [f"{name};dur={seconds * 1e3:.3f}" for name, seconds in stages]
    return ", ".join([*parts, f"reuse;desc={reuse}", f"batch;desc={batch}"]).encode()
