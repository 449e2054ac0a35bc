"""Whoever talks to the key service without being an honest worker: evidence of its own choosing.

The simulated authority signs whatever it is told here, as if its platform ran any enclave. So what is refused
is refused for what the evidence says, and not for a missing signature.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from cloister.core.evidence.bundle import Evidence
from cloister.core.identity import SigningKey
from cloister.core.ohttp import hpke
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.protocol.attestation import Attestation, Binding
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.conversation import ask_key_service
from cloister.core.protocol.document import KEM_NAMES, SIGNING_ALGORITHM, VerifiedDocument
from cloister.core.protocol.exchange import Challenge, HeadRequest
from cloister.core.protocol.release import INCARNATION_SIZE, ReleaseRequest, SealedRelease
from cloister.party.carry import Carrier
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure
from e2e.malicious import honest_configuration
from e2e.world import World


@dataclass(slots=True)
class Impostor:
    """A worker that isn't one. Every part of what it sends can be chosen."""

    world: World
    kem: PrivateKey = field(default_factory=lambda: generate_private_key(hpke.WIRE_SUITES[0].kem_id))
    signing: SigningKey = field(default_factory=SigningKey.generate)

    def ask(self, path: bytes, content: bytes, verified: VerifiedDocument | None = None) -> bytes:
        """One encapsulated exchange with the key service; gives the content of its answer."""
        host = httpx.HTTPTransport(uds=str(self.world.site.enclaves))  # a worker's host is the operator
        carrier = Carrier("http://gateway", host)
        try:
            flow = ask_key_service((verified or self.world.verified()).document, path, content)
            return bytes(carrier.run(flow))
        finally:
            carrier.close()

    def challenge(self) -> bytes:
        """A fresh challenge."""
        request = HeadRequest(nonce=os.urandom(32), head=None)
        return Challenge.from_bytes(self.ask(b"/challenges", request.to_bytes())).challenge

    def configuration(self, pool: str = "default") -> EnclaveConfiguration:
        """What an honest worker of a pool is configured with."""
        return honest_configuration(self.world.site, self.world.site.read_pool(pool))

    def attest(
        self,
        *,
        challenge: bytes,
        configuration: EnclaveConfiguration | None = None,
        authority: SimulatedAuthority | None = None,
        report_data: bytes | None = None,
        quote: dict[str, Any] | None = None,
        **binding: Any,
    ) -> Attestation:
        """An honest worker's attestation, but for what is given."""
        configuration = configuration or self.configuration()
        measured = measure("worker")
        bound = Binding(
            **{
                "purpose": "release",
                "role": "worker",
                "service": self.world.user_policy.service,
                "pool": self.world.pool,
                "keys": (
                    (KEM_NAMES[self.kem.kem_id], self.kem.public_bytes),
                    (SIGNING_ALGORITHM, self.signing.public),
                ),
                "freshness": ("challenge", challenge),
                "configuration": configuration.digest,
                **binding,
            }
        )
        now = int(time.time())
        authority = authority or SimulatedAuthority.open(self.world.site.authority)
        values: dict[str, Any] = {
            "mr_enclave": measured.mr_enclave,
            "mr_signer": measured.mr_signer,
            "isv_prod_id": measured.isv_prod_id,
            "isv_svn": measured.isv_svn,
            **(quote or {}),
        }
        signed = authority.quote(report_data=report_data or bound.report_data, now=now, **values)
        return Attestation(
            evidence=Evidence(tee="sgx", quote=signed, collateral=authority.collateral(now)),
            configuration=configuration.to_bytes(),
            binding=bound,
        )

    def request(
        self, *, document: bytes | None = None, challenge: bytes | None = None, **attested: Any
    ) -> ReleaseRequest:
        """A release request, honest but for what is given."""
        challenge = challenge or self.challenge()
        return ReleaseRequest(
            challenge=challenge,
            document=document or self.world.verified().digest,
            incarnation=os.urandom(INCARNATION_SIZE),
            attestation=self.attest(challenge=challenge, **attested),
        )

    def release(self, request: ReleaseRequest) -> SealedRelease:
        """Ask for a release; raises what the key service answers."""
        return SealedRelease.from_bytes(self.ask(b"/releases", request.to_bytes()))
