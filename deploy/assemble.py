"""Copies an enclave's image into a folder: ``python deploy/assemble.py ROLE FOLDER``.

The folder then holds what ``cloister measure`` measures of it, Cloister's own source and the pinned
distributions, and nothing else: no byte code, no links. The interpreter and its standard library are the
manifest's or the image's own. Run it with the interpreter that the enclave will have.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from cloister.sim.image import ROLES, locate, skipped


def assemble(role: str, folder: Path) -> None:
    """Make ``folder`` anew."""
    with tempfile.TemporaryDirectory() as scratch:
        linked = Path(scratch) / "image"
        locate(role).assemble(linked)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            linked, folder, ignore=lambda _, names: {name for name in names if skipped(name)}, symlinks=False
        )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: assemble.py {'|'.join(ROLES)} FOLDER")
    assemble(sys.argv[1], Path(sys.argv[2]))
