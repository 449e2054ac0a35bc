"""Wires a key service together and keeps it going until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Final

from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.enclave.attester import Attester
from cloister.enclave.clock import HintedClock
from cloister.enclave.keyservice.log import Log
from cloister.enclave.keyservice.routes import KeyServiceRoutes
from cloister.enclave.keyservice.service import KeyService
from cloister.enclave.link import HostLink
from cloister.enclave.server import CBOR, EnclaveServer
from cloister.errors import CloisterError
from cloister.net.front import serve as serve_front
from cloister.net.messages import Answer, Limits

logger: Final = logging.getLogger(__name__)
TICK: Final = 1.0  # seconds between looks at what is due
LIMITS: Final = Limits(max_body=16 << 20)


async def serve(
    configuration: EnclaveConfiguration, attester: Attester, link: HostLink, socket: Path, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set. Raises what keeps it from starting."""
    log = await Log.open(link, attester.sealing_key(), HintedClock())
    service = KeyService(log, attester, configuration)
    await service.start()
    server = EnclaveServer(KeyServiceRoutes(service), service.documents.private_keys())
    gets = {
        b"/.well-known/cloister": lambda: Answer(content_type=CBOR, body=service.documents.raw),
        b"/healthz": lambda: Answer(
            status=503 if service.halted else 200,
            content_type=b"application/json",
            body=json.dumps({"ready": not service.halted, "service": log.service.hex()}).encode(),
        ),
    }
    front = await serve_front(server.handle, unix=socket, gets=gets, limits=LIMITS)
    logger.info(
        "key service %s: epoch %d, %d log entries", log.service.hex()[:16], log.state.epoch, len(log.tree)
    )
    try:
        while not await _stopped(stop, TICK):
            try:
                await service.tick()
            except CloisterError as error:  # the host's store may be away; try again at the next tick
                logger.warning("%s: %s", error.code, error)
            server.replace_keys(service.documents.private_keys())
    finally:
        await front.close()


async def _stopped(stop: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True
