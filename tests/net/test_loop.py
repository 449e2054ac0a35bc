from __future__ import annotations

import asyncio

import uvloop

from cloister.net.loop import run


async def which() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_run_takes_uvloop_where_it_is_installed() -> None:
    loop = run(which())
    assert isinstance(loop, uvloop.Loop)
    assert loop.is_closed()
