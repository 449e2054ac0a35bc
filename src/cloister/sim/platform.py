"""The simulated TEE platform: measures an image, launches it confined, and serves its TEE device.

It stands where an SGX driver and its quoting enclave stand, and it is what `cloister.host.launcher` expects
of a platform, without knowing the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cloister.errors import Unavailable, UsageError
from cloister.sim.device import Authority, TeeDevice
from cloister.sim.image import EnclaveImage, discard, locate
from cloister.sim.measurement import Measurement, measure_image
from cloister.sim.sandbox import IMAGE_NAME, Sandbox
from cloister.sim.tees import require_tee

ANNOUNCEMENT: Final = "simulated TEE: protects nothing from this machine's administrator"
DEVICE_VARIABLE: Final = "CLOISTER_TEE_FD"
LOG_NAME: Final = "enclave.log"
MAX_LOG: Final = 4 << 20  # bytes; a longer one is set aside, once, at the next launch

# All that an enclave gets of the environment, besides its device.
_ENVIRONMENT: Final = {"LANG": "C.UTF-8", "HOME": "/nonexistent"}


class SimulatedEnclave:
    """A launched enclave process, with its measurement and its TEE device.

    Attributes:
        measurement: Of the image it was launched from; the device answers with nothing else.
        log: File with the enclave's standard output and standard error.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        *,
        device: TeeDevice,
        measurement: Measurement,
        log: Path,
        assembled: Path,
        info_fd: int | None,
    ) -> None:
        """Only `SimulatedPlatform.launch` makes one."""
        self._process = process
        self._device = device
        self._assembled = assembled
        self._info_fd = info_fd
        self.measurement = measurement
        self.log = log

    @property
    def pid(self) -> int:
        """The process to watch: the enclave's, or the sandbox's that lives and dies with it."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end and free the enclave's things; gives the exit status, negative for a signal."""
        status = await self._process.wait()
        self._release()
        return status

    def terminate(self) -> None:
        """Ask the enclave to end (SIGTERM)."""
        if self._process.returncode is not None:
            return
        inner = self._inner_pid()
        if inner is None:
            self._signal(signal.SIGTERM)
            return
        # bubblewrap doesn't pass signals on, and its own end would kill the enclave at once.
        with contextlib.suppress(ProcessLookupError):
            os.kill(inner, signal.SIGTERM)

    def kill(self) -> None:
        """End the enclave now (SIGKILL)."""
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _inner_pid(self) -> int | None:
        """The enclave's process id as bubblewrap wrote it; nothing before that, or without bubblewrap."""
        if self._info_fd is None:
            return None
        try:
            return int(json.loads(os.read(self._info_fd, 4096))["child-pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        finally:
            self._close_info()

    def _close_info(self) -> None:
        if self._info_fd is not None:
            os.close(self._info_fd)
            self._info_fd = None

    def _release(self) -> None:
        self._device.close()
        self._close_info()
        with contextlib.suppress(OSError):
            discard(self._assembled)


class SimulatedPlatform:
    """Launches enclaves on this machine.

    Attributes:
        announcement: The line that a command line shows before it starts anything here.
        sandbox: How enclaves are confined.
    """

    announcement: str = ANNOUNCEMENT
    simulated: bool = True

    def __init__(
        self,
        authority: Authority,
        sandbox: Sandbox,
        *,
        source: Path | None = None,
        clock: Callable[[], int] = lambda: int(time.time()),
        tee: str = "sgx",
    ) -> None:
        """Make a platform.

        Args:
            authority: Signs the quotes.
            sandbox: What `Sandbox.detect` found.
            source: Folder of the ``cloister`` package to run; by default the installed one.
            clock: Unix time in seconds, for quotes and collateral.
            tee: The kind of TEE that it plays, of `cloister.sim.tees.TEES`.

        Raises:
            UsageError: it plays no such TEE.
        """
        self._tee = require_tee(tee)
        self._authority = authority
        self._source = source
        self._clock = clock
        self.sandbox = sandbox

    def measure(self, role: str, *, source: Path | None = None) -> Measurement:
        """The measurement that an enclave of ``role`` would have if it were launched now.

        Raises:
            UsageError: unknown role, or an incomplete image.
        """
        return measure_image(locate(role, source or self._source))

    async def launch(
        self,
        role: str,
        run_dir: Path,
        *,
        memory_limit: int | None = None,
        source: Path | None = None,
        log: Path | None = None,
    ) -> SimulatedEnclave:
        """Measure, confine and start one enclave.

        Args:
            role: ``"key-service"`` or ``"worker"``.
            run_dir: The enclave's folder, which it may write; it exists.
            memory_limit: Enclave memory in bytes, or no limit.
            source: Folder of the ``cloister`` package, instead of the platform's.
            log: File that the enclave's output is appended to; by default ``run_dir / "enclave.log"``.

        Raises:
            UsageError: unknown role, incomplete image, or a run folder that isn't there.
            Unavailable: the process did not start.
        """
        run_dir = _existing_folder(run_dir)
        image = await asyncio.to_thread(locate, role, source or self._source)
        measurement = await asyncio.to_thread(measure_image, image)
        log = log or run_dir / LOG_NAME
        try:
            return await self._start(image, measurement, run_dir, memory_limit, log)
        except OSError as error:
            raise Unavailable(
                f"the {role} enclave did not start: {error.strerror}", code="platform.launch"
            ) from error

    async def _start(
        self,
        image: EnclaveImage,
        measurement: Measurement,
        run_dir: Path,
        memory_limit: int | None,
        log: Path,
    ) -> SimulatedEnclave:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.callback(here.close)
            theirs.callback(there.close)
            inherited = [there.fileno()]
            info: tuple[int, int] | None = None
            if self.sandbox.bubblewrap is not None:
                info = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                ours.callback(os.close, info[0])
                theirs.callback(os.close, info[1])
                inherited.append(info[1])
            assembled = run_dir / IMAGE_NAME
            image.assemble(assembled)
            ours.callback(shutil.rmtree, assembled, ignore_errors=True)
            output = theirs.enter_context(_open_log(log))
            command = self.sandbox.command(
                image, run_dir, memory_limit=memory_limit, info_fd=info[1] if info else None
            )
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherited,
                env={**_ENVIRONMENT, DEVICE_VARIABLE: str(there.fileno())},
                cwd=run_dir,
                start_new_session=True,  # the launcher, not the terminal's Ctrl-C, decides when it ends
            )
            device = TeeDevice(here, self._authority, measurement, self._clock, self._tee)
            device.start()
            ours.pop_all()
        return SimulatedEnclave(
            process,
            device=device,
            measurement=measurement,
            log=log,
            assembled=assembled,
            info_fd=info[0] if info else None,
        )


def _existing_folder(path: Path) -> Path:
    folder = path.resolve()
    if not folder.is_dir():
        raise UsageError("the run folder is not there", claim="run_dir", expected="a folder", actual=folder)
    return folder


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    """A descriptor that appends to the log, readable by its owner only."""
    if path.exists() and path.stat().st_size > MAX_LOG:
        path.replace(path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
