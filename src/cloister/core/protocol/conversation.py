"""A relying party's conversation with a service, as flows (`cloister.core.protocol.flow`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.hpke import Suite
from cloister.core.ohttp.keyconfig import KeyConfiguration, select
from cloister.core.protocol import outer, problem
from cloister.core.protocol.document import (
    MAX_DOCUMENT,
    SIGNING_ALGORITHM,
    ServiceDocument,
    VerifiedDocument,
    verify_document,
)
from cloister.core.protocol.exchange import NONCE_SIZE, HeadRequest, Possession
from cloister.core.protocol.flow import Flow, Incoming, Outgoing, Pause
from cloister.core.protocol.head import TreeHead
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.result import CollateralMemory, Step
from cloister.errors import CloisterError, FormatError, NotFound, Overloaded, Rollback, TransportError

WELL_KNOWN: Final = b"/.well-known/cloister"
LAG_PAUSES: Final = (0.15, 0.15, 0.3)  # seconds that a cache is given to follow the service
_REQUEST_TYPE: Final = encapsulation.MEDIA_TYPE_REQUEST.encode()
_KEY_PROBLEM: Final = b"#ohttp-key"


class StaleKey(TransportError):
    """No key opened the request: its epoch may have ended. An untrusted hint to fetch the document again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a relying party demands of a service: its id, and what its key service must be."""

    service: bytes
    key_service: AppraisalPolicy


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What a relying party knows of a service.

    Attributes:
        trust: What it demands.
        head: The newest tree head it has seen; kept between runs by whoever owns this.
        collateral: The newest collateral it has seen; kept likewise.
        verified: The document it goes by; None before the first `refresh`.
        possession: The proof that came with it.
        steps: Everything that was checked for it, in order.
        verifications: How many documents were verified in full.
    """

    trust: Trust
    head: TreeHead | None = None
    collateral: CollateralMemory = field(default_factory=CollateralMemory)
    verified: VerifiedDocument | None = None
    possession: Possession | None = None
    steps: tuple[Step, ...] = ()
    verifications: int = 0

    def fresh(self, now: int) -> bool:
        """Whether the document still holds."""
        return self.verified is not None and now < self.verified.not_after

    def current(self) -> VerifiedDocument:
        """The document; raises NotFound before the first `refresh`."""
        if self.verified is None:
            raise NotFound(
                "no service document was verified yet", code="not-found.document", claim="service document"
            )
        return self.verified

    def refresh(self, now: int) -> Flow[VerifiedDocument]:
        """Fetch the document, verify it in full, have the service prove that it lives and only went on.

        Raises:
            Rollback: the document or the log is older than one seen before.
            Refused: whatever `verify_document` refuses.
            TransportError: the service could not be reached.
        """
        before = self.head
        for pause in (0.0, *LAG_PAUSES):
            if pause:
                yield Pause(pause)
            # Where statements come faster than documents travel, one just replaced must do in the end.
            lenient = pause == LAG_PAUSES[-1]
            verified, possession = yield from self._fetch(now, lenient=lenient)
            if possession.document == verified.digest:
                break  # otherwise a cache on the way lags behind what the service serves
        else:
            raise Rollback(
                "the host serves another document than the service does",
                code="rollback.document",
                claim="service document",
                expected=possession.document.hex(),
                actual=verified.digest.hex(),
                hint="A cache may hold an old copy; try again",
            )
        self._require_newer(verified, possession)
        self.verified, self.possession = verified, possession
        self.verifications += 1
        seen = (
            f"{before.size} to {possession.head.size} entries"
            if before
            else f"{possession.head.size} entries, first visit"
        )
        self.steps = (
            *verified.steps,
            Step(name="possession", outcome="ok", detail=f"signed our nonce, one of {possession.size}"),
            Step(name="audit log", outcome="ok", detail=f"consistent: {seen}"),
        )
        return verified

    def _fetch(self, now: int, *, lenient: bool) -> Flow[tuple[VerifiedDocument, Possession]]:
        answer = yield Outgoing(method=b"GET", target=WELL_KNOWN)
        if answer.status != 200:
            raise _outer_error(answer)
        raw = bytes(answer.body[: MAX_DOCUMENT + 1])
        verified = verify_document(
            raw, policy=self.trust.key_service, service=self.trust.service, now=now, seen=self.collateral
        )
        held = verified.digest if lenient else None
        request = HeadRequest(nonce=os.urandom(NONCE_SIZE), head=self.head, document=held)
        content = yield from ask_key_service(verified.document, b"/possession", request.to_bytes())
        possession = Possession.from_bytes(content)
        service_key = verified.attested.binding.key(SIGNING_ALGORITHM)
        possession.verify(request, service=self.trust.service, service_key=service_key)
        self.head = possession.head  # whatever becomes of the rest: a later service must extend it
        return verified, possession

    def _require_newer(self, verified: VerifiedDocument, possession: Possession) -> None:
        head = verified.document.head
        before = self.verified.document.head.size if self.verified else 0
        if head.size < before or head.size > possession.head.size:
            raise Rollback(
                "the service document is older than one seen before",
                code="rollback.document",
                claim="tree head of the service document",
                expected=f"{before} to {possession.head.size} entries",
                actual=head.size,
                hint="A cache may hold an old copy; try again",
            )


def ask_key_service(document: ServiceDocument, path: bytes, content: bytes) -> Flow[memoryview]:
    """One encapsulated exchange with the key service; gives the content of its answer.

    Raises:
        CloisterError: what the key service answered inside the encapsulation.
        TransportError: what went wrong outside.
    """
    configuration, suite = select(document.keys)
    inner = bhttp.Request(
        method=b"POST", path=path, fields=((b"content-type", b"application/cbor"),), content=content
    )
    response = yield from exchange(configuration, suite, outer.KEY_SERVICE, inner)
    return memoryview(response.content)


def exchange(
    configuration: KeyConfiguration, suite: Suite, pool: bytes, inner: bhttp.Request
) -> Flow[bhttp.Response]:
    """One encapsulated exchange with an enclave."""
    sealer = encapsulation.begin(configuration, suite)
    return (yield from finish_exchange(sealer, pool, inner))


def finish_exchange(
    sealer: encapsulation.Encapsulation,
    pool: bytes,
    inner: bhttp.Request,
    hints: tuple[tuple[bytes, bytes], ...] = (),
    meanwhile: Callable[[], None] | None = None,
) -> Flow[bhttp.Response]:
    """The same, where the encapsulated key had to be known before the content was."""
    answer = yield Outgoing(
        method=b"POST",
        target=b"/ohttp",
        fields=((b"content-type", _REQUEST_TYPE), (outer.POOL, pool), *hints),
        content=sealer.seal_parts(inner.to_parts(pad=True)),
        meanwhile=meanwhile,
    )
    if answer.status != 200:
        raise _outer_error(answer)
    response = bhttp.Response.from_bytes(sealer.open(answer.body))
    if response.status != 200:
        raise problem.from_bytes(memoryview(response.content))
    return response


_OUTER_HINTS: Final = {
    404: "No such pool or page there: check the URL, and that workers of this pool run",
    503: "No enclave is up for this now: try again, or ask the operator",
}


def _outer_error(answer: Incoming) -> CloisterError:
    """What an outer status means. The host's word: it changes no trust, and leads to no weaker suite."""
    body = bytes(answer.body[:2048])
    if answer.status == 400 and _KEY_PROBLEM in body:
        return StaleKey(
            "no key opened the request", code="transport.key", claim="outer status", actual=answer.status
        )
    if answer.status == 413:
        return FormatError(
            "the request is too large for this service", code="request.size", claim="outer status", actual=413
        )
    if answer.status == 429:
        return Overloaded(code="overloaded.host", claim="outer status", expected=200, actual=429)
    return TransportError(
        "the host did not deliver the request",
        code="transport.status",
        claim="outer status",
        expected=200,
        actual=answer.status,
        hint=_OUTER_HINTS.get(answer.status, ""),
    )
