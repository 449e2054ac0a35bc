"""What this machine offers to confine an enclave: detected, applied, and reported.

Nothing needs root, and what is missing is done without and said so. bubblewrap gives the most: an enclave
then sees its own image, the system's libraries and its run folder, and no network. Without it, Landlock, a
network namespace and seccomp give most of the same. None of it protects an enclave from the machine's
administrator: it keeps an enclave from leaking by accident, and shows that it needs nothing but its image and
its one way out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.errors import UsageError
from cloister.sim.image import ENTRY_MODULE, EnclaveImage

IMAGE_NAME: Final = "image"  # of the folder of the run folder that `EnclaveImage.assemble` makes

_CONFINE: Final = Path(__file__).with_name("confine.py")
_PROBE_TIMEOUT: Final = 10  # seconds

# The enclave starts without `site`: no .pth file and no sitecustomize, which nobody measures, may run in it.
_BOOT: Final = (
    "import runpy, sys; name, path = sys.argv[1:3]; sys.path.append(path); del sys.argv[1:3]; "
    "runpy.run_module(name, run_name='__main__', alter_sys=True)"
)

# The system's own libraries and what C libraries read at start. Measured code finds nothing to import there.
_SYSTEM_READABLE: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_CPU_TOPOLOGY: Final = ("/sys/devices/system/cpu", "/sys/devices/system/node")
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_BUBBLEWRAP: Final = (
    "--unshare-all",
    "--die-with-parent",
    "--new-session",
    "--as-pid-1",
    "--cap-drop",
    "ALL",
    "--hostname",
    "enclave",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
    "--tmpfs",
    "/tmp",  # noqa: S108 - a private one, in the enclave's own mount namespace
)

_ALWAYS: Final = (
    ("memory limit", "RLIMIT_DATA stands for enclave memory"),
    ("no core dumps", "RLIMIT_CORE is 0"),
    ("no orphans", "an enclave dies with its launcher"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One thing that a machine may offer.

    Attributes:
        name: What it is called.
        available: Whether this machine offers it, tried and not guessed.
        detail: What it does here, or why it is missing.
    """

    name: str
    available: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """How enclaves are confined on this machine.

    Attributes:
        features: What was looked for, and found or not.
        bubblewrap: The ``bwrap`` program, where it works.
    """

    features: tuple[Feature, ...]
    bubblewrap: Path | None

    @classmethod
    def detect(cls, *, without: Collection[str] = ()) -> Sandbox:
        """Try what this machine allows.

        Args:
            without: Names of features to leave unused although they are there (for tests and comparisons).
        """
        probed = _probe()
        program = shutil.which("bwrap")
        refusal = "not installed" if program is None else _try_bubblewrap(program)
        features = [
            Feature(
                name="bubblewrap",
                available=not refusal,
                detail=refusal
                or "own namespaces; only the image, the system's libraries and the run folder; no network",
            ),
            _landlock(probed["landlock"]),
            _feature("namespaces", probed["namespaces"], "own user, network and IPC namespaces: no network"),
            _feature("seccomp", probed["seccomp"], "refuses calls that look into or change the machine"),
            _feature("memfd_secret", probed["memfd_secret"], "keys can lie where other processes can't read"),
            *(Feature(name=name, available=True, detail=detail) for name, detail in _ALWAYS),
        ]
        found = tuple(
            Feature(name=each.name, available=False, detail="turned off") if each.name in without else each
            for each in features
        )
        usable = found[0].available and program is not None
        return cls(features=found, bubblewrap=Path(program) if usable and program else None)

    def has(self, name: str) -> bool:
        """Whether the feature of that name is available."""
        return any(each.name == name and each.available for each in self.features)

    def report(self) -> list[str]:
        """One line per feature, for people."""
        return [f"{each.name}: {'yes' if each.available else 'no'} ({each.detail})" for each in self.features]

    def command(
        self,
        image: EnclaveImage,
        run_dir: Path,
        *,
        memory_limit: int | None = None,
        info_fd: int | None = None,
    ) -> list[str]:
        """The command line that starts ``image``'s enclave, confined.

        Args:
            image: What the enclave may see, assembled in ``run_dir / IMAGE_NAME``.
            run_dir: The one folder that it may write.
            memory_limit: Enclave memory in bytes, or no limit.
            info_fd: Where bubblewrap, if used, writes the enclave's process id.

        Raises:
            UsageError: the memory limit is not positive.
        """
        if memory_limit is not None and memory_limit <= 0:
            raise UsageError("the memory limit is not positive", claim="memory_limit", actual=memory_limit)
        python, folder = str(image.interpreter.binary), run_dir / IMAGE_NAME
        argv = [python, "-I", "-S", "-B", "-c", _BOOT, ENTRY_MODULE, str(folder)]
        argv += [image.role.name, str(run_dir)]
        readable = [str(path) for path in _readable(image)]
        if self.bubblewrap is not None:
            argv = [
                str(self.bubblewrap),
                *self._bubblewrap_arguments(readable, run_dir, info_fd),
                "--",
                *argv,
            ]
            readable = []
        specification: dict[str, Any] = {
            "argv": argv,
            "parent": os.getpid(),
            "memory_limit": memory_limit,
            "bubblewrap": self.bubblewrap is not None,
            "namespaces": self.has("namespaces"),
            "landlock": self.has("landlock"),
            "seccomp": self.has("seccomp"),
            "readable": [*readable, "/proc"],
            "writable": [str(run_dir), *_existing(_DEVICES)],
        }
        return [python, "-I", "-S", "-B", str(_CONFINE), json.dumps(specification)]

    def _bubblewrap_arguments(self, readable: list[str], run_dir: Path, info_fd: int | None) -> list[str]:
        arguments = list(_BUBBLEWRAP)
        for path in readable:
            arguments += ["--ro-bind", path, path]
        arguments += ["--bind", str(run_dir), str(run_dir), "--chdir", str(run_dir)]
        arguments += ["--ro-bind", str(run_dir / IMAGE_NAME), str(run_dir / IMAGE_NAME)]
        if info_fd is not None:
            arguments += ["--info-fd", str(info_fd)]
        return arguments


def _readable(image: EnclaveImage) -> list[Path]:
    """What an enclave reads, parents before what lies in them, nothing twice."""
    # An interpreter outside /usr brings the shared libraries of its extension modules along.
    own = image.interpreter.stdlib.parent
    paths = {Path(path) for path in _existing((*_SYSTEM_READABLE, *_CPU_TOPOLOGY))} | {own, *image.paths}
    kept: list[Path] = []
    for path in sorted(paths, key=lambda each: each.parts):
        if not any(path.is_relative_to(above) for above in kept):
            kept.append(path)
    return kept


def _existing(paths: Collection[str]) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def _probe() -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", "-B", str(_CONFINE), "--probe"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT, check=True)  # noqa: S603
        found: dict[str, Any] = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        reason = "the probe did not run"
        return {"landlock": 0, "namespaces": reason, "seccomp": reason, "memfd_secret": reason}
    return found


def _try_bubblewrap(program: str) -> str:
    """Run nothing in a sandbox like an enclave's; empty if that worked, otherwise the reason."""
    readable = _existing(_SYSTEM_READABLE)
    binds = [argument for path in (*readable, "/usr", "/bin") for argument in ("--ro-bind", path, path)]
    command = [program, *_BUBBLEWRAP, *binds, "--", shutil.which("true") or "/bin/true"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return f"did not run: {type(error).__name__}"
    return "" if answer.returncode == 0 else answer.stderr.decode(errors="replace").strip()[:200] or "failed"


def _landlock(version: int) -> Feature:
    detail = f"version {version}: files outside the image are closed" if version > 0 else "not in this kernel"
    return Feature(name="landlock", available=version > 0, detail=detail)


def _feature(name: str, outcome: bool | str, detail: str) -> Feature:
    return Feature(name=name, available=outcome is True, detail=detail if outcome is True else str(outcome))
