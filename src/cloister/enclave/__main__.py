"""Entry of every enclave: ``python -m cloister.enclave ROLE RUN_DIR``.

The role stands in the measured manifest; the folder holds what the host gives: the configuration (bound into
the evidence), the link out and the place to listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from cloister.core.protocol.configuration import ROLES, EnclaveConfiguration, require_one_anchor
from cloister.enclave.attester import open_attester
from cloister.enclave.link import HostLink
from cloister.enclave.memory import harden
from cloister.errors import CloisterError, UsageError
from cloister.net.loop import run

logger: Final = logging.getLogger("cloister.enclave")


def main(arguments: list[str]) -> int:
    """Start one enclave and serve until it is told to stop; the exit status is 1 where it could not start."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.raiseExceptions = False
    try:
        role, folder = _arguments(arguments)
        granted = harden()
        logger.info(
            "memory: %s", ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in granted.items())
        )
        configuration = EnclaveConfiguration.from_bytes((folder / "configuration").read_bytes())
        if configuration.role != role:
            raise UsageError(claim="configuration role", expected=role, actual=configuration.role)
        require_one_anchor(configuration)
        run(_serve(configuration, folder))
    except CloisterError as error:
        logger.error("%s: %s", error.code, error)
        return 1
    except OSError as error:
        logger.error("enclave.host: the host's folder can't be used (%s)", type(error).__name__)
        return 1
    return 0


async def _serve(configuration: EnclaveConfiguration, folder: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    attester = open_attester(os.environ)
    link = HostLink(folder / "link.sock")
    async with contextlib.aclosing(link):
        if configuration.role == "key-service":
            from cloister.enclave.keyservice.main import serve as serve_key_service

            await serve_key_service(configuration, attester, link, folder / "enclave.sock", stop)
        else:
            from cloister.enclave.worker.main import serve as serve_worker

            await serve_worker(configuration, attester, link, folder / "enclave.sock", stop)


def _arguments(arguments: list[str]) -> tuple[str, Path]:
    if len(arguments) != 2 or arguments[0] not in ROLES:
        raise UsageError(
            claim="arguments", expected=f"one of {', '.join(ROLES)}, and a folder", actual="others"
        )
    return arguments[0], Path(arguments[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
