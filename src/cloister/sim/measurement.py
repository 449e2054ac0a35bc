"""Measures an enclave: a canonical manifest of everything it is made of, and its SHA-256.

As SGX measures the pages of an enclave, the simulated platform measures the files: Cloister's own source that
runs inside, the pinned distributions, the interpreter and its standard library. Paths in the manifest are
relative, so the same source gives the same measurement on another checkout and in another environment. Byte
code caches are not measured; whoever can forge them administers the machine, and the simulation protects
nothing from its administrator.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.core.encoding import encode
from cloister.errors import UsageError
from cloister.sim.image import (
    ENTRY_MODULE,
    SOURCE_PARTS,
    Distribution,
    EnclaveImage,
    Interpreter,
    locate,
    skipped,
)

DOMAIN: Final = b"cloister/v1 simulated enclave\0"
SIMULATED_SIGNER: Final = b"CLOISTER-SIMULATED-TEE-SIGNER-01"  # MRSIGNER, 32 bytes; nobody signed anything

# The standard library's parts that no enclave imports, and that differ between installations.
_STDLIB_SKIPPED: Final = frozenset({"site-packages", "dist-packages", "test"})
_STDLIB_SUFFIXES: Final = (".py", ".so")

_digests: dict[tuple[str, int, int], bytes] = {}  # (path, size, mtime in ns) -> SHA-256


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a simulated quote says of an enclave.

    Attributes:
        role: The enclave's role.
        mr_enclave: SHA-256 of the manifest (32 bytes).
        mr_signer: `SIMULATED_SIGNER` (32 bytes).
        isv_prod_id: Product id of the role.
        isv_svn: Security version of the role.
        manifest: What was measured, as plain data.
    """

    role: str
    mr_enclave: bytes
    mr_signer: bytes
    isv_prod_id: int
    isv_svn: int
    manifest: dict[str, Any]


def measure(role: str, source: Path | None = None) -> Measurement:
    """Measure the enclave of ``role`` as this machine would launch it.

    Args:
        role: ``"key-service"`` or ``"worker"``.
        source: Folder of the ``cloister`` package; by default the one this process runs from.

    Raises:
        UsageError: unknown role, or files that are missing or can't be read.
    """
    return measure_image(locate(role, source))


def measure_image(image: EnclaveImage) -> Measurement:
    """Measure an image that `image.locate` found.

    Raises:
        UsageError: a file is missing or can't be read.
    """
    try:
        manifest = _manifest(image)
    except OSError as error:
        raise UsageError(
            "a file of the enclave can't be read",
            code="measurement.file",
            claim="file",
            expected="readable",
            actual=f"{error.filename}: {error.strerror}",
        ) from error
    return Measurement(
        role=image.role.name,
        mr_enclave=hashlib.sha256(DOMAIN + encode(manifest)).digest(),
        mr_signer=SIMULATED_SIGNER,
        isv_prod_id=image.role.isv_prod_id,
        isv_svn=image.role.isv_svn,
        manifest=manifest,
    )


def _manifest(image: EnclaveImage) -> dict[str, Any]:
    return {
        "role": image.role.name,
        "entry": ENTRY_MODULE,
        "isv_prod_id": image.role.isv_prod_id,
        "isv_svn": image.role.isv_svn,
        "source": _source(image.source),
        "distributions": {each.name: _distribution(each) for each in image.distributions},
        "interpreter": _interpreter(image.interpreter),
    }


def _source(source: Path) -> dict[str, bytes]:
    files = {}
    for part in SOURCE_PARTS:
        for path in _files(source / part):
            files[path.relative_to(source).as_posix()] = _file_digest(path)
    return files


def _distribution(distribution: Distribution) -> dict[str, Any]:
    """Files that RECORD lists, and any other file lying in the distribution's own folders.

    Whatever lies there can be imported, so an added file changes the measurement as a changed one does.
    """
    site = distribution.site
    files = {name: _file_digest(site / name) for name in distribution.files}
    for root in distribution.roots:
        for path in _files(site / root):
            files[path.relative_to(site).as_posix()] = _file_digest(path)
    return {"version": distribution.version, "files": len(files), "digest": _tree_digest(files)}


def _interpreter(interpreter: Interpreter) -> dict[str, Any]:
    files = {
        path.relative_to(interpreter.stdlib).as_posix(): _file_digest(path)
        for path in _files(interpreter.stdlib, leave_out=_STDLIB_SKIPPED)
        if path.name.endswith(_STDLIB_SUFFIXES)
    }
    return {
        "version": interpreter.version,
        "binary": _file_digest(interpreter.binary),
        "libraries": {path.name: _file_digest(path) for path in interpreter.libraries},
        "stdlib": {"files": len(files), "digest": _tree_digest(files)},
    }


def _files(root: Path, *, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below ``root``, or ``root`` itself; ``leave_out`` names folders directly below it."""
    if not root.is_dir():
        yield root
        return
    for folder, folders, names in os.walk(root, onerror=_reraise):
        top = Path(folder) == root
        folders[:] = sorted(each for each in folders if not skipped(each) and not (top and each in leave_out))
        for name in sorted(names):
            if not skipped(name):
                yield Path(folder, name)


def _reraise(error: OSError) -> None:
    raise error


def _tree_digest(files: dict[str, bytes]) -> bytes:
    return hashlib.sha256(encode(files)).digest()


def _file_digest(path: Path) -> bytes:
    """SHA-256 of a file, remembered for as long as its size and modification time stay."""
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with path.open("rb", buffering=0) as file:
            _digests[key] = hashlib.file_digest(file, "sha256").digest()
    return _digests[key]
