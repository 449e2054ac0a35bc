"""Locates what an enclave image consists of: source, distributions and interpreter.

The same list is measured (`measurement`) and made visible inside the sandbox (`sandbox`), so that an enclave
finds exactly what its measurement names.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cloister.errors import UsageError

SOURCE_PARTS: Final = ("__init__.py", "errors.py", "core", "net", "enclave")
ENTRY_MODULE: Final = "cloister.enclave"

# Byte code caches are neither measured nor shown: the sources they are made from are.
SKIPPED_NAMES: Final = frozenset({"__pycache__", "INSTALLER", "REQUESTED", "RECORD", "direct_url.json"})
SKIPPED_SUFFIXES: Final = (".pyc", ".pyo")

_SERVICE: Final = ("cbor2", "cffi", "cryptography", "pycparser", "uvloop")
_WORKER: Final = (*_SERVICE, "flatbuffers", "numpy", "onnxruntime", "packaging", "protobuf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What kind of enclave it is: its product id and the distributions that its code imports."""

    name: str
    isv_prod_id: int
    isv_svn: int
    distributions: tuple[str, ...]


ROLES: Final[Mapping[str, Role]] = MappingProxyType(
    {
        role.name: role
        for role in (
            Role(name="key-service", isv_prod_id=1, isv_svn=1, distributions=_SERVICE),
            Role(name="worker", isv_prod_id=2, isv_svn=1, distributions=_WORKER),
        )
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A CPython installation: the real binary, the shared libraries it brings, its standard library."""

    binary: Path
    version: str
    libraries: tuple[Path, ...]
    stdlib: Path

    @classmethod
    def current(cls) -> Interpreter:
        """The installation that runs this process, without its virtual environment."""
        base = getattr(sys, "_base_executable", None) or sys.executable
        return cls(
            binary=Path(os.path.realpath(base)),
            version=sys.version.split()[0],
            libraries=_mapped_libraries("libpython"),
            stdlib=Path(os.path.realpath(sysconfig.get_path("stdlib"))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One installed distribution.

    Attributes:
        name: Its normalised name.
        version: Its version.
        site: The folder it is installed in.
        files: What its RECORD lists inside ``site``, as POSIX paths.
        roots: The files and folders of ``site`` that belong to it alone.
    """

    name: str
    version: str
    site: Path
    files: tuple[str, ...]
    roots: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveImage:
    """Everything that a role's enclave consists of, on this machine's disk."""

    role: Role
    source: Path
    distributions: tuple[Distribution, ...]
    interpreter: Interpreter

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file and folder that the enclave reads, apart from the system's own libraries."""
        interpreter = self.interpreter
        found = [self.source / part for part in SOURCE_PARTS if (self.source / part).exists()]
        found += [each.site / root for each in self.distributions for root in each.roots]
        return (interpreter.binary, *interpreter.libraries, interpreter.stdlib, *found)

    def assemble(self, folder: Path) -> None:
        """Make ``folder`` anew: links to the image's parts, and so the enclave's whole import path.

        What else is installed beside those parts can't be imported then, with or without a sandbox.

        Raises:
            OSError: the folder can't be made.
        """
        discard(folder)
        links = {f"cloister/{part}": self.source / part for part in SOURCE_PARTS}
        links |= {root: each.site / root for each in self.distributions for root in each.roots}
        folder.mkdir(mode=0o700)
        for name, target in links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(target)


def discard(folder: Path) -> None:
    """Remove what `EnclaveImage.assemble` made, or whatever an enclave put in its place."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def installed_source() -> Path:
    """The folder of the ``cloister`` package that this process runs from."""
    return Path(__file__).resolve().parent.parent


def locate(
    role: str,
    source: Path | None = None,
    *,
    site: Path | None = None,
    interpreter: Interpreter | None = None,
) -> EnclaveImage:
    """Find the image of ``role``'s enclave.

    Args:
        role: A name of `ROLES`.
        source: Folder of the ``cloister`` package; by default the one this process runs from.
        site: Folder of installed distributions to look in, instead of this process's search path.
        interpreter: The interpreter, instead of the one that runs this process.

    Raises:
        UsageError: the role is unknown, or the source or a distribution is missing or incomplete.
    """
    if role not in ROLES:
        raise UsageError(
            "no such enclave role", code="usage.role", claim="role", expected=", ".join(ROLES), actual=role
        )
    root = (source or installed_source()).resolve()
    missing = [part for part in SOURCE_PARTS if not (root / part).exists()]
    if missing:
        raise UsageError(
            "the source folder is not a cloister package",
            code="measurement.source",
            claim="source",
            expected=", ".join(SOURCE_PARTS),
            actual=f"without {', '.join(missing)}",
        )
    return EnclaveImage(
        role=ROLES[role],
        source=root,
        distributions=tuple(_distribution(name, site) for name in ROLES[role].distributions),
        interpreter=interpreter or Interpreter.current(),
    )


def skipped(name: str) -> bool:
    """Whether a file or folder of this name is left out: caches and what installers write for themselves."""
    return name in SKIPPED_NAMES or name.endswith(SKIPPED_SUFFIXES)


def _distribution(name: str, site: Path | None) -> Distribution:
    path = sys.path if site is None else [str(site)]
    found = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
    if found is None:
        raise UsageError(
            f"the distribution {name} is not installed",
            code="measurement.distribution",
            claim="distribution",
            expected=name,
            actual="nothing",
            hint="In a checkout: pip install --require-hashes -r requirements/demo.txt",
        )
    # Not `found.files`: from Python 3.12 on it silently leaves out files that are missing.
    record = found.read_text("RECORD") or ""
    files = tuple(sorted(row[0] for row in csv.reader(record.splitlines()) if row and _inside(row[0])))
    if not files:
        raise UsageError(
            f"{name} has no RECORD of its files", code="measurement.distribution", claim="RECORD"
        )
    folder = Path(os.path.realpath(str(found.locate_file(""))))
    return Distribution(name=name, version=found.version, site=folder, files=files, roots=_roots(files))


def _inside(path: str) -> bool:
    parts = path.split("/")
    return ".." not in parts and not path.startswith("/") and not any(skipped(part) for part in parts)


def _roots(files: tuple[str, ...]) -> tuple[str, ...]:
    """Top-level entries; of a namespace package, which others may share, the entries below it."""
    listed = frozenset(files)
    roots = set()
    for path in files:
        parts = path.split("/")
        depth = 1
        while depth < len(parts) and not _owned("/".join(parts[:depth]), listed):
            depth += 1
        roots.add("/".join(parts[:depth]))
    return tuple(sorted(roots))


def _owned(folder: str, listed: frozenset[str]) -> bool:
    return folder.endswith(".dist-info") or f"{folder}/__init__.py" in listed


def _mapped_libraries(prefix: str) -> tuple[Path, ...]:
    """Shared libraries of that name that this process has mapped, as /proc knows them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count(" ") >= 5 and "/" in line}
    return tuple(sorted(path for path in paths if path.name.startswith(prefix)))
