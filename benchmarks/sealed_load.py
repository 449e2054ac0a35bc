"""Loading a sealed model beside loading its plaintext file, each in a process of its own.

Plain: ONNX Runtime with its defaults and one thread, from a file, and from a file with external data. Sealed:
the worker's own code (`cloister.enclave.worker.loading`) over ciphertext in pieces of 1 MiB. Peak is what
was resident at most (VmHWM) from the start of the process to the end of one inference: a mapped file is
resident only once it was read, and sealed models are in anonymous memory, which always is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import zoo
from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_int
from benchmarks.models import locate, sample
from benchmarks.report import Report, Rows, console, percentile

PIECE: Final = 1 << 20  # bytes, as `HostLink.blob` gives them
_MODEL: Final = "0" * 64 + "/model"
_KEY: Final = bytes(range(32))  # of a model with random weights
_WAYS: Final = {
    "plain": "ONNX Runtime, its file",
    "external": "ONNX Runtime, external data",
    "lean": "ONNX Runtime, external data, no prepacking",
    "sealed": "sealed, in the worker",
}


@dataclass(frozen=True, slots=True)
class _Files:
    """One model in every form; the sealed one with its header's digest in hexadecimal behind it."""

    plain: Path
    external: Path
    sealed: Path
    size: int  # bytes of plaintext

    def argument(self, way: str) -> str:
        """What the child of that way reads."""
        path = {"plain": self.plain, "sealed": self.sealed}.get(way, self.external)
        return str(path)


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sealed-load-") as folder:
        files = _prepare(options.model, Path(folder))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
        for count in range(-1, options.runs):
            console.print(f"round {count + 1} of {options.runs}", style="dim")
            for way, results in found.items():
                result = _child(way, files)
                if count >= 0:
                    results.append(result)
    return _report(options, files, found)


def _report(options: argparse.Namespace, files: _Files, found: dict[str, list[dict[str, float]]]) -> Report:
    def middle(way: str, name: str) -> float:
        return percentile([each[name] for each in found[way]], 0.5)

    speeds = [files.size / each["open_s"] / 1e9 for each in found["sealed"]]
    peaks = {way: middle(way, "peak_mib") for way in _WAYS}
    columns = ("what", "load s", "of it opening s", "peak MiB", "before loading MiB", "run ms")
    names = ("load_s", "open_s", "peak_mib", "base_mib", "run_ms")
    rows = tuple((label, *(middle(way, name) for name in names)) for way, label in _WAYS.items())
    return Report(
        benchmark="sealed-load",
        runs=options.runs,
        figures={
            "model": options.model,
            "size_mb": files.size / 1e6,
            "gb_per_s": percentile(speeds, 0.5),
            "open_gb_per_s": percentile(speeds, 0.5),
            "load_s": middle("sealed", "load_s"),
            "plain_load_s": middle("plain", "load_s"),
            "peak_mib": peaks["sealed"],
            "plain_peak_mib": peaks["plain"],
            "peak_ratio": peaks["sealed"] / peaks["plain"],
            "peak_ratio_external": peaks["sealed"] / peaks["external"],
            "peak_ratio_lean": peaks["sealed"] / peaks["lean"],
        },
        tables=(Rows(title="Loading a model", columns=columns, rows=rows),),
        setting=f"{options.model}, {files.size / 1e6:.0f} MB; a process each, interleaved; medians.",
    )


def _prepare(name: str, folder: Path) -> _Files:
    import onnx

    from cloister.core.sealing import Section, seal
    from cloister.core.secret import Secret
    from cloister.owner.model import load_model

    console.print(f"making {name}", style="dim")
    plain = zoo.save(name, folder) if name in zoo.NAMES else locate(name, folder)
    external = folder / "external.onnx"
    onnx.save_model(
        onnx.load_model(plain),
        external,
        save_as_external_data=True,
        location="external.data",
        size_threshold=1024,
    )
    split = load_model(external)
    sealing = seal(
        [Section.of("graph", split.graph), Section.of("weights", split.weights)],
        model_id=_MODEL,
        key=Secret(_KEY),
    )
    sealed = folder / "model.sealed"
    with sealed.open("wb") as file:
        for piece in sealing:
            file.write(piece)
    sealed.with_suffix(".digest").write_bytes(sealing.header.digest)
    return _Files(plain=plain, external=external, sealed=sealed, size=sealing.header.size)


def _child(way: str, files: _Files) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sealed_load", way, files.argument(way)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the {way} child failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _load_plain(path: Path, *, lean: bool = False) -> tuple[Any, float, float]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - start, 0.0


def _load_sealed(path: Path) -> tuple[Any, float, float]:
    from cloister.core.secret import Secret
    from cloister.enclave.worker.loading import open_sealed
    from cloister.enclave.worker.session import build

    key, digest = Secret(_KEY), path.with_suffix(".digest").read_bytes()
    start = time.perf_counter()
    opened = asyncio.run(open_sealed(_pieces(path), key=key, digest=digest, admit=lambda header: None))
    arrived = time.perf_counter()
    built = build(opened)
    return built.session, time.perf_counter() - start, arrived - start


async def _pieces(path: Path) -> AsyncIterator[memoryview]:
    """The container, each piece in place of the one before, as they come through the link."""
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _measure(way: str, path: Path) -> dict[str, float]:
    """In a child: load, run once, and say what it took."""
    import cloister.enclave.worker.loading
    import cloister.enclave.worker.models  # noqa: F401 - all ways start from the worker's imports

    ways: dict[str, Callable[[Path], tuple[Any, float, float]]] = {
        "plain": _load_plain,
        "external": _load_plain,
        "lean": lambda file: _load_plain(file, lean=True),
        "sealed": _load_sealed,
    }
    base = _status("VmRSS")
    session, load, opening = ways[way](path)
    inputs = sample(session)
    session.run(None, inputs)
    peak = _status("VmHWM")
    start = time.thread_time()
    session.run(None, inputs)
    run_ms = (time.thread_time() - start) * 1e3
    return {"load_s": load, "open_s": opening, "peak_mib": peak, "base_mib": base, "run_ms": run_ms}


def _status(name: str) -> float:
    """A size of this process in MiB, from /proc (proc_pid_status(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this system doesn't tell {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks sealed-load", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=model_name, default="VGG19", help="a name of the zoo, or as `overhead` takes them"
    )
    parser.add_argument("--runs", type=positive_int, default=5)
    return parser


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]))))
