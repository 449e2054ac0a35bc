"""``cloister infer``: one confidential request from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import typer

from cloister.cli.output import print_json, read_text, table
from cloister.cli.verify import AsJson, Memory, PolicyFile, Url
from cloister.client.client import Client
from cloister.client.identity import Identity
from cloister.core.protocol.trust import UserPolicy
from cloister.errors import UsageError


def infer(
    url: Url,
    model: Annotated[str, typer.Argument(help="Model id: <owner>/<name>.")],
    inputs: Annotated[list[str], typer.Option("--input", help="NAME=FILE.npy; once for each input.")],
    policy: PolicyFile,
    identity: Annotated[Path, typer.Option("--identity", help="User identity file.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the outputs to this .npz instead of printing them.")
    ] = None,
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Verify the service, send one sealed request, print or write the outputs."""
    arrays = dict(_read_input(text) for text in inputs)
    user = UserPolicy.from_toml(read_text(policy, "user policy"))
    memory = memory or identity.with_suffix(f".{user.service.hex()[:16]}.memory")
    with Client(url, policy=user, identity=Identity.load(identity), memory=memory) as client:
        outputs = client.infer(model, arrays)
        stages = client.record.stages
    if output is not None:
        _write(output, outputs)
    if as_json:
        shown = {} if output is not None else {name: array.tolist() for name, array in outputs.items()}
        print_json(
            {
                "outputs": shown,
                "stages_ms": stages,
                **({"written": str(output)} if output is not None else {}),
            }
        )
        return
    rows = [
        (name, array.dtype, list(array.shape), "written" if output is not None else array.tolist())
        for name, array in outputs.items()
    ]
    table("Outputs", ("name", "type", "shape", "values"), rows)
    table("Inside the enclave", ("stage", "ms"), [(name, f"{value:.3f}") for name, value in stages.items()])


def _write(path: Path, outputs: dict[str, np.ndarray]) -> None:
    try:
        with path.open("wb") as file:
            np.savez(file, **outputs)  # type: ignore[arg-type]  # its stub takes the names for options
    except OSError as error:
        raise UsageError(
            "the outputs can't be written", code="file.write", claim=str(path), actual=error.strerror
        ) from error


def _read_input(text: str) -> tuple[str, np.ndarray]:
    name, equals, path = text.partition("=")
    if not equals or not name:
        raise UsageError(code="infer.input", claim="--input", expected="NAME=FILE.npy", actual=text[:200])
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else "not an array"
        raise UsageError(
            "the input can't be read",
            code="infer.input",
            claim=name,
            expected="a .npy file",
            actual=f"{path}: {reason}",
        ) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(code="infer.input", claim=name, expected="a .npy file", actual=f"{path}: an archive")
    return name, array
