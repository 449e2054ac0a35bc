"""``python -m fuzz``: one target or all, each for some seconds; exits 1 if something was found."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.seeds import ROOT
from fuzz.targets import TARGETS

FINDINGS: Final = ROOT / "fuzz" / "findings"
GRACE: Final = 120  # seconds that a run may take beyond its time: start, seeds, the last input
MEMORY: Final = 2048  # MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one run."""

    name: str
    tried: int
    edges: int
    findings: tuple[Path, ...]
    log: str

    def line(self) -> str:
        """One line for people."""
        outcome = ", ".join(str(path.relative_to(ROOT)) for path in self.findings) or "nothing found"
        return f"{self.name:28} {self.tried:10,} inputs {self.edges:6,} edges  {outcome}"


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments name; gives the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(TARGETS))
        return 0
    names = list(TARGETS) if options.all else options.names
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        print(
            f"no such target: {', '.join(unknown)[:200]}" if unknown else "name a target, or --all",
            file=sys.stderr,
        )
        return 2
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = pool.map(lambda name: run(name, seconds=options.seconds, vectors=options.vectors), names)
        failed = False
        for done in runs:
            print(done.line(), flush=True)
            if done.findings or not done.tried:
                print(done.log[-4000:], file=sys.stderr)
                failed = True
    return int(failed)


def run(name: str, *, seconds: int, vectors: bool) -> Run:
    """Fuzz one target for some seconds, or until something is found."""
    folder = FINDINGS / name
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    flags = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={folder}/",
        f"-rss_limit_mb={MEMORY}",
        "-timeout=20",
        "-print_final_stats=1",
        *(() if vectors else ("--no-vectors",)),
    ]
    command = [sys.executable, "-m", "fuzz.engine", name, *flags]
    try:
        ended = subprocess.run(  # the command is ours  # noqa: S603
            command, cwd=ROOT, capture_output=True, timeout=seconds + GRACE, check=False
        )
        log = (ended.stdout + ended.stderr).decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        log = (error.stderr or b"").decode(errors="replace") + "\nthe run did not end"
    found = tuple(sorted(set(folder.iterdir()) - before))
    if not any(folder.iterdir()):
        folder.rmdir()
    return Run(
        name=name,
        tried=_last(r"(?:stat::number_of_executed_units:\s*|^#)(\d+)", log),
        edges=_last(r"cov: (\d+)", log),
        findings=found,
        log=log,
    )


def _last(pattern: str, log: str) -> int:
    found = re.findall(pattern, log, re.MULTILINE)
    return int(found[-1]) if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a target")
    parser.add_argument("--all", action="store_true", help="each target, one after the other")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument(
        "--no-vectors", dest="vectors", action="store_false", help="begin with simulated evidence only"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
