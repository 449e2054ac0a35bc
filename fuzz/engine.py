"""One run of one target under atheris: a process of its own, since the engine ends the process.

``python -m fuzz.engine NAME [--no-vectors] FLAGS...``: the flags are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris


def main(arguments: Sequence[str]) -> None:
    """Fuzz until a flag ends it; does not return."""
    name, *flags = arguments
    real = "--no-vectors" not in flags
    # Only what is under test is instrumented, and it has to be imported here for the first time.
    with atheris.instrument_imports(include=["cloister.core"]):
        from fuzz import seeds
        from fuzz.targets import TARGETS, check
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate((*target.seeds(), *(seeds.vectors(name) if real else ()))):
            Path(folder, f"seed-{index}").write_bytes(seed)
        kept = seeds.ROOT / "fuzz" / "corpus" / name
        options = [flag for flag in flags if flag != "--no-vectors"]
        folders = [folder, *([str(kept)] if kept.is_dir() else [])]
        atheris.Setup(
            ["fuzz", *options, f"-max_len={target.most}", *folders], lambda data: check(target, data)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
