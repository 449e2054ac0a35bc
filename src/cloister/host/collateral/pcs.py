"""DCAP collateral from a service with the interface of Intel's PCS, version 4 (a PCCS has it, too).

Paths and header fields: Intel, "Provisioning Certification Service for ECDSA Attestation", version 4. TCB
info and QE identity arrive inside ``{"tcbInfo": ..., "signature": "..."}``; what was signed is the value's
exact text, so it is cut out of the body and never written anew. Issuer chains come percent-encoded in header
fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from cloister.core.evidence.bundle import MAX_COLLATERAL_PART, Collateral
from cloister.core.verifier.anchors import described
from cloister.core.verifier.certificates import Certificate, load_chain, load_crl
from cloister.core.verifier.chain import require_signed_by, verify_chain, verify_crl
from cloister.core.verifier.collateral_key import DcapKey
from cloister.core.verifier.dcap import DOCUMENTS
from cloister.core.verifier.qe import QeIdentity
from cloister.core.verifier.tcb import TcbInfo
from cloister.errors import FormatError, UsageError
from cloister.host.collateral.service import Fetched, Service, require_url

INTEL_PCS: Final = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
UPDATES: Final = ("standard", "early")

# Version 3's names differ for one; some caches still send that.
_TCB_CHAIN: Final = ("tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain")
_QE_CHAIN: Final = ("sgx-enclave-identity-issuer-chain",)
_CRL_CHAIN: Final = ("sgx-pck-crl-issuer-chain",)


def fetch_dcap(
    service: Service,
    key: DcapKey,
    *,
    now: int,
    pcs: str = INTEL_PCS,
    root_crl: str = "",
    update: str = "standard",
    say: Callable[[str], None] = lambda _: None,
) -> Collateral:
    """Fetch everything that evidence of one platform family needs, and check that it belongs together.

    The check is no verification: any one root will do. It keeps damaged, foreign and expired collateral from
    being stored.

    Args:
        service: Carries the requests.
        key: What to fetch.
        now: Unix seconds.
        pcs: Base URL of the service.
        root_crl: URL of the root's revocation list; by default the vendor's, or the cache's own.
        update: ``"standard"``, or ``"early"`` for TCB info ahead of its general availability.
        say: Told what is being fetched.

    Raises:
        UsageError: a URL isn't one, or there is no such update.
        NotFound: the service doesn't know the platform family.
        FormatError: an answer does not parse, or belongs to something else.
        EvidenceRefused: a signature is wrong, or something has expired.
        Unavailable: the service doesn't answer.
    """
    if update not in UPDATES:
        raise UsageError(
            code="collateral.what", claim="update", expected=" or ".join(UPDATES), actual=update[:40]
        )
    base = require_url(pcs)
    tee, sgx = f"{base}/{key.tee}/certification/v4", f"{base}/sgx/certification/v4"
    if not root_crl:
        root_crl = INTEL_ROOT_CRL if base == INTEL_PCS else f"{sgx}/rootcacrl"

    def get(what: str, url: str, **query: str) -> Fetched:
        say(what)
        return service.get(url, query, limit=MAX_COLLATERAL_PART, what=what)

    tcb = get("TCB info", f"{tee}/tcb", fmspc=key.fmspc.hex().upper(), update=update)
    qe = get("QE identity", f"{tee}/qe/identity", update=update)
    crl = get("PCK CRL", f"{sgx}/pckcrl", ca=key.ca, encoding="der")
    root = get("root CRL", root_crl)
    tcb_info, tcb_signature = signed_member(tcb.body, "tcbInfo")
    identity, qe_signature = signed_member(qe.body, "enclaveIdentity")
    collateral = Collateral(
        pck_crl_issuer_chain=_chain(crl, _CRL_CHAIN),
        root_ca_crl=_der(root.body, "root CRL"),
        pck_crl=_der(crl.body, "PCK CRL"),
        tcb_info_issuer_chain=_chain(tcb, _TCB_CHAIN),
        tcb_info=tcb_info,
        tcb_info_signature=tcb_signature,
        qe_identity_issuer_chain=_chain(qe, _QE_CHAIN),
        qe_identity=identity,
        qe_identity_signature=qe_signature,
    )
    require_coherent(collateral, key, now=now)
    return collateral


def require_coherent(collateral: Collateral, key: DcapKey, *, now: int) -> None:
    """Refuse collateral of another platform family, CA, TEE or root, wrongly signed, or out of date.

    Raises:
        FormatError: it does not parse, or is for something else.
        EvidenceRefused: a signature is wrong, or something is not in force at ``now``.
    """
    issuer = load_chain(collateral.pck_crl_issuer_chain)
    verify_chain(issuer, now=now, code="collateral.chain", what="PCK CRL issuer chain", leaf_is_ca=True)
    _require_two(issuer, "PCK CRL issuer chain")
    if key.ca not in issuer[0].common_name.lower():
        raise _foreign("issuer of the PCK CRL", f"the {key.ca} CA", issuer[0].common_name)
    for crl, by, what in (
        (collateral.pck_crl, issuer[0], "PCK CRL"),
        (collateral.root_ca_crl, issuer[-1], "root CRL"),
    ):
        verify_crl(load_crl(crl), by, now=now, code="collateral.crl", what=what)
    tcb_info, identity = (
        TcbInfo.from_bytes(collateral.tcb_info),
        QeIdentity.from_bytes(collateral.qe_identity),
    )
    info_id, identity_id = DOCUMENTS[key.tee]
    if (tcb_info.id, tcb_info.fmspc) != (info_id, key.fmspc):
        expected = f"{info_id} {key.fmspc.hex()}"
        raise _foreign("TCB info", expected, f"{tcb_info.id} {tcb_info.fmspc.hex()}")
    if identity.id != identity_id:
        raise _foreign("QE identity", f"that of {key.tee.upper()}", identity.id)
    for text, signature, pem, what, next_update in (
        (
            collateral.tcb_info,
            collateral.tcb_info_signature,
            collateral.tcb_info_issuer_chain,
            "TCB info",
            tcb_info.next_update,
        ),
        (
            collateral.qe_identity,
            collateral.qe_identity_signature,
            collateral.qe_identity_issuer_chain,
            "QE identity",
            identity.next_update,
        ),
    ):
        signer = _signer(pem, issuer[-1], what, now)
        require_signed_by(signer, signature, text, code="collateral.signature", what=what)
        if next_update < now:
            raise _foreign(f"validity of the {what}", f"beyond {now}", next_update)


def signed_member(body: bytes, name: str) -> tuple[bytes, bytes]:
    """The exact text of a member of a JSON object, and the signature (64 B) that stands beside it.

    Raises:
        FormatError: no such object, other members, or one twice.
    """
    try:
        members = _members(body.decode())
        signature = bytes.fromhex(json.loads(members["signature"]))
        text = members[name].encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            "the service answered something else",
            code="collateral.format",
            claim=name,
            expected=f'{{"{name}": ..., "signature": "..."}}',
            actual=repr(body[:40]),
        ) from error
    if len(members) != 2 or len(signature) != 64:
        raise FormatError(
            "the service's signature is none", code="collateral.format", claim=name, expected="64 B in hex"
        )
    return text, signature


def _members(text: str) -> dict[str, str]:
    """The members of a JSON object, each value as the text it has; raises ValueError."""
    decoder = json.JSONDecoder()
    members: dict[str, str] = {}
    at = _expect(text, _skip(text, 0), "{")
    while True:
        name, at = decoder.raw_decode(text, _skip(text, at))
        start = _skip(text, _expect(text, _skip(text, at), ":"))
        _, at = decoder.raw_decode(text, start)
        if type(name) is not str or name in members:
            raise ValueError(name)
        members[name] = text[start:at]
        at = _skip(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    if _skip(text, _expect(text, at, "}")) != len(text):
        raise ValueError("something follows")
    return members


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _expect(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise ValueError(f"expected {mark}")
    return at + 1


def _chain(fetched: Fetched, names: tuple[str, ...]) -> bytes:
    for name in names:
        if name in fetched.fields:
            return unquote_to_bytes(fetched.fields[name])
    raise FormatError(
        "the service sent no issuer chain", code="collateral.format", claim="header field", expected=names[0]
    )


def _der(body: bytes, what: str) -> bytes:
    """A revocation list as it came, or out of the hex text that a PCCS sends."""
    if body[:1] == b"\x30":
        return body
    try:
        return bytes.fromhex(body.decode("ascii").strip().strip('"'))
    except ValueError as error:
        raise FormatError(
            f"the {what} is neither DER nor hex", code="collateral.format", claim=what
        ) from error


def _signer(pem: bytes, root: Certificate, what: str, now: int) -> Certificate:
    """Who signed, directly under the root that everything else has, too."""
    chain = load_chain(pem)
    verify_chain(chain, now=now, code="collateral.chain", what=f"{what} signing chain")
    _require_two(chain, f"{what} signing chain")
    if chain[-1].der != root.der:
        raise _foreign(f"root of the {what}", described(root), described(chain[-1]))
    return chain[0]


def _require_two(chain: Sequence[Certificate], what: str) -> None:
    """Refuse anything but a certificate and its root, as a verifier does."""
    if len(chain) != 2:
        raise _foreign(what, "2 certificates", len(chain))


def _foreign(claim: str, expected: str, actual: Any) -> FormatError:
    return FormatError(
        "the service's collateral is for something else",
        code="collateral.foreign",
        claim=claim,
        expected=expected,
        actual=actual,
    )
