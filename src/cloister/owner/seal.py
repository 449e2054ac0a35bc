"""Sealing a model file at the owner's desk: checked, split into graph and weights, encrypted, digested."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cloister.core.protocol.statement import SealedModel
from cloister.core.sealing import Section, seal
from cloister.core.secret import Secret
from cloister.errors import UsageError
from cloister.owner.desk import Desk, DeskModel
from cloister.owner.model import load_model

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def seal_model(
    desk: Desk, name: str, source: Path, target: Path, *, progress: Progress | None = None
) -> DeskModel:
    """Seal an ONNX file under a fresh model key and keep key and digests on the desk.

    Args:
        desk: The owner's desk.
        name: The model's name; sealing it again makes the next version, once it is published.
        source: An ``.onnx`` file.
        target: The sealed file to write; whole or not at all.
        progress: Called with bytes written so far and in all.

    Raises:
        UsageError: the model or a file is not what it must be.
    """
    model = desk.model_id(name)
    split = load_model(source)
    key = Secret(os.urandom(32))
    sealing = seal(
        [Section.of("graph", split.graph), Section.of("weights", split.weights)], model_id=model, key=key
    )
    size, done, digest = sealing.header.container_size, 0, hashlib.sha256()
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            for piece in sealing:
                digest.update(piece)
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, size)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UsageError(
            "the sealed file can't be written", code="owner.file", claim=str(target), actual=error.strerror
        ) from error
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sealed = SealedModel(header=sealing.header.digest, blob=digest.digest(), size=size)
    before = desk.model(name) if name in desk.models() else None
    kept = DeskModel(
        name=name,
        key=key,
        sealed=sealed,
        statement=before.statement if before else None,
        pool=before.pool if before else None,
    )
    desk.keep(kept)
    return kept
