"""What the operator can do to bytes: send them again, alter them on its disk, alter them on their way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from cloister.client.session import REQUEST_LIFETIME, model_path
from cloister.core import oip
from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol import problem
from cloister.core.protocol.authorization import FIELD, REQUEST_ID_SIZE, RequestAuthorization, RequestContext
from cloister.core.protocol.conversation import finish_exchange
from cloister.core.protocol.document import PURPOSE, SignedDocument
from cloister.core.protocol.flow import Flow, Incoming, Outgoing
from cloister.party.carry import Carrier
from demonstration.job import SPARE, Served, identical
from demonstration.report import Failed, Report, Task, require_refusal
from demonstration.stage import Array, Stage

WELL_KNOWN: Final = "/.well-known/cloister"


def refuse_replay(report: Report, stage: Stage, served: list[Served]) -> None:
    """The same ciphertext twice to the same worker."""

    def replay(task: Task) -> str:
        name, socket = sorted(stage.workers().items())[0]
        carrier = Carrier("http://enclave", httpx.HTTPTransport(uds=str(socket)))
        try:
            # The last model's statement is the one that the user's client knows: no other line changes it.
            return f"{_send_twice(stage, served[-1], carrier)} ({name})"
        finally:
            carrier.close()

    report.check("replayed request", replay)


def refuse_tampered_model(report: Report, stage: Stage, served: list[Served]) -> None:
    """One bit of a sealed model on the operator's disk, before a worker has loaded it."""
    results = served[0]

    def ask() -> dict[str, Array]:
        batch = {results.example.source: results.example.samples[:1]}
        return stage.client.infer(stage.desk.model_id(SPARE), batch)

    def tamper(task: Task) -> str:
        blob = _blob(stage, SPARE)
        _flip(blob)
        try:
            refusal = require_refusal("sealing.chunk", ask)
        finally:
            _flip(blob)
        if not identical(ask(), results.plain[0]):
            raise Failed("with the bit put back the answer is wrong")
        return f"{refusal}; with the bit put back it is served"

    report.check("tampered sealed model", tamper)


def refuse_tampered_document(report: Report, stage: Stage) -> None:
    """The service document, altered on its way."""
    attacks: tuple[tuple[str, str, Callable[[SignedDocument], SignedDocument]], ...] = (
        ("tampered service document: one bit", "tampered.signature", _altered),
        ("tampered service document: signed by somebody else", "binding.service", _signed_by_another),
    )
    for name, code, attack in attacks:

        def fetch(task: Task, attack: Callable[[SignedDocument], SignedDocument] = attack) -> None:
            host = MaliciousHost(attack)
            with stage.other_client(transport=host) as client:
                try:
                    client.verify()
                finally:
                    if not host.attacked:
                        raise Failed("the document was not altered")

        report.refused(name, code, fetch)


class MaliciousHost(httpx.BaseTransport):
    """Passes everything on but the service document, which it alters."""

    def __init__(self, attack: Callable[[SignedDocument], SignedDocument]) -> None:
        self._inner = httpx.HTTPTransport()
        self._attack = attack
        self.attacked = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass on, or alter."""
        response = self._inner.handle_request(request)
        if request.url.path != WELL_KNOWN:
            return response
        before = SignedDocument.from_bytes(response.read())
        after = self._attack(before)
        self.attacked += after != before
        return httpx.Response(200, stream=httpx.ByteStream(after.to_bytes()), request=request)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


def _altered(signed: SignedDocument) -> SignedDocument:
    text = bytearray(signed.text)
    text[len(text) // 2] ^= 1
    return SignedDocument(text=bytes(text), key=signed.key, signature=signed.signature)


def _signed_by_another(signed: SignedDocument) -> SignedDocument:
    key = SigningKey.generate()
    return SignedDocument(text=signed.text, key=key.public, signature=key.sign(PURPOSE, signed.text))


def _send_twice(stage: Stage, results: Served, carrier: Carrier) -> str:
    """Send one encapsulated request twice and open both answers, which needs the client's own end of it."""
    sealer, pool, inner = _request(stage, results)
    flow = finish_exchange(sealer, pool, inner)
    outgoing = next(flow)
    if not isinstance(outgoing, Outgoing):
        raise Failed("the exchange began with a pause")
    first = _finish(flow, carrier.send(outgoing))
    answer = oip.decode_response(memoryview(first.content), first.field(oip.HEADER_LENGTH))
    if not identical(answer, results.plain[0]):
        raise Failed("the first time it was not answered right")
    copy = carrier.send(outgoing)
    if copy.status != 200:
        raise Failed(f"the copy met outer status {copy.status}")
    second = bhttp.Response.from_bytes(sealer.open(copy.body))

    def refuse() -> None:
        if second.status != 200:
            raise problem.from_bytes(memoryview(second.content))

    return f"{require_refusal('replayed.request', refuse)}; answered once, right"


def _finish(flow: Flow[bhttp.Response], answer: Incoming) -> bhttp.Response:
    """The end of an exchange, given its one answer."""
    try:
        flow.send(answer)
    except StopIteration as end:
        response: bhttp.Response = end.value
        return response
    raise Failed("the exchange went on")


def _request(stage: Stage, results: Served) -> tuple[encapsulation.Encapsulation, bytes, bhttp.Request]:
    """What `cloister.client` sends, with the encapsulation in hand."""
    example = results.example
    model = stage.desk.model_id(example.name)
    session = stage.client.session
    entry, served = session.place(model)
    sealer = encapsulation.begin(*select(entry.keys))
    pool = entry.pool.id
    authorization = RequestAuthorization.sign(
        stage.user.key_at(stage.desk.owner),
        RequestContext(
            service=stage.policy.service, pool=pool, epoch=entry.epoch, model=model, enc=sealer.enc
        ),
        statement=served.statement,
        request_id=os.urandom(REQUEST_ID_SIZE),
        expiry=int(time.time()) + REQUEST_LIFETIME,
    )
    header, buffers = oip.encode_request({example.source: example.samples[:1]}, outputs=())
    fields = (
        (b"content-type", b"application/octet-stream"),
        (oip.HEADER_LENGTH, b"%d" % len(header)),
        (FIELD, authorization.to_field()),
    )
    inner = bhttp.Request(
        method=b"POST",
        path=model_path(model, "infer"),
        fields=fields,
        content=b"".join((header, *buffers)),
    )
    return sealer, pool.hex().encode(), inner


def _blob(stage: Stage, name: str) -> Path:
    digest = stage.desk.model(name).sealed.blob.hex()
    return stage.site.blobs / digest[:2] / digest


def _flip(path: Path) -> None:
    """Flip one bit of a file, in place, in its last chunk."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        octet = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([octet ^ 1]))
