"""The main job: an owner seals and publishes, a user verifies and asks, the answers are right."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from cloister.core.protocol.statement import Statement
from cloister.owner.seal import seal_model
from cloister.party.steps import told
from demonstration.report import Failed, Report, Task
from demonstration.stage import LEASE, WORKERS, Array, Example, Stage

SPARE = "spare"  # a second copy of the digits, sealed under a key of its own, that nobody has asked for yet
_DAY = 86400


@dataclass(slots=True, kw_only=True)
class Served:
    """What the user sent and got for one model, and what plain ONNX Runtime says to the same."""

    example: Example
    answers: list[dict[str, Array]] = field(default_factory=list)
    plain: list[dict[str, Array]] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def accuracy(self, answers: list[dict[str, Array]]) -> float:
        """Share of the test split that is classified right."""
        found = [int(np.argmax(answer["probabilities"])) for answer in answers]
        return float(np.mean(np.array(found) == self.example.labels))


def start_service(report: Report, stage: Stage) -> bool:
    """Real processes on one host."""
    report.section(
        "A host that nobody has to trust",
        "One machine, the simulated TEE. It protects nothing from this machine's administrator. The "
        "evidence has the format of SGX DCAP; nothing has run on TEE hardware yet.",
    )

    def start(task: Task) -> str:
        facts = stage.start(task.say)
        rows: list[tuple[str, object]] = [
            (name, process.pid) for name, process in stage.service.processes.items()
        ]
        rows += [("data", stage.operator), ("url", facts["url"]), ("service", facts["service"])]
        report.table("Processes, and where they are", ("what", "value"), rows)
        if len(stage.workers()) != WORKERS:
            raise Failed(f"{len(stage.workers())} workers are registered, not {WORKERS}")
        return f"pool {facts['pool'][:16]}, leases of {LEASE} s"

    return report.check("gateway, key service enclave and two worker enclaves are up", start)


def publish(report: Report, stage: Stage, models: tuple[Example, ...]) -> None:
    """The owner's side."""
    report.section(
        "The owner",
        "Seals each model under a fresh key at its own desk, verifies the service, uploads ciphertext, and "
        "publishes a signed statement: which enclaves may hold the key, which users may ask.",
    )
    sources = [*((model.name, model) for model in models), (SPARE, models[0])]

    def seal(task: Task) -> str:
        rows = []
        for name, model in sources:
            task.say(f"sealing {name}")
            target = stage.desk.directory / f"{name}.sealed"
            kept = seal_model(stage.desk, name, model.path, target, progress=task.at)
            rows.append((name, model.path.stat().st_size, kept.sealed.size, kept.sealed.header.hex()[:32]))
        report.table("Sealed models", ("model", "plain bytes", "sealed bytes", "header digest"), rows)
        return f"owner {stage.desk.owner.hex()[:16]}, whose key and model keys stay in its own folder"

    def statements(task: Task) -> str:
        rows = []
        with stage.publisher() as publisher:
            for name, _ in sources:
                task.say(f"publishing {name}")
                sealed = stage.desk.directory / f"{name}.sealed"
                publisher.publish(name, stage.model_policy, sealed, progress=task.at)
                user = stage.user.user_id(stage.desk.owner)
                statement = publisher.grant(name, user, int(time.time()) + _DAY)
                rows.append(_row(statement))
        columns = ("model", "version", "statement", "grants")
        report.table("Statements that the service took", columns, rows)
        return "the first statement names the enclaves, the second grants the user"

    report.check("two real models are sealed, and one of them twice", seal)
    report.check("signed policies are published", statements)


def verify(report: Report, stage: Stage) -> None:
    """The user's side, before anything leaves."""
    report.section(
        "The user verifies",
        "Nothing is sent before the service document, the key service's evidence, its configuration and the "
        "pool's policy are checked against the user's own policy.",
    )

    def service(task: Task) -> str:
        stage.client.verify()
        record = stage.client.record
        report.table(
            "Record of the verification",
            ("step", "outcome", "detail"),
            [(step.name, step.outcome, step.detail) for step in told(record.steps, record.evidence)],
        )
        if not record.simulated:
            raise Failed("the record does not say that the TEE is simulated")
        return f"{len(record.steps)} steps; announced as simulated"

    def pool(task: Task) -> str:
        entries = stage.client.session.conversation.current().document.pools
        for entry in entries:
            stage.policy.require_pool(entry)
        return f"{len(entries)} pool, claim by claim within the user's reference values for workers"

    report.check("the service verifies, step by step", service)
    report.check("every worker that the pool admits is one that the user accepts", pool)


def ask(report: Report, stage: Stage, models: tuple[Example, ...], *, spoil: bool) -> list[Served]:
    """Encrypted requests for every sample of the test splits; ``spoil`` alters one answer once it is here."""
    report.section(
        "Sealed requests for real samples",
        "One request for each sample that the models never saw in training; each is encrypted to the pool's "
        "attested key and signed by the user.",
    )
    served = [Served(example=model) for model in models]
    for results in served:
        _ask_one(report, stage, results, spoil=spoil and results is served[0])
    return served


def _ask_one(report: Report, stage: Stage, results: Served, *, spoil: bool) -> None:
    example = results.example
    model = stage.desk.model_id(example.name)

    def send(task: Task) -> str:
        plain = example.plain()
        task.expect(len(example.samples))
        for sample in example.samples:
            batch = sample[np.newaxis]
            started = time.perf_counter()
            results.answers.append(stage.client.infer(model, {example.source: batch}))
            results.milliseconds.append((time.perf_counter() - started) * 1e3)
            results.plain.append(plain(batch))
            task.advance()
        if spoil:
            name = "probabilities"
            results.answers[0][name] = np.nextafter(results.answers[0][name], np.float32(2))
        pairs = zip(results.answers, results.plain, strict=True)
        unequal = [index for index, (ours, theirs) in enumerate(pairs) if not identical(ours, theirs)]
        if unequal:
            raise Failed(
                f"{len(unequal)} of {len(results.answers)} answers differ, the first at {unequal[0]}"
            )
        return f"{len(results.answers)} requests, median {statistics.median(results.milliseconds):.1f} ms"

    def accuracy(task: Task) -> str:
        if len(results.answers) != len(example.labels):
            raise Failed("not every sample was answered")
        ours, plain = results.accuracy(results.answers), results.accuracy(results.plain)
        if ours != plain or ours < 0.9:
            raise Failed(f"accuracy {ours:.4f}; plain ONNX Runtime has {plain:.4f}")
        return f"accuracy {ours:.4f} over {len(example.labels)} test samples; plain ONNX Runtime {plain:.4f}"

    report.check(f"{example.name}: every answer equals plain ONNX Runtime's, bit for bit", send)
    report.check(f"{example.name}: the accuracy over the test split is the plain model's", accuracy)


def answers_again(report: Report, stage: Stage, served: list[Served]) -> None:
    """After everything that was tried: still right."""

    def check(task: Task) -> str:
        for results in served:
            model = stage.desk.model_id(results.example.name)
            batch = results.example.samples[:1]
            answer = stage.client.infer(model, {results.example.source: batch})
            if not identical(answer, results.plain[0]):
                raise Failed(f"{results.example.name} answers differently now")
        return "both models, the same bits as before"

    report.check("after all of this the service still answers right", check)


def identical(ours: dict[str, Array], theirs: dict[str, Array]) -> bool:
    """Whether two answers have the same names, types, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and ours[name].tobytes() == theirs[name].tobytes()
        for name in ours
    )


def _row(statement: Statement) -> tuple[object, ...]:
    model = statement.model.rpartition("/")[2]
    return model, statement.version, statement.digest.hex()[:32], len(statement.grants)
