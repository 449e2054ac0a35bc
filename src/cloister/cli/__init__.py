"""The command line: `main` is its entry point, `cloister.cli.app` says which commands there are."""

from __future__ import annotations

import json
import sys
from typing import Final

from cloister.errors import CloisterError, UsageError

# Extra -> what it has that another package may lack, as Python imports it. The first that fits is named, but
# for a command that has an extra of its own.
_EXTRAS: Final = {
    "cli": ("rich", "typer"),
    "client": ("httpx", "numpy"),
    "owner": ("onnx", "httpx", "numpy", "onnxruntime"),
    "host": ("prometheus_client", "starlette", "uvicorn", "httptools", "uvloop", "httpx"),
    "proxy": ("grpc", "google", "starlette", "uvicorn", "httptools", "uvloop", "httpx", "numpy"),
    "enclave": ("onnxruntime", "uvloop", "numpy"),
    "embeddings": ("tokenizers", "httpx", "numpy"),
}
_COMMANDS: Final = {"owner": "owner", "proxy": "proxy", "measure": "enclave"}


def main() -> None:
    """Run one command. Refusals and bad input exit 1 with one line (or ``--json``), wrong usage exits 2."""
    as_json = "--json" in sys.argv
    try:
        # Imported in here: a package may be missing, and whoever is in a hurry interrupts while it loads.
        from cloister.cli.app import app

        app()
    except CloisterError as error:
        from cloister.cli.output import report

        report(error, as_json=as_json)
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cloister"):  # none that could be installed
            raise
        _report_missing(package, as_json=as_json)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _how_to_install(package: str, *, command: str) -> str:
    """The one extra that lacks, from a checkout: no registry has a package of ours."""
    fit = [extra for extra, packages in _EXTRAS.items() if package in packages]
    own = _COMMANDS.get(command)
    extra = own if own in fit else next(iter(fit), "")
    return f"In a checkout: pip install '.[{extra}]'" if extra else "In a checkout: pip install ."


def _report_missing(package: str, *, as_json: bool) -> None:
    """As `output.report`, without what that imports: it may be just what is missing."""
    error = UsageError(
        "this command needs a package that is not installed",
        code="usage.extra",
        claim="package",
        expected=package,
        actual="none",
        hint=_how_to_install(package, command=next((each for each in sys.argv[1:] if each[:1] != "-"), "")),
    )
    if as_json:
        print(json.dumps(error.to_dict()))
    else:
        print(f"{error.code}: {error}", file=sys.stderr)
