"""The load generator counts what happened: answers, overload, errors; and what the kernel tells of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.load import Load, Slice, TargetFailed, _Bare, _Http, question  # noqa: E402
from benchmarks.models import locate  # noqa: E402

from benchmarks import processes  # noqa: E402
from cloister.errors import CloisterError, Overloaded  # noqa: E402
from cloister.net.body import Body  # noqa: E402
from cloister.net.front import Answer, Head, serve  # noqa: E402


def ask(tmp_path: Path, handler: Callable[[int], Answer], clients: int = 2, seconds: float = 0.2) -> Slice:
    """What the generator counts of a server whose n-th answer is ``handler(n)``."""
    (tmp_path / "body").write_bytes(b"question")
    (tmp_path / "answer").write_bytes(b"right")
    asked = 0

    async def handle(head: Head, body: Body) -> Answer:
        nonlocal asked
        asked += 1
        assert bytes(await body.whole()) == b"question"
        return handler(asked)

    async def main() -> Slice:
        front = await serve(handle)
        target = _Http(
            port=front.port,
            path="/ohttp",
            fields={},
            body=str(tmp_path / "body"),
            answer=str(tmp_path / "answer"),
        )
        try:
            await target.prepare(clients)
            return await target.run(clients, seconds)
        finally:
            await target.aclose()
            await front.close(1.0)

    return asyncio.run(main())


RIGHT = Answer(body=b"the right one")


def test_answers_are_counted_and_timed(tmp_path: Path) -> None:
    found = ask(tmp_path, lambda _: RIGHT)
    assert len(found.latencies) > 10
    assert found.seconds >= 0.2
    assert found.errors == {}
    assert found.rps == pytest.approx(len(found.latencies) / found.seconds)
    assert 0 < found.ms(0.5) <= found.ms(0.99)
    assert 0 < found.cores <= 1.5


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_declared_and_counted_apart(tmp_path: Path, status: int) -> None:
    found = ask(tmp_path, lambda count: RIGHT if count % 2 else Answer(status=status))
    assert found.declared > 0
    assert found.errors == {f"http.{status}": found.declared}
    assert found.undeclared == 0


def test_any_other_status_is_an_error(tmp_path: Path) -> None:
    found = ask(tmp_path, lambda count: RIGHT if count % 2 else Answer(status=500))
    assert found.undeclared == found.errors["http.500"] > 0
    assert found.declared == 0


def test_a_wrong_answer_is_an_error(tmp_path: Path) -> None:
    found = ask(tmp_path, lambda count: RIGHT if count % 2 else Answer(body=b"another"))
    assert found.undeclared == found.errors["wrong-answer"] > 0


@pytest.mark.parametrize(
    ("answer", "error"), [(Answer(body=b"another"), CloisterError), (Answer(status=503), Overloaded)]
)
def test_a_target_that_is_not_right_at_first_is_refused(
    tmp_path: Path, answer: Answer, error: type[CloisterError]
) -> None:
    with pytest.raises(error):
        ask(tmp_path, lambda _: answer)


def test_requests_in_flight_at_the_end_are_waited_for_and_the_wait_counts() -> None:
    async def late() -> Slice:
        target = _Http.__new__(_Http)

        async def ask_slowly(client: int) -> None:
            await asyncio.sleep(0.15)

        target.ask = ask_slowly  # type: ignore[method-assign]
        return await target.run(1, 0.2)

    found = asyncio.run(late())
    assert len(found.latencies) == 2
    assert found.seconds >= 0.3


def test_bare_runs_in_as_many_threads(tmp_path: Path) -> None:
    target = _Bare(plain=str(locate("digits", tmp_path)))
    found = asyncio.run(target.run(3, 0.1))
    assert len(found.latencies) > 3
    assert found.seconds >= 0.1


def test_slices_add_up() -> None:
    one = Slice(seconds=1, latencies=(0.1, 0.2), errors={"a": 1}, declared=1, cpu=0.5)
    two = Slice(seconds=3, latencies=(0.3,), errors={"a": 1, "b": 1}, declared=0, cpu=0.5)
    both = one + two
    assert (both.rps, both.cores, both.undeclared) == (0.75, 0.25, 2)
    assert both.errors == {"a": 2, "b": 1}
    assert both.ms(1.0) == pytest.approx(300)
    assert Slice().rps == 0


def test_its_process_tells_why_a_target_fails_and_goes_on(tmp_path: Path) -> None:
    model = locate("digits", tmp_path)
    (tmp_path / "any").write_bytes(b"any")
    nowhere = {"port": 9, "path": "/", "fields": {}, "body": tmp_path / "any", "answer": tmp_path / "any"}
    with Load() as load:
        with pytest.raises(TargetFailed, match=r"can't connect to 127\.0\.0\.1:9"):
            load.open("peer", "http", **nowhere)
        load.open("bare", "bare", plain=model)
        assert load.run("bare", clients=1, seconds=0.05).latencies


def test_a_question_comes_with_the_answer_of_bare_onnx_runtime(tmp_path: Path) -> None:
    inputs, expected = question(locate("digits", tmp_path))
    assert inputs["image"].shape == (1, 1, 8, 8)
    assert expected["probabilities"].sum() == pytest.approx(1)


def test_processes_are_seen_with_what_descends_from_them() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    before = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        until = time.monotonic() + 20
        while len(processes.family(child.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        members = processes.family(child.pid)
        assert members[0] == child.pid
        assert len(members) == 2
        assert members[1] in processes.family(os.getpid())
        assert before - 0.1 < processes.started(child.pid) <= processes.started(members[1])
        assert 1 < processes.resident_mib(members[1]) < processes.resident_mib(child.pid)
        assert processes.peak_mib(child.pid) >= processes.resident_mib(child.pid) - 1
        assert processes.processor_seconds(child.pid) >= 0
    finally:
        os.killpg(child.pid, 9)
        child.wait()
    assert processes.resident_mib(child.pid) == 0
    assert processes.started(child.pid) == 0
