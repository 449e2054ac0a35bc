"""Where the added milliseconds go: each component of the confidential path, timed alone, at its real sizes.

Everything but transport runs in this process, in the order of the path, on what the step before it gave; so
each step works on real bytes. All steps take turns. Transport is timed with the compact front behind one hop,
and behind the gateway, with a worker that answers at once.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.models import Array, bare_session, sample
from benchmarks.plain_server import FIELDS, PATH, Plain
from benchmarks.report import Report, Rows, Samples
from cloister.core import oip
from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp, encapsulation, hpke
from cloister.core.ohttp.kem import generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.authorization import FIELD, RequestAuthorization, RequestContext
from cloister.enclave.worker.replay import ReplayGuard
from cloister.net.loop import new_event_loop, reuse_memory
from cloister.net.messages import Limits
from cloister.party.wire import Wire

CLIENT, GATEWAY, WORKER = "client", "gateway", "worker"
_WARM: Final = 20
_SUITE: Final = hpke.WIRE_SUITES[0]
_MODEL: Final = f"{'0' * 64}/model"

Step = tuple[str, str, Callable[[], Any]]


class _Path:
    """One request's way, step by step: each step is one row of the profile, and keeps what the next needs."""

    def __init__(self, model: Path) -> None:
        self.session = bare_session(model)
        self.inputs = sample(self.session)
        self.names = [output.name for output in self.session.get_outputs()]
        self.private = generate_private_key(_SUITE.kem_id)
        self.configuration = KeyConfiguration.for_key(1, self.private)
        self.gateway = encapsulation.Gateway([(1, self.private)])
        self.user = SigningKey.generate()
        self.replays = ReplayGuard()
        self.now = int(time.time())
        self.cipher = _SUITE.cipher(os.urandom(_SUITE.n_key))
        self.loop = new_event_loop()
        self.threads = ThreadPoolExecutor(1)
        self.header, self.content = b"", b""
        self.sealer: encapsulation.Encapsulation
        self.field = b""
        self.message = self.sealed = self.answer_message = self.answer = bytearray()
        self.opened: encapsulation.Decapsulation
        self.plaintext = self.answer_plaintext = memoryview(b"")
        self.request: bhttp.Request
        self.response: bhttp.Response
        self.asked: oip.InferenceRequest
        self.outputs: dict[str, Array] = {}
        self.answer_header, self.answer_content = b"", b""

    def close(self) -> None:
        self.threads.shutdown()
        self.loop.close()

    def steps(self) -> list[Step]:
        """(where, what, call), in the order of the path."""
        return [
            (CLIENT, "encode the tensors", self.encode),
            (CLIENT, "X-Wing encapsulation, HPKE key schedule", self.encapsulate),
            (CLIENT, "signature (Ed25519) and its field", self.sign),
            (CLIENT, "binary HTTP, padding", self.frame),
            (CLIENT, "AES-256-GCM of the request", self.seal),
            (WORKER, "X-Wing decapsulation, HPKE key schedule", self.decapsulate),
            (WORKER, "AES-256-GCM of the request", self.decrypt),
            (WORKER, "binary HTTP", self.unframe),
            (WORKER, "signature checked", self.check),
            (WORKER, "replay guard", self.admit),
            (WORKER, "decode the tensors", self.decode),
            (WORKER, "to a thread and back", self.hop),
            (WORKER, "encode the outputs", self.encode_outputs),
            (WORKER, "binary HTTP, padding, of the answer", self.frame_answer),
            (WORKER, "key and AES-256-GCM of the answer", self.seal_answer),
            (CLIENT, "key and AES-256-GCM of the answer", self.open_answer),
            (CLIENT, "binary HTTP of the answer", self.unframe_answer),
            (CLIENT, "decode the outputs", self.decode_outputs),
        ]

    def encode(self) -> None:
        self.header, buffers = oip.encode_request(self.inputs)
        self.content = b"".join((self.header, *buffers))

    def encapsulate(self) -> None:
        self.sealer = encapsulation.begin(self.configuration, _SUITE)

    def _context(self, enc: bytes) -> RequestContext:
        return RequestContext(service=bytes(32), pool=bytes(32), epoch=1, model=_MODEL, enc=enc)

    def sign(self) -> None:
        self.field = RequestAuthorization.sign(
            self.user,
            self._context(self.sealer.enc),
            statement=bytes(32),
            request_id=os.urandom(16),
            expiry=self.now + 120,
        ).to_field()

    def frame(self) -> None:
        inner = bhttp.Request(
            method=b"POST",
            path=f"/v2/models/{_MODEL}/infer".encode(),
            fields=(
                (b"content-type", b"application/octet-stream"),
                (oip.HEADER_LENGTH, b"%d" % len(self.header)),
            ),
            content=self.content,
        )
        self.message = replace(inner, fields=(*inner.fields, (FIELD, self.field))).to_bytes(pad=True)

    def seal(self) -> None:
        self.sealed = self.sealer.seal(self.message)

    def decapsulate(self) -> None:
        # The key schedule of what `decrypt` opens, once more: opening has no seam between the two.
        hpke.setup_receiver(_SUITE, self.private, self.sealer.enc, b"")

    def decrypt(self) -> None:
        # As in `Gateway.open`, with a key of its own.
        hpke.open_new(self.cipher, bytes(12), self._ciphertext, b"", code="ohttp.open")

    def open_untimed(self) -> None:
        """What `unframe` needs: the request opened in one go; and a ciphertext for `decrypt`."""
        self.opened, self.plaintext = self.gateway.open(self.sealed)

    def prepare(self) -> None:
        """The ciphertext for `decrypt`."""
        self._ciphertext = bytearray(len(self.message) + hpke.N_TAG)
        self.cipher.encrypt_into(bytes(12), self.message, b"", memoryview(self._ciphertext))

    def unframe(self) -> None:
        self.request = bhttp.Request.from_bytes(self.plaintext)

    def check(self) -> None:
        field = self.request.field(FIELD)
        assert field is not None
        authorization = RequestAuthorization.from_field(field)
        authorization.verify(self._context(self.opened.enc), now=self.now)

    def admit(self) -> None:
        self.replays.admit(
            enc=hashlib.sha256(self.opened.enc).digest(),
            user=bytes(32),
            request_id=os.urandom(16),
            expiry=self.now + 120,
            now=self.now,
        )

    def decode(self) -> None:
        self.asked = oip.decode_request(
            memoryview(self.request.content), self.request.field(oip.HEADER_LENGTH)
        )

    def hop(self) -> float:
        async def there_and_back() -> float:
            start = time.perf_counter()
            await self.loop.run_in_executor(self.threads, _nothing)
            return time.perf_counter() - start

        return self.loop.run_until_complete(there_and_back())

    def run_untimed(self) -> None:
        """What `encode_outputs` needs."""
        values = self.session.run(self.names, self.asked.inputs)
        self.outputs = dict(zip(self.names, values, strict=True))

    def encode_outputs(self) -> None:
        self.answer_header, buffers = oip.encode_response(_MODEL, self.outputs, binary=True)
        self.answer_content = b"".join((self.answer_header, *buffers))

    def frame_answer(self) -> None:
        fields = (
            (b"content-type", b"application/octet-stream"),
            (oip.HEADER_LENGTH, b"%d" % len(self.answer_header)),
        )
        self.answer_message = bhttp.Response(status=200, fields=fields, content=self.answer_content).to_bytes(
            pad=True
        )

    def seal_answer(self) -> None:
        self.answer = self.opened.seal(self.answer_message)

    def open_answer(self) -> None:
        self.answer_plaintext = self.sealer.open(self.answer)

    def unframe_answer(self) -> None:
        self.response = bhttp.Response.from_bytes(self.answer_plaintext)

    def decode_outputs(self) -> None:
        oip.decode_response(memoryview(self.response.content), self.response.field(oip.HEADER_LENGTH))


def _nothing() -> None:
    return None


def profiled(report: Report, model: Path, runs: int) -> Report:
    """The report of `overhead` with one more table, and the figures of each component."""
    reuse_memory()  # as in every process of the path
    path = _Path(model)
    try:
        rows = _components(path, runs)
        rows[5:5] = _transport(len(path.sealed), len(path.answer), runs)
    finally:
        path.close()
    added = report.figures["added_ms_p50"]
    total = sum(milliseconds for *_, milliseconds in rows)
    shown = [(where, what, value * 1e3, f"{value / added:.0%}") for where, what, value in rows]
    shown.append(("", "all components", total * 1e3, f"{total / added:.0%}"))
    shown.append(
        (
            "",
            "the rest: three processes woken, caches gone cold",
            (added - total) * 1e3,
            f"{1 - total / added:.0%}",
        )
    )
    shown.append(("", "added, as measured", added * 1e3, "100%"))
    table = Rows(
        title="Each component alone, p50",
        columns=("where", "what", "µs", "of what is added"),
        rows=tuple(shown),
    )
    return replace(
        report,
        figures={
            **report.figures,
            "components_us_p50": {f"{where}: {what}": value * 1e3 for where, what, value in rows},
            "components_ms_p50": total,
        },
        tables=(*report.tables, table),
    )


def _components(path: _Path, runs: int) -> list[tuple[str, str, float]]:
    """(where, what, p50 in ms) of each step."""
    steps = path.steps()
    untimed = {
        path.decapsulate: path.prepare,
        path.unframe: path.open_untimed,
        path.encode_outputs: path.run_untimed,
    }
    samples = [Samples() for _ in steps]
    for count in range(-_WARM, runs):
        for (_, _, call), times in zip(steps, samples, strict=True):
            if call in untimed:
                untimed[call]()
            start = time.perf_counter()
            own: float | None = call()  # a step that runs in a loop looks at the clock itself
            seconds = own or time.perf_counter() - start
            if count >= 0:
                times.seconds.append(seconds)
    return [(where, what, times.ms(0.5)) for (where, what, _), times in zip(steps, samples, strict=True)]


def _transport(request: int, answer: int, runs: int) -> list[tuple[str, str, float]]:
    """(where, what, p50 in ms) of a request of that many bytes, with an answer of that many."""
    body, limits = bytes(request), Limits(max_body=64 << 20)
    fields = tuple((name.encode(), value.encode()) for name, value in FIELDS.items())
    fields = ((b"host", b"localhost"), *fields)
    with Plain("null", str(answer)) as plain:
        ports = {"direct": plain.direct, "gateway": plain.port}
        wires = {name: Wire("127.0.0.1", port, limits=limits) for name, port in ports.items()}
        samples = {name: Samples() for name in wires}
        try:
            for count in range(-_WARM, runs):
                for name, wire in wires.items():
                    start = time.perf_counter()
                    found = wire.request(b"POST", PATH.encode(), fields, body, timeout=30.0)
                    seconds = time.perf_counter() - start
                    if found.status != 200:
                        raise SystemExit(f"the front answered {found.status}")
                    if count >= 0:
                        samples[name].seconds.append(seconds)
        finally:
            for wire in wires.values():
                wire.close()
    direct = samples["direct"].ms(0.5)
    return [
        (CLIENT, "one hop: write, read by the front, answer written and read", direct),
        (
            GATEWAY,
            "receive, forward to the worker's socket, pass the answer back",
            samples["gateway"].ms(0.5) - direct,
        ),
    ]
