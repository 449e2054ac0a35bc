"""Who and what is refused for what it is: enclaves, users, services, evidence. All of it is really tried."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx

from cloister.client.client import Client
from cloister.core.protocol.attestation import Attestation, verify_attestation
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.verifier import verify as verify_evidence
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import AccessRefused
from cloister.sim.image import installed_source
from cloister.sim.measurement import measure
from demonstration.job import Served, identical
from demonstration.report import Failed, Report, Task
from demonstration.stage import LEASE, POOL, SETTINGS, WORKERS, Stage

MODIFIED: Final = "worker-modified"
PATIENCE: Final = 20.0  # seconds
_DAY: Final = 86400


def refuse_enclaves(report: Report, stage: Stage, served: list[Served]) -> None:
    """Workers that run other code than the owner and the user named."""
    source = _modified_source(stage)

    def ask(task: Task) -> None:
        measured = measure("worker", source).mr_enclave
        worker = replace(stage.policy.worker, mr_enclave=frozenset({measured}))
        with stage.other_client(policy=replace(stage.policy, worker=worker)) as client:
            _infer(client, stage, served[0])

    report.check(
        "wrong worker measurement: the key service gives a modified worker nothing",
        lambda task: _run_modified_worker(stage, source, task),
    )
    report.refused(
        "wrong worker measurement: a user who names other workers refuses the pool",
        "appraisal.not-subset",
        ask,
    )


def refuse_users(report: Report, stage: Stage, served: list[Served], *, grant: bool) -> None:
    """Users without a grant, and with one no longer; ``grant`` makes the first of them a granted one."""
    name, user = served[0].example.name, stage.visitor.user_id(stage.desk.owner)
    if grant:
        _grant(stage, name, user)

    def ungranted(task: Task) -> None:
        with stage.other_client(identity=stage.visitor) as client:
            _infer(client, stage, served[0])

    def revoked(task: Task) -> str:
        with stage.other_client(identity=stage.visitor) as client:
            _grant(stage, name, user)
            for _ in range(2 * WORKERS):  # so that each worker holds the statement that grants
                if not identical(_infer(client, stage, served[0]), served[0].plain[0]):
                    raise Failed("the granted visitor got a wrong answer")
            # This client keeps the document from before: it accepts the statement that still grants it.
            task.say("waiting for the workers' leases")
            with stage.publisher() as publisher:
                publisher.revoke(name, user)
            return _until_refused(client, stage, served[0])

    report.refused("ungranted user", "access.grant", ungranted)
    report.check("revoked user", revoked)


def refuse_services(report: Report, stage: Stage, served: list[Served]) -> None:
    """Key services and evidence that the policy's trust anchors don't reach."""

    def another_root(task: Task) -> None:
        url, service = stage.start_rogue("rogue", task.say)
        # Even a user who was talked into pinning this service's id.
        with Client(url, policy=replace(stage.policy, service=service), identity=stage.user) as client:
            client.verify()

    def other_text(task: Task) -> None:
        attestation = _attestation(stage)
        configuration = EnclaveConfiguration.from_bytes(attestation.configuration)
        settings = {**configuration.settings, "lease_seconds": 3600}
        _verify_with(stage, attestation, replace(configuration, settings=settings), stage.policy.key_service)

    def production(task: Task) -> None:
        with stage.other_client(policy=stage.production_policy()) as client:
            _infer(client, stage, served[0])

    def production_text(task: Task) -> None:
        attestation = _attestation(stage)
        configuration = EnclaveConfiguration.from_bytes(attestation.configuration)
        policy = stage.production_policy().key_service
        _verify_with(stage, attestation, replace(configuration, anchor_roots=None), policy)

    def evidence(task: Task) -> None:
        verify_evidence(_attestation(stage).evidence, anchors=TrustAnchors.vendor(), now=int(time.time()))

    report.refused(
        "enclave configuration: a genuine key service that names another trust anchor",
        "appraisal.anchor",
        another_root,
    )
    report.refused(
        "enclave configuration: a text that the host wrote after the attestation",
        "binding.report-data",
        other_text,
    )
    report.refused("simulated evidence under a production policy", "appraisal.simulated", production)
    report.refused(
        "simulated evidence under a production policy, the configuration forged to hide it",
        "evidence.simulated",
        production_text,
    )
    report.refused("simulated evidence under the vendors' roots", "evidence.simulated", evidence)


def _run_modified_worker(stage: Stage, source: Path, task: Task) -> str:
    """Launch a real worker from other source; gives the code with which the key service refused it."""
    task.say("starting a worker enclave from modified source")
    arguments = ("--name", MODIFIED, "--pool", POOL, "--settings", SETTINGS, "--source", str(source))
    stage.service.start(MODIFIED, "worker", *arguments)
    folder = stage.site.run_dir(MODIFIED)
    try:
        health = _wait_for_problem(folder)
        log = (folder / "enclave.log").read_text(errors="replace")
        if health["ready"] or health["problem"] != "appraisal.mr_enclave":
            raise Failed(f"its health is {health}")
        if "appraisal.mr_enclave" not in log:
            raise Failed("its log doesn't say so")
        if MODIFIED in stage.workers():
            raise Failed("the gateway sends it requests")
    finally:
        stage.end(MODIFIED)
    genuine, modified = measure("worker").mr_enclave.hex(), measure("worker", source).mr_enclave.hex()
    return f"appraisal.mr_enclave: expected {genuine[:12]}..., found {modified[:12]}...; no key, never ready"


def _wait_for_problem(folder: Path) -> dict[str, Any]:
    """Health of an enclave, once something keeps it from its work or it is ready."""
    until = time.monotonic() + PATIENCE
    health: dict[str, Any] = {}
    transport = httpx.HTTPTransport(uds=str(folder / "enclave.sock"))
    with httpx.Client(transport=transport, base_url="http://enclave") as http:
        while time.monotonic() < until:
            try:
                health = http.get("/healthz").json()
            except httpx.TransportError:
                health = {}  # not listening yet
            if health.get("ready") or health.get("problem"):
                return health
            time.sleep(0.1)
    raise Failed(f"nothing is known of the modified worker after {PATIENCE:.0f} s: {json.dumps(health)}")


def _modified_source(stage: Stage) -> Path:
    """A copy of the package in which one line is added to the worker."""
    source = stage.root / "modified" / "cloister"
    shutil.copytree(installed_source(), source, ignore=shutil.ignore_patterns("__pycache__"))
    with (source / "enclave" / "worker" / "routes.py").open("a") as file:
        file.write("\nPEEK = True  # whatever an operator would like to add\n")
    return source


def _until_refused(client: Client, stage: Stage, results: Served) -> str:
    started, answered = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < LEASE + 2:
        try:
            _infer(client, stage, results)
        except AccessRefused as error:
            if error.code != "access.grant":
                raise
            return (
                f"access.grant: {error.message}, {elapsed:.1f} s after the revocation "
                f"(lease {LEASE} s; {answered} requests were answered meanwhile)"
            )
        answered += 1
        time.sleep(0.05)
    raise Failed(f"still answered {elapsed:.1f} s after the revocation; the lease is {LEASE} s")


def _grant(stage: Stage, name: str, user: bytes) -> None:
    with stage.publisher() as publisher:
        publisher.grant(name, user, int(time.time()) + _DAY)


def _attestation(stage: Stage) -> Attestation:
    """The key service's attestation, as the verified service document carries it."""
    return stage.client.session.conversation.current().document.attestation


def _verify_with(
    stage: Stage, attestation: Attestation, configuration: EnclaveConfiguration, policy: AppraisalPolicy
) -> None:
    """The check that every client makes, of the same evidence with another configuration text."""
    binding = replace(attestation.binding, configuration=configuration.digest)
    verify_attestation(
        replace(attestation, configuration=configuration.to_bytes(), binding=binding),
        policy=policy,
        now=int(time.time()),
        purpose="service-document",
        role="key-service",
        service=stage.policy.service,
        pool=None,
        freshness=binding.freshness,
    )


def _infer(client: Client, stage: Stage, results: Served) -> dict[str, Any]:
    example = results.example
    return client.infer(stage.desk.model_id(example.name), {example.source: example.samples[:1]})
