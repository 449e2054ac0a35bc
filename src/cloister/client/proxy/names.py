"""What a client may call a model: its id ``<owner>/<name>``, an alias, or the bare name if only one has."""

from __future__ import annotations

import re
from typing import Final

from cloister.client.session import Session
from cloister.core.protocol.document import VerifiedDocument
from cloister.core.protocol.statement import owner_of
from cloister.errors import CloisterError, NotFound, UsageError

_ALIAS: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def parse_aliases(texts: list[str]) -> dict[str, str]:
    """Aliases from ``short=owner/name``; raises UsageError."""
    aliases: dict[str, str] = {}
    for text in texts:
        short, _, model = text.partition("=")
        try:
            owner_of(model)
        except CloisterError:
            model = ""
        if not model or not _ALIAS.fullmatch(short) or short in aliases:
            raise UsageError(
                "the alias can't be used",
                code="proxy.alias",
                claim="--alias",
                expected="SHORT=<owner>/<name>, each SHORT once, letters, digits, dot, dash, underscore",
                actual=text[:200],
            )
        aliases[short] = model
    return aliases


class Names:
    """Resolves names under the document that holds.

    A bare name that was used keeps its meaning while the proxy runs: whoever publishes another model of that
    name can't have a client's inputs go there.

    Args:
        session: Whose document and policy decide, and whose aliases come first.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._document: VerifiedDocument | None = None
        self._bare: dict[str, list[str]] = {}
        self._used: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        """The model id that a client means.

        Raises:
            NotFound: no such model, or a path that is none of a model.
            UsageError: several models have that name.
        """
        known = self._session.aliases.get(name) or self._used.get(name)
        if known is not None:
            return known
        if "/" in name:
            return self._require_id(name)
        candidates = self.bare().get(name, [])
        if len(candidates) > 1:
            raise UsageError(
                "several models have this name",
                code="proxy.alias",
                claim="model",
                expected="one of " + ", ".join(candidates[:8]),
                actual=name[:80],
                hint="Use the whole id, or start the proxy with --alias",
            )
        if not candidates:
            raise NotFound(
                "no pool of this service serves the model",
                code="not-found.model",
                claim="model",
                expected="an id, an alias, or the name of a served model",
                actual=name[:80],
                hint="The proxy's /verification lists them",
            )
        self._used[name] = candidates[0]
        return candidates[0]

    def bare(self) -> dict[str, list[str]]:
        """Name -> ids of the models that are served in pools which the policy accepts."""
        verified = self._session.conversation.current()
        if verified is not self._document:
            found: dict[str, list[str]] = {}
            for model in accepted_models(self._session):
                found.setdefault(model.partition("/")[2], []).append(model)
            self._bare, self._document = found, verified
        return self._bare

    def _require_id(self, name: str) -> str:
        try:
            owner_of(name)
        except CloisterError as error:
            raise NotFound(
                "the proxy has no such path",
                code="not-found.route",
                claim="path",
                expected="/v2/models/<owner>/<name>[/versions/1][/infer|/ready]",
                actual=name[:120],
            ) from error
        return name


def accepted_models(session: Session) -> list[str]:
    """Ids of the models that the policy lets be used, sorted; raises NotFound before any verification."""
    models = {
        served.model for entry in session.conversation.current().document.pools for served in entry.models
    }
    accepted = []
    for model in sorted(models):
        try:
            session.place(model)
        except CloisterError:
            continue
        accepted.append(model)
    return accepted
