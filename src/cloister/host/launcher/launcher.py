"""Owns one enclave: its run folder, its host link, its process, its registration.

An enclave's run folder holds ``configuration``, which it is started with and attests; ``link.sock``, its way
out; and ``enclave.sock``, where it listens. A crashed enclave is started again, after a pause that grows as
long as it keeps crashing. `Launcher.stop` leaves no process, task or file behind but the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.errors import CloisterError, Unavailable, UsageError
from cloister.host.launcher.platform import EnclaveProcess, Platform
from cloister.host.launcher.serving import LinkServer, answers

CONFIGURATION: Final = "configuration"
LINK_SOCKET: Final = "link.sock"
ENCLAVE_SOCKET: Final = "enclave.sock"
LOG: Final = "enclave.log"
MAX_SOCKET_PATH: Final = 107  # bytes; sun_path has 108 with the closing zero (unix(7))
LOG_LINES_SHOWN: Final = 15

Register = Callable[[Path], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a launcher waits, in seconds."""

    ready: float = 30.0  # for a started enclave to answer
    poll: float = 0.02  # between two looks
    heartbeat: float = 2.0  # between two registrations
    backoff_least: float = 0.2  # after the first crash
    backoff_most: float = 10.0
    stable: float = 10.0  # of service, after which a crash counts as the first again
    stop: float = 5.0  # between SIGTERM and SIGKILL

    def pause(self, crashes: int) -> float:
        """Seconds to wait before the next start, after that many crashes in a row (at least one)."""
        # The exponent is bounded because 2.0 ** 1024 is an error.
        return min(self.backoff_least * 2.0 ** min(crashes - 1, 32), self.backoff_most)


class Launcher:
    """Keeps one enclave running on this host.

    Attributes:
        role: Its role.
        restarts: How often it was started again after a crash.
        start_seconds: How long the last start took, until the enclave answered.
    """

    def __init__(
        self,
        platform: Platform,
        role: str,
        run_dir: Path,
        link_app: Callable[..., Any],
        register: Register,
        *,
        configuration: bytes,
        memory_limit: int | None = None,
        source: Path | None = None,
        timing: Timing = Timing(),
    ) -> None:
        """Make a launcher; nothing happens before `start`.

        Args:
            platform: The machine's TEE platform.
            role: ``"key-service"`` or ``"worker"``.
            run_dir: The enclave's folder in the data directory. Where its path is too long for Unix sockets,
                a private temporary folder takes its place; the log is always here.
            link_app: ASGI application of the host link (`link.link_app`).
            register: Called with the enclave's socket when it is ready, and then with every heartbeat.
            configuration: The enclave configuration, which the enclave attests.
            memory_limit: Enclave memory in bytes, or no limit.
            source: Folder of the ``cloister`` package, instead of the platform's.
            timing: How long to wait for what.
        """
        self._platform = platform
        self._given_dir = run_dir
        self._run_dir: Path | None = None
        self._link_app = link_app
        self._register = register
        self._configuration = configuration
        self._memory_limit = memory_limit
        self._source = source
        self._timing = timing
        self._link: LinkServer | None = None
        self._process: EnclaveProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self.role = role
        self.restarts = 0
        self.start_seconds = 0.0

    @property
    def socket(self) -> Path:
        """Where the enclave listens.

        Raises:
            UsageError: the launcher is not started.
        """
        if self._run_dir is None:
            raise UsageError("the launcher is not started", code="launcher.state")
        return self._run_dir / ENCLAVE_SOCKET

    @property
    def log(self) -> Path:
        """File with what the enclave printed."""
        return self._given_dir / LOG

    @property
    def process(self) -> EnclaveProcess | None:
        """The running enclave; nothing between a crash and the next start."""
        return self._process

    @property
    def ready(self) -> bool:
        """Whether the enclave answers."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Wait until the enclave answers, also again after a crash."""
        await self._ready.wait()

    async def start(self) -> None:
        """Start the link and the enclave, wait until it answers, register it, and keep it running.

        Raises:
            UsageError: started before, no usable path for the sockets, or an incomplete enclave image.
            Unavailable: the enclave ended or did not answer in time; its last log lines are in the message.
        """
        if self._supervisor is not None or self._run_dir is not None:
            raise UsageError("the launcher is started already", code="launcher.state")
        try:
            self._prepare()
            self._link = LinkServer(self._link_app, self._file(LINK_SOCKET))
            await self._link.start()
            await self._launch()
        except OSError as error:
            await self.stop()
            raise Unavailable(
                f"the {self.role} enclave's run folder is not usable: {error.strerror}",
                code="launcher.run-dir",
            ) from error
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name=f"launcher-{self.role}")

    async def stop(self) -> None:
        """End the enclave (SIGTERM, then SIGKILL) and the link, and remove what they left. Repeatable."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        await self._end_process()
        if self._link is not None:
            await self._link.stop()
            self._link = None
        self._clean()

    def _prepare(self) -> None:
        self._given_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._given_dir.chmod(0o700)
        self._run_dir = _short_enough(self._given_dir.absolute())
        for name in (LINK_SOCKET, ENCLAVE_SOCKET):
            self._file(name).unlink(missing_ok=True)
        descriptor = os.open(self._file(CONFIGURATION), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(self._configuration)

    def _file(self, name: str) -> Path:
        if self._run_dir is None:
            raise UsageError("the launcher is not started", code="launcher.state")
        return self._run_dir / name

    async def _launch(self) -> None:
        """Start the enclave and wait until it answers; one that doesn't is ended."""
        began = time.monotonic()
        self._file(ENCLAVE_SOCKET).unlink(missing_ok=True)
        run_dir = self._file(CONFIGURATION).parent
        self._process = process = await self._platform.launch(
            self.role, run_dir, memory_limit=self._memory_limit, source=self._source, log=self.log
        )
        try:
            await self._wait_until_ready(process)
        except BaseException:
            await self._end_process()
            raise
        self.start_seconds = time.monotonic() - began
        await self._beat()
        self._ready.set()

    async def _wait_until_ready(self, process: EnclaveProcess) -> None:
        ended = asyncio.create_task(process.wait())
        try:
            async with asyncio.timeout(self._timing.ready):
                while not await answers(self.socket):
                    await asyncio.wait([ended], timeout=self._timing.poll)
                    if ended.done():
                        raise self._not_ready(f"ended with status {ended.result()} before it answered")
        except TimeoutError:
            raise self._not_ready(f"did not answer within {self._timing.ready:g} s") from None
        finally:
            if not ended.done():
                ended.cancel()
                await asyncio.wait([ended])

    def _not_ready(self, what: str) -> Unavailable:
        lines = _last_lines(self.log, LOG_LINES_SHOWN)
        shown = "".join(f"\n  {line}" for line in lines) or " (its log is empty)"
        return Unavailable(f"the {self.role} enclave {what}:{shown}", code="launcher.not-ready")

    async def _supervise(self) -> None:
        """Heartbeats while the enclave runs; a pause and a new start when it crashed."""
        crashes = 0
        while True:
            since = time.monotonic()
            if self._process is not None:
                status = await self._watch(self._process)
                _log.warning("the %s enclave ended with status %d", self.role, status)
            self._ready.clear()
            self._process = None
            crashes = 1 if time.monotonic() - since > self._timing.stable else crashes + 1
            await asyncio.sleep(self._timing.pause(crashes))
            self.restarts += 1
            try:
                await self._launch()
            except CloisterError as error:
                _log.warning("the %s enclave did not start again: %s", self.role, error)
            except Exception as error:
                # Whatever it was, the next attempt comes: nobody else would start this enclave.
                _log.warning("the %s enclave did not start again: %s", self.role, type(error).__name__)

    async def _watch(self, process: EnclaveProcess) -> int:
        beats = asyncio.create_task(self._heartbeats())
        try:
            return await process.wait()
        finally:
            beats.cancel()
            await asyncio.wait([beats])

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._timing.heartbeat)
            await self._beat()

    async def _beat(self) -> None:
        """One registration. A gateway that is away for a while learns of the enclave with a later one."""
        try:
            async with asyncio.timeout(self._timing.heartbeat):
                await self._register(self.socket)
        except Exception as error:
            _log.warning("the %s enclave could not be registered: %s", self.role, type(error).__name__)

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        self._ready.clear()
        if process is None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._timing.stop):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        except asyncio.CancelledError:
            process.kill()
            raise

    def _clean(self) -> None:
        run_dir, self._run_dir = self._run_dir, None
        if run_dir is None:
            return
        if run_dir != self._given_dir.absolute():
            shutil.rmtree(run_dir, ignore_errors=True)
            return
        for name in (LINK_SOCKET, ENCLAVE_SOCKET, CONFIGURATION):
            with contextlib.suppress(OSError):
                (run_dir / name).unlink(missing_ok=True)


def _short_enough(run_dir: Path) -> Path:
    """``run_dir``, or a private temporary folder where the sockets' paths fit."""
    if _fits(run_dir):
        return run_dir
    short = Path(tempfile.mkdtemp(prefix="cloister-"))
    if _fits(short):
        return short
    short.rmdir()
    raise UsageError(
        "no folder has a path short enough for Unix sockets",
        code="launcher.path",
        claim="length of the socket's path",
        expected=f"at most {MAX_SOCKET_PATH} B",
        actual=f"{len(os.fsencode(run_dir / ENCLAVE_SOCKET))} B",
        hint="use a data directory with a shorter path, or set TMPDIR to a short one",
    )


def _fits(run_dir: Path) -> bool:
    return len(os.fsencode(run_dir / ENCLAVE_SOCKET)) <= MAX_SOCKET_PATH


def _last_lines(path: Path, count: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return []
            file.seek(max(0, size - 16384))
            text = file.read(16384).decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-count:]
