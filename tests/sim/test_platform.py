from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.encoding import decode, encode
from cloister.core.evidence.bundle import Evidence
from cloister.core.secret import Secret
from cloister.core.verifier import verify
from cloister.core.verifier.anchors import TrustAnchors
from cloister.enclave.attester import open_attester
from cloister.enclave.attester.simulated import SimulatedAttester
from cloister.errors import (
    CloisterError,
    EvidenceError,
    EvidenceRefused,
    FormatError,
    Unavailable,
    UsageError,
)
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.device import MAX_REQUEST, TeeDevice
from cloister.sim.measurement import SIMULATED_SIGNER, Measurement
from cloister.sim.platform import SimulatedEnclave, SimulatedPlatform
from cloister.sim.sandbox import Sandbox
from sim.fakes import FakeAuthority, fake_source

NOW = 1_750_000_000
MEASURED = Measurement(
    role="worker", mr_enclave=b"m" * 32, mr_signer=SIMULATED_SIGNER, isv_prod_id=2, isv_svn=1, manifest={}
)


@contextlib.contextmanager
def device(authority: FakeAuthority | None = None) -> Iterator[socket.socket]:
    """The enclave's end of a served device."""
    here, there = socket.socketpair()
    served = TeeDevice(here, authority or FakeAuthority(), MEASURED, lambda: NOW)
    served.start()
    there.settimeout(5)
    try:
        yield there
    finally:
        there.close()
        served.close()


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def answer(there: socket.socket) -> dict[str, object]:
    size = struct.unpack(">I", there.recv(4, socket.MSG_WAITALL))[0]
    return decode(there.recv(size, socket.MSG_WAITALL), what="answer")


def ask(there: socket.socket, body: bytes) -> dict[str, object]:
    there.sendall(frame(body))
    return answer(there)


BAD_REQUESTS = {
    "no CBOR": b"\xff\xff",
    "no map": encode(["evidence"]),
    "no operation": encode({}),
    "an unknown operation": encode({"op": "debug"}),
    "short report data": encode({"op": "evidence", "report_data": bytes(63)}),
    "long report data": encode({"op": "evidence", "report_data": bytes(65)}),
    "report data that is text": encode({"op": "evidence", "report_data": "a" * 64}),
    "another measurement": encode({"op": "evidence", "report_data": bytes(64), "mr_enclave": b"x" * 32}),
    "a debug enclave": encode({"op": "evidence", "report_data": bytes(64), "debug": True}),
    "another enclave's key": encode({"op": "sealing-key", "mr_enclave": b"x" * 32}),
    "a second encoding": b"\xa1\x62op\x78\x0bsealing-key",
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_device_refuses(name: str) -> None:
    with device() as there:
        assert list(ask(there, BAD_REQUESTS[name])) == ["error"]
        assert "sealing-key" in ask(there, encode({"op": "sealing-key"})), "and goes on with the next request"


@pytest.mark.parametrize("size", [0, MAX_REQUEST + 1, 0xFFFFFFFF])
def test_device_refuses_a_length_out_of_bounds_and_hangs_up(size: int) -> None:
    with device() as there:
        there.sendall(struct.pack(">I", size))
        assert list(answer(there)) == ["error"]
        assert there.recv(1) == b""


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_device_gives_nothing_away_for_any_bytes(data: bytes) -> None:
    with device() as there:
        there.sendall(data)
        there.shutdown(socket.SHUT_WR)
        received = there.makefile("rb").read()
    assert bytes(reversed(MEASURED.mr_enclave)) not in received
    assert b"quote" not in received


def test_device_survives_an_authority_that_fails() -> None:
    class Broken(FakeAuthority):
        def sealing_key(self, mr_enclave: bytes) -> Secret:
            raise RuntimeError("very secret text")

    with device(Broken()) as there:
        assert ask(there, encode({"op": "sealing-key"})) == {"error": "the simulated authority failed"}
        assert "evidence" in ask(there, encode({"op": "evidence", "report_data": bytes(64)}))


def test_device_answers_with_its_own_measurement() -> None:
    with device() as there:
        found = ask(there, encode({"op": "evidence", "report_data": b"r" * 64}))["evidence"]
        quote = decode(Evidence.from_data(found).quote, what="quote")
    assert quote == [b"r" * 64, MEASURED.mr_enclave, SIMULATED_SIGNER, 2, 1, False, NOW]


def test_closing_a_device_ends_its_thread() -> None:
    before = threading.active_count()
    with device():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# The attester: the enclave's side.


@contextlib.contextmanager
def attester_of(reply: bytes) -> Iterator[SimulatedAttester]:
    """An attester whose device answers with these bytes and closes."""
    here, there = socket.socketpair()
    here.sendall(reply)
    here.shutdown(socket.SHUT_WR)
    attester = SimulatedAttester(there)
    try:
        yield attester
    finally:
        attester.close()
        here.close()


def test_attester_without_a_tee_is_refused() -> None:
    with pytest.raises(UsageError, match="CLOISTER_TEE_FD") as refusal:
        open_attester({})
    assert refusal.value.code == "attester.none"


@pytest.mark.parametrize("descriptor", ["", "x", "-1", "1.0", "999999", "9" * 30, "²"])
def test_attester_refuses_a_descriptor_that_is_none(descriptor: str) -> None:
    with pytest.raises(UsageError) as refusal:
        open_attester({"CLOISTER_TEE_FD": descriptor})
    assert refusal.value.code == "attester.device"


def test_attester_refuses_a_file_and_another_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UsageError):
        open_attester({"CLOISTER_TEE_FD": str(file.fileno())})
    with socket.socket(socket.AF_INET) as other, pytest.raises(UsageError):
        open_attester({"CLOISTER_TEE_FD": str(other.fileno())})


@pytest.mark.parametrize("size", [0, 63, 65])
def test_attester_refuses_report_data_of_another_length(size: int) -> None:
    with attester_of(b"") as attester, pytest.raises(UsageError) as refusal:
        attester.evidence(bytes(size))
    assert refusal.value.claim == "report_data"


BAD_ANSWERS = {
    "nothing": (b"", Unavailable),
    "half a length": (b"\0\0", Unavailable),
    "half an answer": (frame(encode({"sealing-key": bytes(32)}))[:-1], Unavailable),
    "an impossible length": (struct.pack(">I", 1 << 31), FormatError),
    "no CBOR": (frame(b"\xff"), FormatError),
    "no map": (frame(encode([1])), FormatError),
    "something else": (frame(encode({"evidence": {}})), FormatError),
    "a short key": (frame(encode({"sealing-key": bytes(31)})), FormatError),
    "a key that is text": (frame(encode({"sealing-key": "k" * 32})), FormatError),
    "two answers in one": (frame(encode({"sealing-key": bytes(32), "error": ""})), FormatError),
    "a refusal": (frame(encode({"error": "no"})), Unavailable),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_attester_refuses_an_answer_that_is(name: str) -> None:
    reply, expected = BAD_ANSWERS[name]
    with attester_of(reply) as attester, pytest.raises(expected):
        attester.sealing_key()


def test_attester_refuses_evidence_that_does_not_parse() -> None:
    with attester_of(frame(encode({"evidence": {"tee": "sgx"}}))) as attester, pytest.raises(EvidenceError):
        attester.evidence(bytes(64))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_attester_lets_only_our_errors_out(reply: bytes) -> None:
    with attester_of(reply) as attester, contextlib.suppress(CloisterError):
        assert len(attester.sealing_key()) == 32


def test_attester_does_not_take_a_late_answer_for_the_next_one() -> None:
    with attester_of(struct.pack(">I", 1 << 31) + frame(encode({"sealing-key": bytes(32)}))) as attester:
        with pytest.raises(FormatError):
            attester.sealing_key()
        with pytest.raises(Unavailable):
            attester.sealing_key()


def test_attester_serves_many_threads() -> None:
    with device() as there:
        attester = open_attester({"CLOISTER_TEE_FD": str(there.detach())})
        seen: list[bytes] = []

        def collect(number: int) -> None:
            data = bytes([number]) * 64
            for _ in range(20):
                quote = decode(attester.evidence(data).quote, what="quote")
                seen.append(quote[0] == data)

        threads = [threading.Thread(target=collect, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 80
        assert attester.simulated
        assert attester.sealing_key() == Secret(bytes(reversed(MEASURED.mr_enclave)))
        attester.close()


# The platform: launching.

REPORT = """
import json
from cloister.enclave.attester import open_attester
attester = open_attester(os.environ)
evidence = attester.evidence(b"r" * 64)
result = {"quote": evidence.quote.hex(), "key": attester.sealing_key().reveal().hex(), "argv": sys.argv[1:]}
result["environment"] = sorted(os.environ)
result["modules"] = sorted(sys.modules)
(run_dir / "result").write_text(json.dumps(result))
print("written", flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox.detect()


@pytest.fixture
def platform(source: Path, sandbox: Sandbox) -> SimulatedPlatform:
    return SimulatedPlatform(FakeAuthority(), sandbox, source=source, clock=lambda: NOW)


async def launch(platform: SimulatedPlatform, run_dir: Path, program: str) -> SimulatedEnclave:
    (run_dir / "configuration").write_text(program)
    return await platform.launch("worker", run_dir)


async def started(run_dir: Path) -> None:
    for _ in range(500):
        if (run_dir / "started").exists():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the enclave did not start")


@pytest.mark.asyncio
async def test_launch_refuses_an_unknown_role(platform: SimulatedPlatform, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        await platform.launch("gateway", tmp_path)


@pytest.mark.asyncio
async def test_launch_refuses_a_missing_run_folder(platform: SimulatedPlatform, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run folder"):
        await platform.launch("worker", tmp_path / "nothing")


@pytest.mark.asyncio
@pytest.mark.parametrize("limit", [0, -1])
async def test_launch_refuses_a_memory_limit_that_is_none(
    platform: SimulatedPlatform, tmp_path: Path, limit: int
) -> None:
    with pytest.raises(UsageError, match="memory limit"):
        await platform.launch("worker", tmp_path, memory_limit=limit)


def test_platform_announces_itself(platform: SimulatedPlatform) -> None:
    assert "protects nothing" in platform.announcement


@pytest.mark.asyncio
async def test_enclave_gets_evidence_of_what_was_launched(
    platform: SimulatedPlatform, tmp_path: Path
) -> None:
    enclave = await launch(platform, tmp_path, REPORT)
    assert await enclave.wait() == 0, enclave.log.read_text()
    result = json.loads((tmp_path / "result").read_text())
    measured = platform.measure("worker")
    assert enclave.measurement.mr_enclave == measured.mr_enclave
    assert decode(bytes.fromhex(result["quote"]), what="quote")[:5] == [
        b"r" * 64,
        measured.mr_enclave,
        SIMULATED_SIGNER,
        2,
        1,
    ]
    assert bytes.fromhex(result["key"]) == bytes(reversed(measured.mr_enclave))
    assert result["argv"] == ["worker", str(tmp_path)]
    assert set(result["environment"]) <= {"CLOISTER_TEE_FD", "HOME", "LANG", "LC_CTYPE", "PWD"}
    assert "site" not in result["modules"]
    assert enclave.log.read_text() == "written\n"
    assert sorted(os.listdir(tmp_path)) == ["configuration", "enclave.log", "result"]
    assert enclave.log.stat().st_mode & 0o077 == 0


@pytest.mark.asyncio
async def test_a_changed_program_has_another_measurement(platform: SimulatedPlatform, tmp_path: Path) -> None:
    other = fake_source(tmp_path / "other")
    (other / "enclave" / "extra.py").write_text("")
    assert platform.measure("worker", source=other).mr_enclave != platform.measure("worker").mr_enclave


WAIT = """
import signal, threading
end = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: end.set())
(run_dir / "started").touch()
while not end.wait(0.05):
    pass
print("ended in order", flush=True)
"""


@pytest.mark.asyncio
async def test_terminate_lets_the_enclave_end_in_order(platform: SimulatedPlatform, tmp_path: Path) -> None:
    enclave = await launch(platform, tmp_path, WAIT)
    await started(tmp_path)
    enclave.terminate()
    assert await enclave.wait() == 0
    assert enclave.log.read_text() == "ended in order\n"
    enclave.terminate()
    enclave.kill()


@pytest.mark.asyncio
async def test_kill_ends_an_enclave_that_does_not_listen(platform: SimulatedPlatform, tmp_path: Path) -> None:
    enclave = await launch(platform, tmp_path, WAIT.replace("end.set()", "None"))
    await started(tmp_path)
    enclave.terminate()
    await asyncio.sleep(0.1)
    enclave.kill()
    assert await enclave.wait() == -signal.SIGKILL


@pytest.mark.asyncio
async def test_an_ended_enclave_leaves_no_thread_and_no_descriptor(
    platform: SimulatedPlatform, tmp_path: Path
) -> None:
    await (await launch(platform, tmp_path, "pass")).wait()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        await (await launch(platform, tmp_path, "pass")).wait()
    assert not [each for each in threading.enumerate() if each.name.startswith("tee-")]
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.asyncio
async def test_what_an_enclave_leaves_as_its_image_is_not_used_again(
    platform: SimulatedPlatform, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    (tmp_path / "image").symlink_to(victim)
    assert await (await launch(platform, tmp_path, "pass")).wait() == 0
    assert (victim / "file").exists()
    assert not (tmp_path / "image").exists()


@pytest.mark.asyncio
async def test_a_long_log_is_set_aside(platform: SimulatedPlatform, tmp_path: Path) -> None:
    (tmp_path / "enclave.log").write_bytes(bytes((4 << 20) + 1))
    enclave = await launch(platform, tmp_path, "print('new', flush=True)")
    await enclave.wait()
    assert enclave.log.read_text() == "new\n"
    assert (tmp_path / "enclave.log.1").exists()


@pytest.mark.asyncio
async def test_evidence_of_a_launched_enclave_verifies_under_the_simulated_root(
    sandbox: Sandbox, source: Path, tmp_path: Path
) -> None:
    authority = SimulatedAuthority.create(tmp_path / "authority", now=NOW)
    platform = SimulatedPlatform(authority, sandbox, source=source, clock=lambda: NOW)
    program = """
from cloister.core.encoding import encode
from cloister.enclave.attester import open_attester
(run_dir / "result").write_bytes(encode(open_attester(os.environ).evidence(b"r" * 64).to_data()))
"""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    enclave = await launch(platform, run_dir, program)
    assert await enclave.wait() == 0, enclave.log.read_text()
    evidence = Evidence.from_data(decode((run_dir / "result").read_bytes(), what="evidence"))
    verified = verify(evidence, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW)
    assert verified.simulated
    assert verified.measurements["mr_enclave"] == platform.measure("worker").mr_enclave
    assert verified.measurements["mr_signer"] == SIMULATED_SIGNER
    with pytest.raises(EvidenceRefused):
        verify(evidence, anchors=TrustAnchors.vendor(), now=NOW)
