"""The reuse ladder: cold (no enclave), warm (an enclave without the model), hot, each by stage.

Cold begins where the worker's launcher is started and ends with the answer: the enclave is launched,
attested, given its keys, registered at the gateway; it opens the sealed model, builds the session, runs it.
Warm is the first request for a version just published. All processes read the same monotonic clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_int
from benchmarks.load import question
from benchmarks.models import Array, locate
from benchmarks.processes import family, started
from benchmarks.report import Report, Rows, percentile, verdict
from benchmarks.scene import NAME, Scene, scene
from cloister import Client
from cloister.cli.pool import registered

BAR: Final = 20.0  # a cold request takes at least that many times as long as a hot one
WORKER: Final = "worker-1"
HOT: Final = 20  # hot requests after each other one
_LOOK: Final = 0.01  # seconds between looks whether the worker is there
_PATIENCE: Final = 60.0  # seconds for it to be there
STAGES: Final = {
    "launcher": "launcher: started, enclave measured and confined",
    "launch": "enclave: started, its libraries loaded",
    "challenge": "service document verified, challenge fetched",
    "attest": "evidence collected",
    "release": "evidence verified by the key service, keys released; warm: waiting for a renewal",
    "register": "launcher sees the enclave answer, gateway knows it",
    "open": "sealed model fetched, checked, decrypted",
    "build": "session built",
    "decrypt": "request decrypted",
    "queue": "waiting for a thread",
    "run": "ONNX Runtime",
    "encode": "outputs encoded",
    "rest": "client, gateway, authorization, encryption of the answer",
}
_TOLD: Final = ("open", "build", "decrypt", "queue", "run", "encode")  # by the enclave, in its answer
_KINDS: Final = ("cold", "warm", "hot")

Times = dict[str, float]  # stage -> seconds


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as folder:
        model = locate(options.model, Path(folder))
        with scene(model) as made, made.client() as client:
            asked = _Asked(client, made.model, model)
            found: dict[str, list[Times]] = {kind: [] for kind in _KINDS}
            for _ in range(options.runs):
                steps = _restart(made)
                found["cold"].append({**steps, **asked.once("cold")})
                found["hot"] += [asked.once("hot") for _ in range(HOT)]
                made.publish(NAME, model)
                client.verify()
                found["warm"].append(asked.once("warm"))
                found["hot"] += [asked.once("hot") for _ in range(HOT)]
    return _report(options, found)


class _Asked:
    """A client that asks the same question again and again, and wants the right answer."""

    def __init__(self, client: Client, model: str, plain: Path) -> None:
        self._client = client
        self._model = model
        self._inputs: dict[str, Array]
        self._inputs, self._expected = question(plain)
        client.verify()

    def once(self, kind: str) -> Times:
        """Ask; raises SystemExit for a wrong answer, and for one of another kind."""
        start = time.monotonic()
        outputs = self._client.infer(self._model, self._inputs)
        seconds = time.monotonic() - start
        if any(not np.array_equal(outputs[name], value) for name, value in self._expected.items()):
            raise SystemExit("the confidential path gave another answer")
        record = self._client.record
        if record.reuse != kind or ("open" in record.stages) != (kind != "hot"):
            raise SystemExit(f"not a {kind} answer: {record.reuse}, {record.stages}")
        # What a cold answer says of the start is in the steps already.
        names = (*_TOLD, "release") if kind == "warm" else _TOLD
        told = {name: record.stages.get(name, 0.0) / 1e3 for name in names}
        return {**told, "rest": seconds - sum(told.values())}


def _restart(made: Scene) -> Times:
    """End the worker and its launcher, start them anew; gives the stages until the gateway knows it."""
    process = made.service.processes[WORKER]
    process.terminate()
    process.wait(20)
    began = time.monotonic()
    made.start_worker(WORKER)
    socket, known = _registration(made, began)
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://enclave") as enclave:
        steps = enclave.get("/healthz").json()["steps"]
    launched = max(started(pid) for pid in family(made.service.processes[WORKER].pid))
    return {
        "launcher": launched - began,
        "launch": steps["began"] - launched,
        "challenge": steps["challenged"] - steps["began"],
        "attest": steps["attested"] - steps["challenged"],
        "release": steps["released"] - steps["attested"],
        "register": known - steps["released"],
    }


def _registration(made: Scene, began: float) -> tuple[str, float]:
    """Socket of the worker started at ``began``, and when the gateway learned of it (monotonic seconds)."""
    while time.monotonic() < began + _PATIENCE:
        for worker in registered(made.service.site):
            known = time.monotonic() - float(worker["age_s"])
            if worker["id"] == WORKER and known > began:
                return worker["socket"], known
        time.sleep(_LOOK)
    raise SystemExit("the worker did not come back")


def _report(options: argparse.Namespace, found: dict[str, list[Times]]) -> Report:
    whole = {kind: percentile([sum(times.values()) for times in each], 0.5) for kind, each in found.items()}
    stages = {
        kind: {name: percentile([times.get(name, 0.0) for times in each], 0.5) for name in STAGES}
        for kind, each in found.items()
    }
    ratio = whole["cold"] / whole["hot"]
    rows = [
        (text, *(stages[kind][name] * 1e3 if name in found[kind][0] else "" for kind in _KINDS))
        for name, text in STAGES.items()
    ]
    rows.append(("in all", *(whole[kind] * 1e3 for kind in _KINDS)))
    figures: dict[str, Any] = {
        "model": Path(options.model).stem,
        **{f"{kind}_ms_p50": seconds * 1e3 for kind, seconds in whole.items()},
        "ratio_cold_to_hot": ratio,
        "ratio_warm_to_hot": whole["warm"] / whole["hot"],
        "bar_ratio_cold_to_hot": BAR,
        "met": ratio >= BAR,
        "stages_ms_p50": {
            kind: {name: seconds * 1e3 for name, seconds in each.items() if name in found[kind][0]}
            for kind, each in stages.items()
        },
    }
    return Report(
        benchmark="ladder",
        runs=options.runs,
        figures=figures,
        tables=(
            Rows(
                title="Where the time goes, p50",
                columns=("stage", *(f"{k} ms" for k in _KINDS)),
                rows=tuple(rows),
            ),
            Rows(
                title="What must hold",
                columns=("what", "found", "bar"),
                rows=(("cold, times as long as hot", ratio, verdict(ratio >= BAR, f"≥ {BAR:g}")),),
            ),
        ),
        setting=(
            f"Model {Path(options.model).stem}; {options.runs} cold and as many warm requests, "
            f"{HOT} hot ones after each; one at a time."
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks ladder", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=model_name, default="MobileNetV1", help="as in `overhead`")
    parser.add_argument("--runs", type=positive_int, default=5, help="cold requests, and warm ones")
    return parser
