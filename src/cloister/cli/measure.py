"""``cloister measure``: the reference values of this source tree's enclaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.output import print_json, table


def measure(
    source: Annotated[
        Path | None, typer.Option(help="Folder of the cloister package; by default the installed one.")
    ] = None,
    manifest: Annotated[bool, typer.Option(help="Show everything that is measured.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the enclave images' reference values: the same for the same source, distributions and Python."""
    from cloister.sim.measurement import measure as measure_role

    measured = [measure_role(role, source) for role in ("key-service", "worker")]
    if as_json:
        print_json(
            {
                item.role: {
                    "mr_enclave": item.mr_enclave.hex(),
                    "mr_signer": item.mr_signer.hex(),
                    "isv_prod_id": item.isv_prod_id,
                    "isv_svn": item.isv_svn,
                    **({"manifest": _plain(item.manifest)} if manifest else {}),
                }
                for item in measured
            }
        )
        return
    rows = [(item.role, item.mr_enclave.hex(), item.isv_prod_id, item.isv_svn) for item in measured]
    table("Reference values (simulated SGX)", ("role", "mr_enclave", "isv_prod_id", "isv_svn"), rows)
    if manifest:
        for item in measured:
            table(f"Manifest of the {item.role}", ("part", "value"), _rows(_plain(item.manifest)))


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _rows(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [
            row
            for name, item in value.items()
            for row in _rows(item, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list):
        return [row for index, item in enumerate(value) for row in _rows(item, f"{prefix}[{index}]")]
    return [(prefix, value)]
