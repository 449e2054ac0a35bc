"""Times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def time_text(seconds: int) -> str:
    """Unix seconds as ISO 8601 in UTC; as they are where no calendar has them."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
