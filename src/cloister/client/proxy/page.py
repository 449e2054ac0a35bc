"""``/verification``: what was verified before a request left, for people and as JSON."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any, Final

from cloister.client.proxy.forward import Forwarder
from cloister.core.protocol.document import PoolEntry
from cloister.core.times import time_text
from cloister.errors import CloisterError
from cloister.party.steps import told

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
td, th { padding: .25rem 1rem .25rem 0; vertical-align: top; border-bottom: 1px solid #8884; }
td { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; }
code, pre { font: 13px/1.4 ui-monospace, monospace; } pre { overflow-x: auto; }
.bad { border: 2px solid #c60; padding: .5rem 1rem; }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def facts(forwarder: Forwarder) -> dict[str, Any]:
    """The record as plain data for JSON; raises NotFound before the first verification.

    ``fresh`` says whether it still holds: where it doesn't, no request leaves before the next verification.
    """
    session = forwarder.client.session
    verified = session.conversation.current()
    evidence = verified.attested.evidence.to_dict()
    return {
        **forwarder.client.record.to_dict(),
        "stages_ms": forwarder.stages,
        "reuse": forwarder.reuse,
        "fresh": session.conversation.fresh(session.now()),
        "verified_at": forwarder.verified_at,
        "document": verified.digest.hex(),
        "key_service": {
            name: evidence[name] for name in ("tee", "simulated", "debug", "tcb_status", "measurements")
        },
        "aliases": session.aliases | {name: ids[0] for name, ids in _bare(forwarder).items()},
        "pools": [_pool(forwarder, entry) for entry in verified.document.pools],
    }


def _bare(forwarder: Forwarder) -> dict[str, list[str]]:
    aliases = forwarder.client.session.aliases
    return {
        name: ids for name, ids in forwarder.names.bare().items() if len(ids) == 1 and name not in aliases
    }


def _pool(forwarder: Forwarder, entry: PoolEntry) -> dict[str, Any]:
    try:
        forwarder.client.session.policy.require_pool(entry)
        refusal = ""
    except CloisterError as error:
        refusal = f"{error.code}: {error}"
    return {
        "pool": entry.pool.id.hex(),
        "name": entry.pool.name,
        "owner": entry.owner.hex() if entry.owner else "",
        "shared": entry.pool.shared,
        "epoch": entry.epoch,
        "not_after": entry.not_after,
        "accepted": not refusal,
        "refusal": refusal,
        "models": [served.model for served in entry.models],
        "workers": entry.pool.policy.to_toml(),
    }


def html(forwarder: Forwarder) -> str:
    """The record as a page that loads nothing and runs nothing."""
    found = facts(forwarder)
    service = found["key_service"]
    parts = ["<h1>Cloister: what was verified</h1>"]
    if found["simulated"]:
        parts.append(_bad("Simulated: this TEE protects nothing from its machine's administrator."))
    if not found["fresh"]:
        parts.append(
            _bad("This verification ended, and the last attempt at another failed. Nothing is sent.")
        )
    summary = [
        ("service", found["service"]),
        ("verified", time_text(found["verified_at"])),
        ("holds until", time_text(found["not_after"])),
        ("epoch", found["epoch"]),
        ("key service", f"{service['tee']}, TCB {service['tcb_status'] or 'without a status'}"),
        *((name, value) for name, value in service["measurements"].items()),
    ]
    parts += ["<h2>Service</h2>", _table(("", ""), summary)]
    record = forwarder.client.record
    rows = [(step.name, step.outcome, step.detail) for step in told(record.steps, record.evidence)]
    parts += ["<h2>Steps</h2>", _table(("step", "outcome", "detail"), rows)]
    for pool in found["pools"]:
        parts += _pool_parts(pool)
    aliases = list(found["aliases"].items())
    if aliases:
        parts += ["<h2>Short names</h2>", _table(("name", "model"), aliases)]
    if found["stages_ms"]:
        stages = [(name, f"{value:.3f}") for name, value in found["stages_ms"].items()]
        title = f"Last answer: {found['reuse']}" if found["reuse"] else "Last answer"
        parts += [f"<h2>{title}</h2>", _table(("stage", "ms"), stages)]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Cloister: verification</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _pool_parts(pool: dict[str, Any]) -> list[str]:
    rows = [
        ("id", pool["pool"]),
        ("policy accepts it", "yes" if pool["accepted"] else f"no: {pool['refusal']}"),
        ("epoch", f"{pool['epoch']}, until {time_text(pool['not_after'])}"),
        ("owner", "several: shared" if pool["shared"] else pool["owner"] or "none yet"),
        ("models", ", ".join(pool["models"]) or "none"),
    ]
    return [
        f"<h2>Pool {_shown(pool['name'])}</h2>",
        _table(("", ""), rows),
        f"<p>What its workers measure:</p><pre>{_shown(pool['workers'])}</pre>",
    ]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f"<th>{_shown(each)}</th>" for each in heads) if any(heads) else ""
    lines = ["<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _bad(text: str) -> str:
    return f'<p class="bad">{_shown(text)}</p>'


def _shown(value: object) -> str:
    """Text as a page shows it: escaped, and control characters visible."""
    text = "".join(
        char if char == "\n" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value)
    )
    return escape(text, quote=True)
