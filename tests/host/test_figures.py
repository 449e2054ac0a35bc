"""What a launcher asks its enclave about stages, over a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cloister.core.protocol.stages import Figures, Histogram
from cloister.host.launcher.serving import MAX_FIGURES, figures
from cloister.net.front import serve
from cloister.net.messages import Answer, Head

pytestmark = pytest.mark.asyncio


async def refuse(head: Head, body: object) -> Answer:
    return Answer(status=400)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=404),
        Answer(body=b""),
        Answer(body=b"{"),
        Answer(body=b"[" * 5000),
        Answer(body=b'{"age_s": 1, "stages": {"model": []}}'),
        Answer(body=bytes(MAX_FIGURES + 1)),
    ],
    ids=["none", "empty", "no JSON", "deep", "others", "large"],
)
async def test_what_an_enclave_does_not_tell(tmp_path: Path, answer: Answer) -> None:
    front = await serve(refuse, unix=tmp_path / "e", gets={b"/stages": lambda: answer})
    assert await figures(tmp_path / "e") is None
    await front.close(0.1)
    assert await figures(tmp_path / "e") is None


async def test_what_an_enclave_tells(tmp_path: Path) -> None:
    told = Figures(age=2.0, stages={"run": Histogram()})
    answer = Answer(body=json.dumps(told.to_data()).encode())
    front = await serve(refuse, unix=tmp_path / "e", gets={b"/stages": lambda: answer})
    assert await figures(tmp_path / "e") == told
    await asyncio.sleep(0)
    assert front.connections <= 1
    await front.close(0.1)
