"""Whose requests the proxy takes: programs on this machine, never a page in its browser.

A page may send requests to 127.0.0.1, and a name of its own may lead there (DNS rebinding). A browser gives
both away: the ``Host`` field holds the page's name, ``Origin`` and ``Sec-Fetch-Site`` say who asks. There is
no CORS, so a page reads no answer either.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from cloister.errors import AccessRefused

_OWN_SITES: Final = frozenset({b"same-origin", b"none"})  # Fetch Metadata: this origin, or typed in by hand


def require_local(fields: Iterable[tuple[bytes, bytes]], *, listen: str | None) -> None:
    """Refuse a request that a foreign page may have caused.

    Args:
        fields: The request's header fields, names in lower case.
        listen: The host of ``--dangerous-listen``; None where only this machine reaches the proxy. With it,
            any IP address is taken besides, as it stands in no page's name.

    Raises:
        AccessRefused: ``proxy.host`` or ``proxy.origin``.
    """
    hosts, origins, sites = [], [], []
    for name, value in fields:
        if name == b"host":
            hosts.append(value)
        elif name == b"origin":
            origins.append(value)
        elif name == b"sec-fetch-site":
            sites.append(value)
    if len(hosts) != 1 or not _is_own(hosts[0], listen):
        raise AccessRefused(
            "the request was made for another host than this proxy",
            code="proxy.host",
            claim="Host",
            expected="localhost, or an address of this machine",
            actual=hosts[0].decode("latin-1")[:80] if hosts else "none",
        )
    own = b"http://" + hosts[0].lower()
    foreign = [origin for origin in origins if origin.lower() != own]
    foreign += [site for site in sites if site not in _OWN_SITES]
    if foreign:
        raise AccessRefused(
            "web pages may not use this proxy",
            code="proxy.origin",
            claim="Origin",
            expected="none",
            actual=foreign[0].decode("latin-1")[:80],
        )


def _is_own(field: bytes, listen: str | None) -> bool:
    try:
        text = field.decode("ascii").lower()
    except UnicodeDecodeError:
        return False
    name, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        name, port = text, "80"
    if not port.isdigit():
        return False
    if name == "localhost" or (listen is not None and name == listen.lower()):
        return True
    try:
        literal = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        address = ipaddress.ip_address(literal)
    except ValueError:
        return False
    return address.is_loopback or listen is not None
