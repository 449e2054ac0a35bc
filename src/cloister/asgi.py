"""How the host and a user's proxy run their apps: uvicorn, silent, with no more of it than HTTP/1.1."""

from __future__ import annotations

from typing import Any

import uvicorn
from starlette.types import ASGIApp


def configuration(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """Uvicorn's settings for ``app``.

    Nothing is logged of a request. Neither its fields nor the answer's say who serves, or believe a peer who
    says whom he asks for.

    Args:
        app: The application; it has no lifespan events.
        more: Further settings of `uvicorn.Config`.
    """
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        **more,
    )
