"""Sealing and opening a model piece by piece, as the owner writes it and as a worker reads it.

Beside them, in the same run: AES-256-GCM alone over the same bytes. All of it in memory that is there
already, except where new memory is part of the work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.arguments import positive_int
from benchmarks.report import Report, Rows, Samples
from cloister.core.sealing import CHUNK_SIZE, SealedHeader, Sealing, Section, Unsealer, read_sections, seal
from cloister.core.sealing.header import header_size
from cloister.core.secret import Secret

PIECE: Final = 1 << 20  # bytes that a worker is handed at once
_MODEL: Final = "0" * 64 + "/model"


class _Model:
    """A model to seal, its container, and room to open it in."""

    def __init__(self, size: int) -> None:
        self.weights = memoryview(np.random.default_rng(0).bytes(size))
        self.key = Secret(os.urandom(32))
        sealing = self._sealing()
        self.container = memoryview(b"".join(sealing))
        self.header = sealing.header
        self.room = bytearray(self.header.size)
        self.scratch = bytearray(CHUNK_SIZE + 16)
        self.cipher = AESGCM(os.urandom(32))

    def seal(self) -> None:
        """Make every piece and let it go, as after writing it."""
        for _ in self._sealing():
            pass

    def open_streamed(self) -> None:
        """Open what arrives in pieces, into memory that is there."""
        start = header_size(self.container)
        header = SealedHeader.from_bytes(self.container[:start])
        with Unsealer(self.key, header, digest=self.header.digest, into=self.room) as unsealer:
            for offset in range(start, len(self.container), PIECE):
                unsealer.feed(self.container[offset : offset + PIECE])
            self._require(unsealer.finish()["weights"])

    def open_new(self) -> None:
        """Open a container as a whole, into new memory."""
        self._require(read_sections(self.container, key=self.key, digest=self.header.digest)["weights"])

    def encrypt(self) -> None:
        """AES-256-GCM alone, a chunk at a time."""
        for index, offset in enumerate(range(0, len(self.weights), CHUNK_SIZE)):
            chunk = self.weights[offset : offset + CHUNK_SIZE]
            self.cipher.encrypt_into(
                index.to_bytes(12, "big"), chunk, b"", memoryview(self.scratch)[: len(chunk) + 16]
            )

    def _sealing(self) -> Sealing:
        sections = [Section.of("graph", b"graph"), Section.of("weights", self.weights)]
        return seal(sections, model_id=_MODEL, key=self.key)

    def _require(self, opened: memoryview) -> None:
        if opened[:64] != self.weights[:64]:
            raise SystemExit("the opened model is another one")


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    size = options.mib << 20
    model = _Model(size)
    ways: dict[str, tuple[str, Callable[[], None]]] = {
        "seal": ("seal (digests in a first pass, then encrypts)", model.seal),
        "open_streamed": (f"open, in pieces of {PIECE >> 10} KiB", model.open_streamed),
        "open_new": ("open, whole, into new memory", model.open_new),
        "aes_gcm": ("for comparison: AES-256-GCM alone", model.encrypt),
    }
    times = {name: Samples() for name in ways}
    for count in range(-1, options.runs):
        for name, (_, call) in ways.items():
            start = time.perf_counter()
            call()
            if count >= 0:
                times[name].seconds.append(time.perf_counter() - start)
    speeds = {name: size / samples.ms(0.5) / 1e6 for name, samples in times.items()}
    rows = tuple((ways[name][0], speeds[name], times[name].ms(0.5), times[name].ms(0.99)) for name in ways)
    return Report(
        benchmark="sealing",
        runs=options.runs,
        figures={
            "size_mib": options.mib,
            **{f"{name}_gb_per_s": speed for name, speed in speeds.items()},
            "ratio_seal_p50": times["seal"].ms(0.5) / times["aes_gcm"].ms(0.5),
            "ratio_open_p50": times["open_streamed"].ms(0.5) / times["aes_gcm"].ms(0.5),
        },
        tables=(Rows(title="Sealed models", columns=("what", "GB/s", "p50 ms", "p99 ms"), rows=rows),),
        setting=f"A model of {options.mib} MiB; leaves are hashed in threads of their own.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks sealing", description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=positive_int, default=128, help="size of the weights")
    parser.add_argument("--runs", type=positive_int, default=15)
    return parser
