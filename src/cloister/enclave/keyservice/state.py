"""What the log amounts to: pools, models and the newest epoch. A pure fold over entries."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister.core.protocol.pool import Pool
from cloister.core.protocol.statement import SignedStatement, Statement
from cloister.core.secret import Secret
from cloister.enclave.keyservice.entries import Entry
from cloister.errors import AccessRefused, BindingRefused, FormatError, NotFound, Rollback

NO_STATEMENT = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """The newest statement of a model, its key, and the pool that serves it."""

    statement: Statement
    signed: SignedStatement
    digest: bytes
    key: Secret
    pool: bytes
    index: int  # of the log entry


@dataclass(slots=True)
class State:
    """Everything that the key service knows but its own identity. Changed by `apply` alone."""

    time: int = 0
    epoch: int = 0
    pools: dict[bytes, Pool] = field(default_factory=dict)
    pool_entries: dict[bytes, int] = field(default_factory=dict)  # pool -> index of its log entry
    owners: dict[bytes, bytes] = field(default_factory=dict)  # pool -> the one owner that it serves
    models: dict[str, ModelState] = field(default_factory=dict)

    def require(self, entry: Entry) -> None:
        """Refuse an entry that could not be replayed after what is there; so none is ever written.

        Raises:
            FormatError: it is older than the one before, or a first statement without a key.
            Refused: its statement is not the next in its chain, or does not fit its pool.
        """
        if entry.time < self.time:
            raise FormatError(claim="log entry time", expected=f"at least {self.time}", actual=entry.time)
        if entry.kind == "statement":
            statement = SignedStatement.from_data(entry.body["statement"]).open()
            self.require_next(statement)
            self.require_pool(statement, entry.body["pool"])
            if entry.secret is None and statement.model not in self.models:
                raise FormatError("a first statement without a key", claim="log entry")

    def apply(self, entry: Entry, index: int) -> None:
        """Take the entry at an index into account; raises as `require`, and then changes nothing."""
        self.require(entry)
        self.time = entry.time
        if entry.kind == "epoch":
            self.epoch = entry.body["epoch"]
        elif entry.kind == "pool":
            pool = Pool.from_data(entry.body["pool"])
            self.pools[pool.id] = pool
            self.pool_entries[pool.id] = index
            if entry.body["owner"] is not None:
                self.owners[pool.id] = entry.body["owner"]
        elif entry.kind == "statement":
            self._apply_statement(entry, index)

    def _apply_statement(self, entry: Entry, index: int) -> None:
        signed = SignedStatement.from_data(entry.body["statement"])
        statement = signed.open()
        key = entry.secret or self.models[statement.model].key
        pool = entry.body["pool"]
        if not self.pools[pool].shared:
            self.owners.setdefault(pool, statement.owner)
        self.models[statement.model] = ModelState(
            statement=statement, signed=signed, digest=statement.digest, key=key, pool=pool, index=index
        )

    def pool(self, pool_id: bytes) -> Pool:
        """A pool by its id; raises NotFound."""
        pool = self.pools.get(pool_id)
        if pool is None:
            raise NotFound(
                code="not-found.pool", claim="pool", expected="a pool of this service", actual=pool_id.hex()
            )
        return pool

    def models_of(self, pool_id: bytes) -> list[ModelState]:
        """The models that a pool serves, by name."""
        return sorted(
            (model for model in self.models.values() if model.pool == pool_id),
            key=lambda item: item.statement.model,
        )

    def require_next(self, statement: Statement) -> None:
        """Refuse a statement that does not follow the newest one.

        Raises:
            Rollback: its version isn't the next, or it follows another statement.
        """
        current = self.models.get(statement.model)
        version = current.statement.version + 1 if current else 1
        if statement.version != version:
            raise Rollback(
                "the statement is not the next in its chain",
                code="rollback.statement",
                claim="statement version",
                expected=version,
                actual=statement.version,
                hint="If you signed more versions than the service knows, its store was put back",
            )
        previous = current.digest if current else NO_STATEMENT
        if statement.previous != previous:
            raise Rollback(
                "the statement follows another one than the service holds",
                code="rollback.chain",
                claim="previous statement",
                expected=previous.hex(),
                actual=statement.previous.hex(),
            )

    def require_pool(self, statement: Statement, pool_id: bytes) -> None:
        """Refuse a model whose owner or release policy does not fit the pool.

        Raises:
            AccessRefused: the pool serves another owner.
            AppraisalRefused: the pool admits workers that the owner's release policy doesn't.
            NotFound: there is no such pool.
        """
        pool = self.pool(pool_id)
        owner = self.owners.get(pool_id)
        if not pool.shared and owner is not None and owner != statement.owner:
            raise AccessRefused(
                "the pool serves another owner",
                code="access.pool",
                claim="pool owner",
                expected=owner.hex(),
                actual=statement.owner.hex(),
                hint="Ask the operator for a pool of your own",
            )
        statement.release_policy.admits(pool.policy)


def require_service(statement: Statement, service: bytes) -> None:
    """Refuse a statement that was signed for another service; raises BindingRefused."""
    if statement.service != service:
        raise BindingRefused(
            code="binding.service",
            claim="statement's service",
            expected=service.hex(),
            actual=statement.service.hex(),
        )
