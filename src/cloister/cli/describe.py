"""``cloister describe``: what a model takes and gives, from the enclave that serves it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloister.cli.output import print_json, table
from cloister.cli.policies import read_user_policy
from cloister.cli.verify import AsJson, IdentityFile, PolicyFile, Url, UserMemory, memory_beside
from cloister.errors import FormatError


def describe(
    url: Url,
    model: Annotated[str, typer.Argument(help="Model id: <owner>/<name>.")],
    policy: PolicyFile,
    identity: IdentityFile,
    memory: UserMemory = None,
    as_json: AsJson = False,
) -> None:
    """Verify the service, then ask a model for its inputs and outputs; the grant decides, as for `infer`."""
    from cloister.client.client import Client
    from cloister.client.identity import Identity
    from cloister.core.oip import DTYPES, numpy_name

    user = read_user_policy(policy)
    memory = memory or memory_beside(identity, user.service)
    with Client(url, policy=user, identity=Identity.load(identity), memory=memory) as client:
        found = client.metadata(model)
    try:
        tensors = {part: [_tensor(each) for each in found[part]] for part in ("inputs", "outputs")}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise FormatError("the answer is no model's metadata", claim="metadata") from error
    if as_json:
        print_json({"model": model, **tensors})
        return
    for part, rows in tensors.items():
        table(
            f"{part.capitalize()} of {model}",
            ("name", "type", "numpy", "shape"),
            [
                (
                    each["name"],
                    each["datatype"],
                    numpy_name(each["datatype"]) if each["datatype"] in DTYPES else "",
                    " x ".join("any" if side < 0 else str(side) for side in each["shape"]) or "scalar",
                )
                for each in rows
            ],
        )


def _tensor(tensor: dict[str, Any]) -> dict[str, Any]:
    shape = [int(side) for side in tensor["shape"]]
    return {"name": str(tensor["name"]), "datatype": str(tensor["datatype"]), "shape": shape}
