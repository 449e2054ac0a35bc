"""Publishing from the owner's desk: verify the service, upload ciphertext, sign and deliver a statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from cloister.core.encoding import decode, unpack
from cloister.core.ohttp import hpke
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol.configuration import require_anchor
from cloister.core.protocol.conversation import Conversation, ask_key_service
from cloister.core.protocol.document import VerifiedDocument
from cloister.core.protocol.exchange import Publication, Receipt, StatementQuery
from cloister.core.protocol.flow import Flow
from cloister.core.protocol.release import model_key_info
from cloister.core.protocol.statement import SealedModel, SignedStatement, Statement
from cloister.core.verifier.appraisal import AppraisalPolicy, appraise
from cloister.errors import CloisterError, NotFound, Rollback, UsageError
from cloister.owner.connection import Connection
from cloister.owner.desk import DeskModel
from cloister.owner.policy import ModelPolicy

PIECE: Final = 1 << 20  # bytes of an upload
Progress = Callable[[int, int], None]


class Publisher(Connection):
    """Publishes a desk's models. A key is sealed to the key service only after that was verified."""

    @property
    def conversation(self) -> Conversation:
        """What was verified of the service."""
        return self._conversation

    def verify(self) -> VerifiedDocument:
        """Verify the service, and that it extends what this desk has seen of it."""
        return self._carrier.run(self._refresh())

    def publish(
        self,
        name: str,
        policy: ModelPolicy,
        sealed_file: Path,
        *,
        pool: bytes | None = None,
        progress: Progress | None = None,
    ) -> Statement:
        """Upload a sealed model and publish its next statement with this policy.

        Args:
            name: A model on the desk.
            policy: Who may hold its key, and how it may be served.
            sealed_file: What `seal_model` wrote.
            pool: The pool that shall serve it; by default the owner's own, or the only one there is where
                it isn't shared.
            progress: Called with bytes uploaded so far and in all.

        Raises:
            Refused: the service isn't one that the policy accepts, or it refuses the statement.
        """
        self._require_key_service(self.verify(), policy.key_service)
        model = self._desk.model(name)
        current = self._current(model)
        pool = pool or (model.pool if current else None) or self._only_pool()
        self._upload(model.sealed, sealed_file, progress)
        statement = self._next(
            model,
            current,
            sealed_model=model.sealed,
            release_policy=policy.release,
            key_service=policy.key_service,
            grants=dict(current.grants) if current else {},
            options=policy.options,
        )
        return self._send(model, statement, pool, with_key=True)

    def grant(self, name: str, user: bytes, expiry: int) -> Statement:
        """Grant a model to a user (id, 32 bytes) until ``expiry`` (Unix seconds)."""
        return self._amend(name, lambda grants: {**grants, user: expiry})

    def revoke(self, name: str, user: bytes) -> Statement:
        """Take a user's grant back; workers follow within their lease.

        Raises:
            NotFound: the user has none.
        """

        def without(grants: dict[bytes, int]) -> dict[bytes, int]:
            if user not in grants:
                raise NotFound(code="not-found.grant", claim="grant", expected=user.hex(), actual="none")
            return {other: expiry for other, expiry in grants.items() if other != user}

        return self._amend(name, without)

    def _amend(self, name: str, change: Callable[[dict[bytes, int]], dict[bytes, int]]) -> Statement:
        verified = self.verify()
        model = self._desk.model(name)
        current = self._current(model)
        if current is None or model.pool is None:
            raise UsageError(
                "the model was not published at this service yet",
                code="owner.unpublished",
                claim=name,
                hint="Run: cloister owner publish",
            )
        self._require_key_service(verified, current.key_service)
        statement = self._next(
            model,
            current,
            sealed_model=current.sealed_model,
            release_policy=current.release_policy,
            key_service=current.key_service,
            grants=change(dict(current.grants)),
            options=current.options,
        )
        return self._send(model, statement, model.pool, with_key=False)

    def _current(self, model: DeskModel) -> Statement | None:
        """The statement that *this* service took last: one for another service is none here."""
        current = model.current()
        return current if current and current.service == self._conversation.trust.service else None

    def _require_key_service(self, verified: VerifiedDocument, policy: AppraisalPolicy) -> None:
        """Refuse, before a key leaves the desk, a key service that the statement itself doesn't accept."""
        require_anchor(verified.attested.configuration, policy)
        appraise(verified.attested.evidence, policy, now=self._now())

    def _next(self, model: DeskModel, current: Statement | None, **fields: object) -> Statement:
        return Statement(
            service=self._conversation.trust.service,
            model=self._desk.model_id(model.name),
            version=current.version + 1 if current else 1,
            previous=current.digest if current else bytes(32),
            **fields,  # type: ignore[arg-type]  # the fields of a statement, named by the callers above
        )

    def _send(self, model: DeskModel, statement: Statement, pool: bytes, *, with_key: bool) -> Statement:
        signed = SignedStatement.sign(statement, self._desk.key)
        receipt = self._carrier.run(self._deliver(model, statement, signed, pool, with_key=with_key))
        self._desk.keep(replace(model, statement=signed, pool=pool))
        known = self._conversation.head
        if known is None or receipt.head.size >= known.size:
            self._conversation.head = receipt.head
        self._desk.remember(self._conversation)
        return statement

    def _deliver(
        self, model: DeskModel, statement: Statement, signed: SignedStatement, pool: bytes, *, with_key: bool
    ) -> Flow[Receipt]:
        verified = self._conversation.current()
        configuration, suite = select(verified.document.keys)
        sealed_key = None
        if with_key:
            sealed_key = hpke.seal_to(
                suite,
                configuration.public_key,
                model.key.reveal(),
                info=model_key_info(self._conversation.trust.service),
                aad=statement.digest,
            )
        publication = Publication(
            statement=signed, sealed_key=sealed_key, key_id=configuration.key_id, pool=pool
        )
        try:
            content = yield from ask_key_service(verified.document, b"/statements", publication.to_bytes())
        except Rollback as error:
            yield from self._explain(verified, model, error)
            raise
        receipt = Receipt.from_bytes(content)
        receipt.head.verify(self._conversation.trust.service)
        return receipt

    def _explain(self, verified: VerifiedDocument, model: DeskModel, error: Rollback) -> Flow[None]:
        """Tell a lost receipt (the service is ahead of the desk) from a store that was put back."""
        name = self._desk.model_id(model.name)
        query = StatementQuery.sign(
            self._desk.key, service=self._conversation.trust.service, model=name, time=self._now()
        )
        content = yield from ask_key_service(verified.document, b"/statements/current", query.to_bytes())
        fields = unpack(decode(content, what="statement"), "current statement", pool=bytes, statement=dict)
        signed = SignedStatement.from_data(fields["statement"])
        theirs, ours = signed.open(), self._current(model)
        if (
            theirs.model == name
            and signed.owner_key == self._desk.key.public
            and (ours is None or theirs.version > ours.version)
        ):
            self._desk.keep(replace(model, statement=signed, pool=fields["pool"]))
            raise UsageError(
                "the service had taken a statement whose receipt was lost; the desk has it now",
                code="owner.receipt",
                claim="statement version",
                expected=ours.version if ours else 0,
                actual=theirs.version,
                hint="Run the command again",
            ) from error

    def _only_pool(self) -> bytes:
        pools = self._conversation.current().document.pools
        ours = [entry.pool.id for entry in pools if entry.owner == self._desk.owner]
        if len(ours) == 1:
            return ours[0]
        if len(pools) != 1 or pools[0].pool.shared:  # nobody gets into a shared pool without saying so
            raise UsageError(
                "say which pool shall serve the model",
                code="owner.pool",
                claim="pool",
                expected=", ".join(f"{entry.pool.name} {entry.pool.id.hex()}" for entry in pools) or "a pool",
                actual="none named",
            )
        return pools[0].pool.id

    def _upload(self, sealed: SealedModel, path: Path, progress: Progress | None) -> None:
        try:
            answer = self._carrier.upload(
                f"/blobs/{sealed.blob.hex()}", _pieces(path, sealed.size, progress), sealed.size
            )
        except OSError as error:
            raise UsageError(
                "the sealed file can't be read", code="owner.file", claim=str(path), actual=error.strerror
            ) from error
        if answer.status not in (200, 201, 204):
            raise CloisterError(
                "the host did not take the sealed model",
                code="owner.upload",
                claim="upload",
                expected="status 201",
                actual=answer.status,
                hint="Seal the model again if its file was changed",
            )


def _pieces(path: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            done += len(piece)
            yield piece
            if progress is not None:
                progress(done, size)
