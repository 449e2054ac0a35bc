"""`make demo`: it runs to its end, it can fail, it can be kept, and its search finds what is there."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import AccessRefused

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = [sys.executable, str(EXAMPLES / "demo.py")]
WIDE = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1"}
LINES = 34


def imported(name: str):
    """A module of the demonstration that needs no data set."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(f"demonstration.{name}")
    finally:
        sys.path.remove(str(EXAMPLES))


search = imported("search")
report = imported("report")


def root_of(output: str) -> Path:
    return Path(re.search(r"(\S*/cloister-demo-\w+)/operator", output)[1])


def processes_of(root: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [command] if str(root).encode() in (command := path.read_bytes()) else []
    return found


def require_gone(root: Path) -> None:
    """The kernel ends the last of a sandbox a moment after its launcher."""
    until = time.monotonic() + 10
    while (left := processes_of(root)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


@pytest.mark.timeout(300)
def test_every_line_holds_and_nothing_is_left_behind():
    done = subprocess.run(DEMO, env=WIDE, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{LINES} of {LINES} lines hold" in done.stdout
    assert "FAIL" not in done.stdout
    for code in (
        "appraisal.mr_enclave",
        "appraisal.not-subset",
        "access.grant",
        "replayed.request",
        "sealing.chunk",
        "tampered.signature",
        "binding.service",
        "appraisal.anchor",
        "binding.report-data",
        "appraisal.simulated",
        "evidence.simulated",
    ):
        assert f"      {code}: " in done.stdout
    assert re.search(r"accuracy 0\.99\d\d over 450 test samples", done.stdout)
    assert re.search(r"accuracy 0\.97\d\d over 143 test samples", done.stdout)
    root = root_of(done.stdout)
    assert not root.exists()
    require_gone(root)


@pytest.mark.timeout(300)
def test_faults_fail_their_lines_alone_and_a_kept_service_takes_the_commands_that_are_printed():
    arguments = ["--keep", "--fault", "answer", "--fault", "leak", "--fault", "grant"]
    process = subprocess.Popen([*DEMO, *arguments], env=WIDE, stdout=subprocess.PIPE, text=True)
    root = None
    watchdog = threading.Timer(240, process.terminate)
    watchdog.start()
    try:
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("data in "):
                break
        root = root_of(output)
        assert failed_lines(output) == {
            "digits: every answer equals plain ONNX Runtime's, bit for bit",
            "no inputs",
            "ungranted user",
            "after all of this the operator still has none of it",
        }
        commands = re.findall(r"^\S*cloister(?:\.cli)? (?:verify|infer) .*$", output, re.MULTILINE)
        assert len(commands) == 2
        assert re.search(
            r"^# take the user's grant back; .* wait \d+ s, then ask again$", output, re.MULTILINE
        )
        for command in commands:
            done = subprocess.run(
                shlex.split(command), capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        assert root.exists()
        require_gone(root)
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(60)
        process.stdout.close()
        if root is not None:
            shutil.rmtree(root)


def failed_lines(output: str) -> set[str]:
    return set(re.findall(r"^FAIL  (.+?) *$", output, re.MULTILINE))


@given(
    secret=st.binary(min_size=search.SHORTEST, max_size=48).filter(lambda data: len(set(data[:3])) > 1),
    before=st.binary(max_size=40),
    after=st.binary(max_size=40),
)
def test_a_needle_is_found_wherever_it_stands(secret, before, after):
    finder = search.Search(search.of_bytes("secret", secret))
    whole = before + secret + after
    assert "raw" in {needle.encoding for needle in finder.find(whole)}
    assert "hex" in {needle.encoding for needle in finder.find(whole.hex().encode())}
    assert "hex" in {needle.encoding for needle in finder.find(whole.hex().upper().encode())}
    if len(secret) >= 8:  # a shorter one leaves too few characters of its own
        assert "base64" in {needle.encoding for needle in finder.find(base64.b64encode(whole))}
        assert "base64" in {needle.encoding for needle in finder.find(base64.urlsafe_b64encode(whole))}


def test_a_needle_is_found_across_the_border_of_two_blocks():
    secret = b"\x01secret that must not be here"
    finder = search.Search(search.of_bytes("secret", secret))
    for back in range(len(secret) + 1):
        data = bytes(search._BLOCK - back) + secret + bytes(9)
        assert {needle.encoding for needle in finder.find(data)} == {"raw"}


def test_nothing_is_found_where_nothing_is():
    finder = search.Search(search.of_bytes("secret", os.urandom(32)))
    assert finder.find(os.urandom(1 << 16) + bytes(1 << 10)) == set()
    assert finder.find(b"") == finder.find(b"ab") == set()


def test_a_tensor_is_found_in_part_and_as_numbers():
    tensor = np.random.default_rng(1).random((4, 30), dtype=np.float32)
    finder = search.Search(search.of_tensor("input", tensor, most=100))
    part = tensor.tobytes()[64:128]
    assert {needle.encoding for needle in finder.find(part)} == {"raw"}
    assert {needle.encoding for needle in finder.find(str(tensor.ravel().tolist()).encode())} == {"json"}


def run_report(check):
    shown = report.Report(report.Console(file=io.StringIO(), width=100))
    held = shown.check("a line", check)
    return held, shown.summary(), shown.console.file.getvalue()


def test_a_line_that_returns_holds():
    assert run_report(lambda task: "found")[:2] == (True, True)


@pytest.mark.parametrize("error", [report.Failed("no"), AccessRefused(code="access.grant"), ValueError("x")])
def test_a_line_that_raises_fails_the_summary(error):
    def check(task):
        raise error

    held, good, text = run_report(check)
    assert not held
    assert not good
    assert "0 of 1 lines hold" in text


def test_no_line_at_all_is_no_success():
    assert not report.Report(report.Console(file=io.StringIO())).summary()


def test_a_refusal_that_does_not_come_fails():
    with pytest.raises(report.Failed, match="not refused"):
        report.require_refusal("access.grant", lambda: None)


def test_a_refusal_with_another_code_fails():
    def attempt():
        raise AccessRefused(code="access.expired")

    with pytest.raises(report.Failed, match=r"not with access\.grant"):
        report.require_refusal("access.grant", attempt)
    assert report.require_refusal("access.expired", attempt).startswith("access.expired")
