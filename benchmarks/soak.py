"""Requests of mixed models and users while workers are killed and started: is every answer right?

Each request has a random input of its own, whose answer bare ONNX Runtime computed here. An answer that
isn't that one is wrong; where it is that of another request in flight, it was swapped. A request that the
service refuses, which it may do while workers are missing, is asked again until it is answered. What is
killed, always with SIGKILL, takes turns: an enclave, a launcher with its enclave, all enclaves at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from benchmarks.arguments import positive_float, positive_int
from benchmarks.models import Array, bare_session, locate
from benchmarks.processes import family
from benchmarks.report import Report, Rows, Samples, verdict
from benchmarks.scene import Scene, scene
from cloister import AsyncClient, Identity
from cloister.cli.pool import registered
from cloister.core.protocol.flow import Outgoing
from cloister.errors import CloisterError, Unavailable
from cloister.net.loop import run as run_loop
from cloister.net.messages import Answer
from cloister.party.carry import AsyncCarrier

MODELS: Final = ("digits", "diagnosis", "synthetic")
USERS: Final = 4
WORKERS: Final = 2
ROWS: Final = 4  # most rows of one input, where the model leaves that open
PATIENCE: Final = 120.0  # seconds for one request, refusals included
PAUSE: Final = 0.1  # seconds before a refused request is asked again
_KILLED: Final = ("enclave", "launcher and enclave", "all enclaves at once")  # in turn
_BACK: Final = 60.0  # seconds for a killed worker to serve again


@dataclass(slots=True)
class Tally:
    """What was counted.

    Attributes:
        right: Answers that are those of bare ONNX Runtime.
        wrong: Answers that aren't, swapped ones included.
        swapped: Answers that belong to another request that was in flight.
        lost: Requests that were never answered, by the code of their last error.
        refusals: Errors after all of the client's own attempts, by code.
        failures: Errors that no missing worker explains, by code.
        sent: Encapsulated requests that left the clients; all beyond one for each request are retries.
        kills: What was killed, how often.
        times: Of each request, from its first attempt to its answer.
    """

    right: int = 0
    wrong: int = 0
    swapped: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    times: Samples = field(default_factory=Samples)


class _Counted(AsyncCarrier):
    """Counts encapsulated requests that leave."""

    def __init__(self, url: str, tally: Tally) -> None:
        super().__init__(url)
        self._tally = tally

    async def send(self, outgoing: Outgoing, until: float = math.inf) -> Answer:
        self._tally.sent += any(name == b"cloister-pool" for name, _ in outgoing.fields)
        return await super().send(outgoing, until)


class _Plain:
    """A model in bare ONNX Runtime: random inputs and their answers."""

    def __init__(self, path: Path, seed: int) -> None:
        self._session: ort.InferenceSession = bare_session(path)
        self._random = np.random.default_rng(seed)
        self._names = [output.name for output in self._session.get_outputs()]

    def question(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """A random input, and its answer."""
        inputs: dict[str, Array] = {}
        rows = int(self._random.integers(1, ROWS + 1))
        for spec in self._session.get_inputs():
            shape = [side if isinstance(side, int) and side > 0 else rows for side in spec.shape]
            inputs[spec.name] = self._random.random(shape, dtype=np.float32)
        return inputs, dict(zip(self._names, self._session.run(self._names, inputs), strict=True))


class _Soak:
    """The requests and the killing.

    Args:
        made: The service.
        models: Id -> the same model in bare ONNX Runtime.
        options: Of the command line.
    """

    def __init__(self, made: Scene, models: dict[str, _Plain], options: argparse.Namespace) -> None:
        self.tally = Tally()
        self._made = made
        self._models = models
        self._left = int(options.runs)
        self._clients = int(options.clients)
        self._every = float(options.kill_every)
        self._in_flight: dict[int, dict[str, Array]] = {}

    async def run(self) -> None:
        """Ask until every request was asked, and kill meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for file in self._made.identities:
                client = AsyncClient(self._made.url, policy=self._made.policy, identity=Identity.load(file))
                await client.aclose()
                client._carrier = _Counted(self._made.url, self.tally)
                clients.append(await stack.enter_async_context(client))
                await client.verify()
            self.tally.sent = 0
            killing = asyncio.create_task(self._kill())
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(self._clients):
                        group.create_task(self._ask_on(clients[number % len(clients)]))
            finally:
                killing.cancel()
                await asyncio.wait([killing])
                if not killing.cancelled():
                    killing.result()

    async def _ask_on(self, client: AsyncClient) -> None:
        names = list(self._models)
        while self._left > 0:
            self._left -= 1
            model = names[self._left % len(names)]
            inputs, expected = self._models[model].question()
            key = self._left
            self._in_flight[key] = expected
            start = time.monotonic()
            try:
                outputs = await self._answer(client, model, inputs)
            except CloisterError as error:
                self.tally.lost[error.code] += 1
            else:
                self.tally.times.seconds.append(time.monotonic() - start)
                self._judge(key, outputs)
            finally:
                del self._in_flight[key]

    async def _answer(self, client: AsyncClient, model: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """Ask until there is an answer; raises the last refusal once `PATIENCE` is over."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return await client.infer(model, inputs)
            except CloisterError as error:
                self.tally.refusals[error.code] += 1
                if not isinstance(error, Unavailable):
                    self.tally.failures[error.code] += 1
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(PAUSE)

    def _judge(self, key: int, outputs: dict[str, Array]) -> None:
        if _same(outputs, self._in_flight[key]):
            self.tally.right += 1
            return
        self.tally.wrong += 1
        self.tally.swapped += any(_same(outputs, other) for other in self._in_flight.values())

    async def _kill(self) -> None:
        """Kill workers, each time once all of them serve again."""
        for turn in itertools.count():
            await asyncio.sleep(self._every)
            name = f"worker-{1 + turn // len(_KILLED) % WORKERS}"
            match _KILLED[turn % len(_KILLED)]:
                case "enclave":
                    killed = [name]
                    self._kill_enclave(name)
                case "launcher and enclave":
                    killed = [name]
                    await asyncio.to_thread(self._kill_launcher, name)
                case _:
                    killed = [f"worker-{number}" for number in range(1, WORKERS + 1)]
                    for each in killed:
                        self._kill_enclave(each)
            self.tally.kills[_KILLED[turn % len(_KILLED)]] += 1
            since = time.monotonic()
            for each in killed:
                await asyncio.to_thread(self._until_back, each, since)

    def _kill_enclave(self, name: str) -> None:
        """Its launcher starts another."""
        launcher = self._made.service.processes[name].pid
        for pid in family(launcher):
            if pid != launcher:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill_launcher(self, name: str) -> None:
        """The enclave dies with it; start both anew, as `cloister up` would."""
        process = self._made.service.processes[name]
        process.kill()
        process.wait()
        self._made.service.revive()

    def _until_back(self, name: str, since: float) -> None:
        """Wait until the gateway knows the worker anew."""
        while time.monotonic() < since + _BACK:
            for worker in registered(self._made.service.site):
                if worker["id"] == name and time.monotonic() - float(worker["age_s"]) > since:
                    return
            time.sleep(0.1)
        raise SystemExit(f"{name} did not come back")


def _same(outputs: dict[str, Array], expected: dict[str, Array]) -> bool:
    return outputs.keys() == expected.keys() and all(
        np.array_equal(outputs[name], value) for name, value in expected.items()
    )


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as folder:
        paths = {name: locate(name, Path(folder)) for name in MODELS}
        first, *others = MODELS
        with scene(paths[first], workers=WORKERS, users=USERS) as made:
            models = {made.model: _Plain(paths[first], 1)}
            for seed, name in enumerate(others, start=2):
                models[made.publish(name, paths[name])] = _Plain(paths[name], seed)
            soak = _Soak(made, models, options)
            start = time.monotonic()
            run_loop(soak.run())
            seconds = time.monotonic() - start
    return _report(options, soak.tally, seconds)


def _report(options: argparse.Namespace, tally: Tally, seconds: float) -> Report:
    lost, killed = tally.lost.total(), tally.kills.total()
    refused, failed = tally.refusals.total(), tally.failures.total()
    attempts = options.runs + refused
    checks = (
        ("wrong answers, swapped ones among them", tally.wrong, tally.wrong == 0),
        ("swapped answers", tally.swapped, tally.swapped == 0),
        ("requests never answered", lost, lost == 0),
        ("errors that no missing worker explains", failed, failed == 0),
    )
    counted = (
        ("right answers", tally.right),
        *((f"kills: {what}", tally.kills[what]) for what in _KILLED),
        ("attempts that the client made again by itself", max(0, tally.sent - attempts)),
        ("refusals after that, asked again", refused),
    )
    figures: dict[str, Any] = {
        "right": tally.right,
        "wrong": tally.wrong,
        "swapped": tally.swapped,
        "lost": lost,
        "failures": dict(tally.failures),
        "kills": killed,
        "retries": max(0, tally.sent - attempts),
        "refusals": dict(tally.refusals),
        "seconds": seconds,
        "request_ms_p50": tally.times.ms(0.5),
        "request_ms_p99": tally.times.ms(0.99),
        "met": all(met for *_, met in checks) and tally.right == options.runs,
    }
    return Report(
        benchmark="chaos",
        runs=options.runs,
        figures=figures,
        tables=(
            Rows(title="Counted", columns=("what", "how many"), rows=counted),
            Rows(
                title="What must hold",
                columns=("what", "found", "bar"),
                rows=tuple((what, value, verdict(met, "0")) for what, value, met in checks),
            ),
        ),
        setting=(
            f"{options.runs:,} requests of {USERS} users to the models {', '.join(MODELS)}, "
            f"{options.clients} at once, in {seconds:.0f} s; {WORKERS} workers, killed again "
            f"{options.kill_every:g} s after all of them serve."
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive_int, default=10_000, help="requests")
    parser.add_argument("--clients", type=positive_int, default=16, help="requests at once")
    parser.add_argument(
        "--kill-every", type=positive_float, default=3.0, help="seconds that all are left alone"
    )
    return parser
