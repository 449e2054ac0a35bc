"""``cloister infer``: one confidential request from the command line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zipfile import BadZipFile

import typer

from cloister.cli.output import print_json, table
from cloister.cli.policies import read_user_policy
from cloister.cli.verify import AsJson, IdentityFile, PolicyFile, Url, UserMemory, memory_beside
from cloister.errors import UsageError
from cloister.party import files

if TYPE_CHECKING:
    import numpy as np


def infer(
    url: Url,
    model: Annotated[str, typer.Argument(help="Model id: <owner>/<name>.")],
    inputs: Annotated[list[str], typer.Option("--input", help="NAME=FILE.npy; once for each input.")],
    policy: PolicyFile,
    identity: IdentityFile,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the outputs to this .npz instead of printing them.")
    ] = None,
    memory: UserMemory = None,
    as_json: AsJson = False,
) -> None:
    """Verify the service, send one sealed request, print or write the outputs."""
    from cloister.client.client import Client
    from cloister.client.identity import Identity

    arrays = _read_inputs(inputs)
    user = read_user_policy(policy)
    memory = memory or memory_beside(identity, user.service)
    with Client(url, policy=user, identity=Identity.load(identity), memory=memory) as client:
        outputs = client.infer(model, arrays)
        stages, reuse = client.record.stages, client.record.reuse
    if output is not None:
        _write(output, outputs)
    if as_json:
        shown = {} if output is not None else {name: _plain(array) for name, array in outputs.items()}
        print_json(
            {
                "outputs": shown,
                "stages_ms": stages,
                "reuse": reuse,
                **({"written": str(output)} if output is not None else {}),
            }
        )
        return
    rows = [
        (name, array.dtype, list(array.shape), "written" if output is not None else _plain(array))
        for name, array in outputs.items()
    ]
    table("Outputs", ("name", "type", "shape", "values"), rows)
    title = f"Inside the enclave ({reuse})" if reuse else "Inside the enclave"
    table(title, ("stage", "ms"), [(name, f"{value:.3f}") for name, value in stages.items()])


def _write(path: Path, outputs: dict[str, np.ndarray]) -> None:
    import numpy as np

    packed = io.BytesIO()
    np.savez(packed, **outputs)  # type: ignore[arg-type]  # its stub takes the names for options
    try:
        if path.exists() and not path.is_file():  # a pipe or a device; whoever made it says who reads it
            path.write_bytes(packed.getvalue())
        else:
            # outputs are the user's secret: nobody else may read the file, nor who has an older one open
            files.replace(path, packed.getvalue())
    except OSError as error:
        raise UsageError(
            "the outputs can't be written", code="file.write", claim=str(path), actual=error.strerror
        ) from error


def _plain(array: np.ndarray) -> object:
    """An array as lists; strings, which travel as bytes, as text."""
    import numpy as np

    if array.dtype.kind == "O":
        array = np.array(
            [
                item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else item
                for item in array.flat
            ],
            dtype=object,
        ).reshape(array.shape)
    return array.tolist()


def _read_inputs(texts: list[str]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for text in texts:
        name, array = _read_input(text)
        if name in arrays:
            raise UsageError(
                code="infer.input", claim="--input", expected="each name once", actual=f"{name} twice"
            )
        arrays[name] = array
    return arrays


def _read_input(text: str) -> tuple[str, np.ndarray]:
    import numpy as np

    name, equals, path = text.partition("=")
    if not equals or not name:
        raise UsageError(code="infer.input", claim="--input", expected="NAME=FILE.npy", actual=text[:200])
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise _unreadable(name, path, error) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(code="infer.input", claim=name, expected="a .npy file", actual=f"{path}: an archive")
    return name, array


def _unreadable(name: str, path: str, error: Exception) -> UsageError:
    reason, hint = "not an array", "Write one with: numpy.save(FILE, ARRAY)"
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif "Object arrays" in str(error):  # NumPy's words for what it would have to unpickle
        reason = "an array of Python objects (dtype object)"
        hint = 'Save numbers with .astype("float32") or the like, and text with .astype("S") or .astype("U")'
    return UsageError(
        "the input can't be read",
        code="infer.input",
        claim=name,
        expected="a .npy file of numbers or text",
        actual=f"{path}: {reason}",
        hint=hint,
    )
