"""Sealing and opening a model, in memory: as the owner writes it, as a worker reads it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from benchmarks.report import Report, Rows, Samples
from cloister.core.sealing import Section, Unsealer, read_sections, seal
from cloister.core.secret import Secret

PIECE: Final = 1 << 20  # bytes that a worker is handed at once
_MODEL: Final = "0" * 64 + "/model"


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    size = options.mib << 20
    weights = np.random.default_rng(0).bytes(size)
    key = Secret(os.urandom(32))
    copied, sealed, streamed, whole = Samples(), Samples(), Samples(), Samples()
    for count in range(-1, options.runs):
        start = time.perf_counter()
        bytearray(weights)
        copy_end = time.perf_counter()
        sealing = seal(
            [Section.of("graph", b"graph"), Section.of("weights", weights)], model_id=_MODEL, key=key
        )
        pieces = list(sealing)
        seal_end = time.perf_counter()
        header, digest = sealing.header, sealing.header.digest
        container = b"".join(pieces)
        ciphertext = memoryview(container)[header.container_size - sum(map(len, pieces[1:])) :]
        stream_start = time.perf_counter()
        unsealer = Unsealer(key, header, digest=digest)
        for offset in range(0, len(ciphertext), PIECE):
            unsealer.feed(ciphertext[offset : offset + PIECE])
        unsealer.finish()
        stream_end = time.perf_counter()
        opened = read_sections(container, key=key, digest=digest)
        end = time.perf_counter()
        if opened["weights"] != weights:
            raise SystemExit("the opened model is another one")
        if count >= 0:
            copied.seconds.append(copy_end - start)
            sealed.seconds.append(seal_end - copy_end)
            streamed.seconds.append(stream_end - stream_start)
            whole.seconds.append(end - stream_end)
    ways = {"seal": sealed, "open_streamed": streamed, "open_whole": whole, "copy": copied}
    speeds = {name: size / samples.ms(0.5) / 1e6 for name, samples in ways.items()}
    labels = {
        "seal": "seal",
        "open_streamed": f"open, in pieces of {PIECE >> 10} KiB",
        "open_whole": "open, whole",
        "copy": "for comparison: copy in memory",
    }
    rows = tuple(
        (labels[name], speeds[name], samples.ms(0.5), samples.ms(0.99)) for name, samples in ways.items()
    )
    return Report(
        benchmark="sealing",
        runs=options.runs,
        figures={
            "size_mib": options.mib,
            **{f"{name}_gb_per_s": speed for name, speed in speeds.items()},
            "ratio_seal_p50": sealed.ms(0.5) / copied.ms(0.5),
            "ratio_open_p50": streamed.ms(0.5) / copied.ms(0.5),
        },
        tables=(
            Rows(
                title=f"A model of {options.mib} MiB on one core",
                columns=("what", "GB/s", "p50 ms", "p99 ms"),
                rows=rows,
            ),
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks sealing", description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=128, help="size of the weights")
    parser.add_argument("--runs", type=int, default=15)
    return parser
