"""What a launcher expects of the machine's TEE platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Measured(Protocol):
    """What a platform says of an enclave it launched. A launcher shows it; it takes no decision by it."""

    @property
    def mr_enclave(self) -> bytes:
        """The measurement (32 bytes)."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What was measured, as plain data."""


class EnclaveProcess(Protocol):
    """A launched enclave."""

    @property
    def pid(self) -> int:
        """The process to watch."""

    @property
    def measurement(self) -> Measured:
        """What the platform measured when it launched it."""

    @property
    def log(self) -> Path:
        """File with what the enclave printed."""

    async def wait(self) -> int:
        """Wait for the end, free what belongs to it; gives the exit status, negative for a signal."""

    def terminate(self) -> None:
        """Ask it to end (SIGTERM). Harmless after its end."""

    def kill(self) -> None:
        """End it now (SIGKILL). Harmless after its end."""


class Platform(Protocol):
    """Launches enclaves on this machine."""

    @property
    def announcement(self) -> str:
        """What a person must be told before anything starts here; empty for a real TEE."""

    async def launch(
        self,
        role: str,
        run_dir: Path,
        *,
        memory_limit: int | None = None,
        source: Path | None = None,
        log: Path | None = None,
    ) -> EnclaveProcess:
        """Measure and start one enclave.

        Args:
            role: ``"key-service"`` or ``"worker"``.
            run_dir: The enclave's folder, with ``configuration`` and ``link.sock``.
            memory_limit: Enclave memory in bytes, or no limit.
            source: Folder of the ``cloister`` package, instead of the platform's.
            log: File that what the enclave prints is appended to.

        Raises:
            UsageError: the role or the image is not what it must be.
            Unavailable: the process did not start.
        """
