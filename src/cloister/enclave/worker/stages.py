"""What each stage took: told to the user whose answer it is, and counted for the host over many answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.core.protocol.stages import ANSWERING, STARTING, Figures, Histogram, server_timing
from cloister.net.messages import Answer

MANY: Final = 32  # answers that the host learns of together
MAX_LAUNCH: Final = 3600.0  # seconds; what says more isn't the time since this process was started


@dataclass(slots=True, kw_only=True)
class Waits:
    """Seconds that a request waited before its model was there; zeros for a hot one.

    Attributes:
        release: For the keys of a newer statement, or a new lease.
        open: For the sealed model: fetched, checked, decrypted.
        build: For its session.
        wait: For another request that opened and built the same model.
    """

    release: float = 0.0
    open: float = 0.0
    build: float = 0.0
    wait: float = 0.0

    def paid(self) -> dict[str, float]:
        """Those that it waited for."""
        stages = {"release": self.release, "open": self.open, "build": self.build, "wait": self.wait}
        return {name: seconds for name, seconds in stages.items() if seconds > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of the stages that every answer has, and how many requests ran together."""

    decrypt: float
    queue: float
    run: float
    encode: float
    enclave: float
    batch: int


class Ladder:
    """A worker's stages.

    Args:
        steps: When each step of joining ended, in monotonic seconds (`Membership.steps`).
    """

    def __init__(self, steps: Mapping[str, float]) -> None:
        self._steps = steps
        self._began = time.monotonic()
        self._answered = self._joined = False
        self._told: dict[str, Histogram] = {}  # what the host may know
        self._pending = {name: Histogram() for name in ANSWERING}
        self._count = 0  # answers in _pending

    def answered(self, waits: Waits, times: Times) -> bytes:
        """Count an answer; gives its ``server-timing`` field."""
        paid = waits.paid()
        for name, seconds in paid.items():
            if name in STARTING:
                self._now(name, seconds)
        reuse = "warm" if paid else "hot"
        if not self._answered:
            self._answered, reuse, start = True, "cold", self._start()
            paid = {**start, **paid, "release": start.get("release", 0.0) + waits.release}
        pending = self._pending
        pending["decrypt"].observe(times.decrypt)
        pending["queue"].observe(times.queue)
        pending["run"].observe(times.run)
        pending["encode"].observe(times.encode)
        self._count += 1
        stages = {
            "decrypt": times.decrypt,
            **paid,
            "queue": times.queue,
            "run": times.run,
            "encode": times.encode,
            "enclave": times.enclave,
        }
        return server_timing(stages.items(), reuse=reuse, batch=times.batch)

    def encrypted(self, seconds: float) -> None:
        """Count the padding and encryption of an answer, which it can't tell of itself."""
        self._pending["encrypt"].observe(seconds)

    def figures(self) -> Figures:
        """What the host may know now: of answers it learns `MANY` at a time."""
        if not self._joined and (start := self._start()):
            self._joined = True
            for name, seconds in start.items():
                self._now(name, seconds)
        if self._count >= MANY:
            for name, pending in self._pending.items():
                self._told.setdefault(name, Histogram()).add(pending)
            self._pending = {name: Histogram() for name in ANSWERING}
            self._count = 0
        return Figures(age=time.monotonic() - self._began, stages=dict(self._told))

    def answer(self) -> Answer:
        """The same for ``GET /stages``."""
        body = json.dumps(self.figures().to_data()).encode()
        return Answer(content_type=b"application/json", body=body)

    def _now(self, name: str, seconds: float) -> None:
        self._told.setdefault(name, Histogram()).observe(seconds)

    def _start(self) -> dict[str, float]:
        """What it took to get this enclave here; empty before it joined."""
        steps = self._steps
        if "released" not in steps:
            return {}
        return {
            "launch": steps["began"] - steps.get("started", steps["began"]),
            "attest": steps["attested"] - steps["began"],
            "release": steps["released"] - steps["attested"],
        }


def process_started() -> float | None:
    """When this process was started, in monotonic seconds to a hundredth; None where nothing says so."""
    try:
        row = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(row[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.monotonic() - age if 0 <= age <= MAX_LAUNCH else None
