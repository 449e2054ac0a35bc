"""What the operator saw: everything it holds is searched for everything it must not learn."""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
from onnx import numpy_helper

from cloister.host.gateway.capture import read_capture
from demonstration.job import SPARE, Served
from demonstration.report import Failed, Report, Task
from demonstration.search import Needle, Search, files_below, fragments, of_bytes, of_tensor, of_text
from demonstration.stage import Example, Stage

INPUT, OUTPUT, LABEL = "inputs", "outputs", "class names and labels"
WEIGHT, GRAPH, SECRET = "weights", "names in the graphs", "keys and secrets"
KINDS = (INPUT, OUTPUT, LABEL, WEIGHT, GRAPH, SECRET)
ENCODINGS = {INPUT: 4, OUTPUT: 4, LABEL: 3, WEIGHT: 4, GRAPH: 3, SECRET: 3}  # how many each kind has


def show(report: Report, stage: Stage, served: list[Served], *, leak: bool) -> Search:
    """Search everything; ``leak`` first writes one input into a log of the operator's. Gives the search."""
    report.section(
        "What the operator saw",
        "Every byte that passed the gateway, on both sides, was captured. It is searched together with the "
        "whole data directory: blobs, records and their write-ahead log, logs, run folders, policies.",
    )
    if leak:
        sample = served[0].example.samples[0]
        (stage.operator / "logs" / "leak.log").write_text(f"request {sample.ravel().tolist()}\n")
    search = Search(needles(stage, served))
    found: dict[Needle, Path] = {}
    scanned = report.check("all of it is read", lambda task: _scan(report, stage, search, found, task))
    for kind in KINDS:

        def absent(task: Task, kind: str = kind) -> str:
            return _absent(search, found, kind, scanned=scanned)

        report.check(f"no {kind}", absent)
    report.check(
        "control: every ciphertext that the user sent is found", lambda task: _ciphertexts(stage, task)
    )
    report.check("control: the sealed models are found", lambda task: _sealed(stage))
    report.check("control: what is planted in any encoding is found", lambda task: _planted(stage, search))
    _show_request(report, stage)
    return search


def show_again(report: Report, stage: Stage, search: Search) -> None:
    """The refusals left traces of their own: search once more."""

    def check(task: Task) -> str:
        files = files_below(stage.operator)
        task.expect(len(files))
        for path in files:
            hits = search.find(path.read_bytes())
            if hits:
                raise Failed(f"{len(hits)} found in {path.name}")
            task.advance()
        return f"{len(files)} files, the same {len(search.needles)} needles"

    report.check("after all of this the operator still has none of it", check)


def needles(stage: Stage, served: list[Served]) -> Iterator[Needle]:
    """Everything that the operator must not learn."""
    for results in served:
        for number, sample in enumerate(results.example.samples):
            found = [*of_tensor(INPUT, sample, most=2)]
            if {needle.encoding for needle in found} != {"raw", "hex", "base64", "json"}:
                raise Failed(f"sample {number} of {results.example.name} can't be searched for")
            yield from found
        for answer in results.plain:
            yield from of_tensor(OUTPUT, answer["probabilities"], most=2)
        yield from _labels(results.example)
        yield from _model(results.example)
    yield from _secrets(stage)


def _labels(example: Example) -> Iterator[Needle]:
    # One class is one byte or one digit; what tells it is its name, or the whole column of true labels.
    for name in example.classes:
        if len(name) > 1:
            yield from of_text(LABEL, name)
    for fragment in fragments(example.labels.astype(np.uint8).tobytes(), 8):
        yield from of_bytes(LABEL, fragment)


def _model(example: Example) -> Iterator[Needle]:
    graph = onnx.load(example.path).graph
    for initializer in graph.initializer:
        tensor = numpy_helper.to_array(initializer)
        if tensor.dtype == np.float32 and tensor.size > 1:
            yield from of_tensor(WEIGHT, tensor, most=1000)
    for node in graph.node:
        for attribute in node.attribute:
            if len(attribute.floats) > 1:
                yield from of_tensor(WEIGHT, np.array(attribute.floats, dtype=np.float32), most=1000)
    ports = [*graph.input, *graph.output]
    for name in {each.name for each in (*graph.node, *graph.initializer, *ports) if each.name}:
        yield from of_text(GRAPH, name)


def _secrets(stage: Stage) -> Iterator[Needle]:
    owner = stage.desk.owner
    secrets = [stage.desk.key.seed().reveal()]
    secrets += [stage.desk.model(name).key.reveal() for name in stage.desk.models()]
    for path in (stage.user_identity, stage.root / "visitor" / "visitor.identity"):
        secrets.append(base64.b64decode(path.read_text().split()[1]))
    secrets += [identity.key_at(owner).seed().reveal() for identity in (stage.user, stage.visitor)]
    for secret in secrets:
        for half in (secret[:16], secret[16:]):
            yield from of_bytes(SECRET, half)


def _scan(report: Report, stage: Stage, search: Search, found: dict[Needle, Path], task: Task) -> str:
    files = files_below(stage.operator)
    task.expect(len(files))
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for path in files:
        data = path.read_bytes()
        sizes[path.relative_to(stage.operator).parts[0]].append(len(data))
        found.update((needle, path) for needle in search.find(data))
        task.advance()
    figures = httpx.get(f"{stage.url}/metrics").content
    sizes["GET /metrics"].append(len(figures))
    found.update((needle, Path("metrics")) for needle in search.find(figures))
    rows = [(name, len(each), sum(each)) for name, each in sorted(sizes.items())]
    report.table("What the operator holds", ("what", "files", "bytes"), rows)
    missing = {"capture.bin", "store", "logs", "run"} - sizes.keys()
    if missing or not any(path.name.endswith(".sqlite-wal") for path in files):
        raise Failed(f"the data directory lacks {sorted(missing) or 'the write-ahead log'}")
    total = sum(sum(each) for each in sizes.values())
    return f"{len(files)} files, {total / 1e6:.1f} MB, {len(search.needles)} needles"


def _absent(search: Search, found: dict[Needle, Path], kind: str, *, scanned: bool) -> str:
    if not scanned:
        raise Failed("not everything was searched")
    hits = [(needle, path) for needle, path in found.items() if needle.kind == kind]
    if hits:
        needle, path = hits[0]
        raise Failed(f"{len(hits)} found; {needle.encoding} in {path.name}")
    counts = {encoding: count for (of, encoding), count in sorted(search.counts().items()) if of == kind}
    if len(counts) != ENCODINGS[kind]:
        raise Failed(f"only searched for as {', '.join(counts) or 'nothing'}")
    return "searched as " + ", ".join(f"{encoding} ({count})" for encoding, count in counts.items())


def _ciphertexts(stage: Stage, task: Task) -> str:
    """The same search finds what is known to be there, so it would find the rest."""
    sent = stage.witness.sent
    # From behind the key id and the encapsulated key, where the ciphertext proper is.
    search = Search(Needle("request", str(number), body[-64:-16]) for number, body in enumerate(sent))
    found = search.find(stage.capture.read_bytes())
    if not sent or len(found) != len(sent):
        raise Failed(f"{len(found)} of {len(sent)}")
    return f"{len(found)} of {len(sent)}"


def _sealed(stage: Stage) -> str:
    names = stage.desk.models()
    search = Search(
        Needle(name, "sealed", (stage.desk.directory / f"{name}.sealed").read_bytes()[-64:]) for name in names
    )
    found: set[Needle] = set()
    for path in files_below(stage.site.blobs):
        found |= search.find(path.read_bytes())
    if {needle.kind for needle in found} != {*names} or SPARE not in names:
        raise Failed(f"only {sorted(needle.kind for needle in found)}")
    return f"{', '.join(names)}: in the store, as ciphertext"


def _planted(stage: Stage, search: Search) -> str:
    """One needle of every kind and encoding, between random bytes, in a file among the operator's."""
    chosen = {(needle.kind, needle.encoding): needle for needle in search.needles}
    path = stage.operator / "logs" / "planted.log"
    path.write_bytes(os.urandom(101) + b"".join(each.data + os.urandom(7) for each in chosen.values()))
    try:
        found = search.find(path.read_bytes())
    finally:
        path.unlink()
    if not {*chosen.values()} <= found:
        raise Failed(f"{len(found)} of {len(chosen)}")
    return f"{len(chosen)} of {len(chosen)} kinds and encodings"


def _show_request(report: Report, stage: Stage) -> None:
    """Print one request as the operator has it."""
    pool = stage.client.session.conversation.current().document.pools[0].pool.id.hex().encode()
    for frame in read_capture(stage.capture):
        head, _, _ = frame.data.partition(b"\r\n\r\n")
        if not frame.received or not head.startswith(b"POST /ohttp") or pool not in head:
            continue
        rows = [tuple(line.decode("latin-1").partition(":")[::2]) for line in head.split(b"\r\n")]
        report.table("One captured request: its head; the body is ciphertext", ("field", "value"), rows)
        break
    report.console.print(
        "  What it does learn: padded sizes, times, the pool, network addresses, names of models.",
        style="dim",
    )
