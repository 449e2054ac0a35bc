"""Certificates in PEM, the text form of DER (RFC 7468)."""

from __future__ import annotations

import base64
import textwrap


def to_pem(der: bytes) -> str:
    """A certificate in PEM."""
    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    return "\n".join(("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""))
