"""Real DCAP evidence that something happened to, and what two verifiers say of it.

Every mutation is a pure function of its number, so a failing one can be made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import dcap_qvl

from cloister.core.evidence import Collateral, Evidence
from cloister.core.evidence.dcap import Quote, signed_bytes
from cloister.core.evidence.tdx import TdReport
from cloister.core.verifier import TrustAnchors, dcap
from cloister.core.verifier.result import VerifiedEvidence
from cloister.errors import EvidenceError, EvidenceRefused

PARTS = tuple(Collateral.__dataclass_fields__)
CHAINS = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")
TRAILER = b"\nextra bytes(only for testing purpose)\n"  # Google's, in tdx-v4-tcb-not-supported
END = b"-----END CERTIFICATE-----\n"

_HEADER = (
    ("version", 2),
    ("attestation_key_type", 2),
    ("tee_type", 4),
    ("qe_svn", 2),
    ("pce_svn", 2),
    ("qe_vendor_id", 16),
    ("user_data", 20),
)
_SGX_BODY = (
    ("cpu_svn", 16),
    ("misc_select", 4),
    ("reserved1", 12),
    ("isv_ext_prod_id", 16),
    ("attributes", 16),
    ("mr_enclave", 32),
    ("reserved2", 32),
    ("mr_signer", 32),
    ("reserved3", 32),
    ("config_id", 64),
    ("isv_prod_id", 2),
    ("isv_svn", 2),
    ("config_svn", 2),
    ("reserved4", 42),
    ("isv_family_id", 16),
    ("report_data", 64),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Evidence to verify at ``now``, and where it comes from."""

    name: str
    tee: str
    quote: bytes
    collateral: Mapping[str, bytes]
    now: int


def load(folder: Path) -> Case:
    """The evidence of one folder of vectors, without the text that follows one of the quotes."""
    collateral = Collateral.from_json((folder / "collateral.json").read_text()).to_data()
    quote = (folder / "quote.bin").read_bytes()
    return Case(
        name=folder.name,
        tee="tdx" if quote[4] == 0x81 else "sgx",
        quote=quote.removesuffix(TRAILER),
        collateral=collateral,
        now=json.loads((folder / "expected.json").read_text())["verify_at"],
    )


def fields(quote: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of every field of a quote by name."""
    parsed = Quote.from_bytes(quote)
    version = parsed.header.version
    sizes = list(_HEADER)
    if version == 5:
        sizes += [("body_type", 2), ("body_size", 4)]
    sizes += parsed.body.FIELDS if isinstance(parsed.body, TdReport) else _SGX_BODY
    assert sum(size for _name, size in sizes) == len(signed_bytes(parsed.header, parsed.body))
    sizes += [("signature_size", 4), ("signature", 64), ("attestation_key", 64)]
    if version > 3:
        sizes += [("outer_type", 2), ("outer_size", 4)]
    sizes += [(f"qe_{name}", size) for name, size in _SGX_BODY]
    sizes += [
        ("qe_report_signature", 64),
        ("auth_size", 2),
        ("auth_data", len(parsed.signature.qe_auth_data)),
        ("certification_type", 2),
        ("certification_size", 4),
    ]
    for number, pem in enumerate(split(parsed.signature.certification_data)):
        sizes.append((f"certificate{number}", len(pem)))
    found, offset = {}, 0
    for name, size in sizes:
        found[name] = (offset, size)
        offset += size
    if parsed.padding:
        found["padding"] = (offset, len(parsed.padding))
    assert offset + len(parsed.padding) == len(quote)
    return found


def split(chain: bytes) -> list[bytes]:
    """The certificates of a PEM chain; a NUL that ends it goes with the last one."""
    parts = [part + END for part in chain.rstrip(b"\0").split(END) if part]
    assert b"".join(parts).rstrip() == chain.rstrip(b"\0").rstrip()
    return [*parts[:-1], chain[len(b"".join(parts[:-1])) :]]


def flip(data: bytes, start: int, size: int, pick: random.Random) -> bytes:
    """``data`` with one bit changed between ``start`` and ``start + size``."""
    bit = pick.randrange(8 * size)
    changed = bytearray(data)
    changed[start + bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def each_field(cases: list[Case]) -> Iterator[tuple[str, Case]]:
    """One flipped bit in every field of every quote and in every part of its collateral."""
    for case in cases:
        pick = random.Random(case.name)
        for name, (start, size) in fields(case.quote).items():
            yield f"{case.name}: bit of {name}", replace(case, quote=flip(case.quote, start, size, pick))
        for part in PARTS:
            data = flip(case.collateral[part], 0, len(case.collateral[part]), pick)
            yield f"{case.name}: bit of {part}", with_parts(case, **{part: data})


def at_random(cases: list[Case], number: int) -> tuple[str, Case]:
    """Mutation ``number``: a flipped bit, a splice, another time, chains in disorder, or other padding."""
    pick = random.Random(number)
    case = pick.choice(cases)
    make = pick.choices(
        (_bit_of_quote, _bit_of_collateral, _splice, _time, _chains, _padding), (10, 8, 6, 4, 6, 1)
    )[0]
    what, changed = make(case, cases, pick)
    return f"{number} {case.name}: {what}", changed


def with_parts(case: Case, **parts: bytes) -> Case:
    return replace(case, collateral={**case.collateral, **parts})


def _bit_of_quote(case: Case, _cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    name, (start, size) = pick.choice(sorted(fields(case.quote).items()))
    return f"bit of {name}", replace(case, quote=flip(case.quote, start, size, pick))


def _bit_of_collateral(case: Case, _cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    part = pick.choice(PARTS)
    data = case.collateral[part]
    return f"bit of {part}", with_parts(case, **{part: flip(data, 0, len(data), pick)})


def _splice(case: Case, cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    """Parts of another vector's collateral, or all of it, or a quote with another's pieces."""
    other = pick.choice(cases)
    kind = pick.randrange(4)
    if kind == 0:
        return f"collateral of {other.name}", replace(
            case, collateral=other.collateral, now=pick.choice((case.now, other.now))
        )
    if kind == 1:
        parts = pick.sample(PARTS, pick.randint(1, 4))
        chosen = {part: other.collateral[part] for part in parts}
        return f"{parts} of {other.name}", with_parts(case, **chosen)
    if kind == 2:
        field = pick.choice(("tcb_info", "qe_identity"))
        chosen = {part: other.collateral[part] for part in PARTS if part.startswith(field)}
        return f"signed {field} of {other.name}", with_parts(case, **chosen)
    mine, theirs = Quote.from_bytes(case.quote), Quote.from_bytes(other.quote)
    field = pick.choice(tuple(mine.signature.__dataclass_fields__))
    signature = replace(mine.signature, **{field: getattr(theirs.signature, field)})
    return f"{field} of {other.name}", replace(case, quote=replace(mine, signature=signature).to_bytes())


def _time(case: Case, _cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    """Another time: near an edge of the collateral's or a certificate's validity, or years away."""
    text = json.loads(case.collateral["tcb_info"]), json.loads(case.collateral["qe_identity"])
    edges = [seconds(document[name]) for document in text for name in ("issueDate", "nextUpdate")]
    if pick.randrange(3):
        now = pick.choice(edges) + pick.choice((-1, 0, 1))
    else:
        now = case.now + pick.randrange(-10 * 366 * 86400, 30 * 366 * 86400)
    return f"time {now}", replace(case, now=now)


def _chains(case: Case, cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    """A chain in another place, or a chain with certificates left out, doubled or in another order."""
    if pick.randrange(2):
        first, second = pick.sample(CHAINS, 2)
        return f"{first} as {second}", with_parts(case, **{second: case.collateral[first]})
    quote = Quote.from_bytes(case.quote)
    place = pick.choice((*CHAINS, "pck"))
    chain = quote.signature.certification_data if place == "pck" else case.collateral[place]
    certificates = split(chain.rstrip(b"\0"))
    stranger = pick.choice(split(pick.choice(cases).collateral[pick.choice(CHAINS)]))
    disorder = pick.choice(
        (
            certificates[::-1],
            certificates[:-1],
            certificates[1:],
            [*certificates, certificates[-1]],
            [certificates[0], *certificates],
            [certificates[0], stranger, *certificates[1:]],
            [stranger, *certificates[1:]],
            [*certificates[:-1], stranger],
        )
    )
    chain = b"".join(each.rstrip(b"\n") + b"\n" for each in disorder) or b"\n"
    if place != "pck":
        return f"disorder in {place}", with_parts(case, **{place: chain})
    signature = replace(quote.signature, certification_data=chain)
    return "disorder in the PCK chain", replace(case, quote=replace(quote, signature=signature).to_bytes())


def _padding(case: Case, _cases: list[Case], pick: random.Random) -> tuple[str, Case]:
    parsed = Quote.from_bytes(case.quote)
    size = pick.randrange(9000)
    return f"{size} B of padding", replace(
        case, quote=replace(parsed, padding=pick.choice((bytes(size), pick.randbytes(size)))).to_bytes()
    )


def seconds(text: str) -> int:
    """An ISO time as unix seconds."""
    return int(datetime.fromisoformat(text).timestamp())


def ours(case: Case, anchors: TrustAnchors) -> VerifiedEvidence | EvidenceError | EvidenceRefused:
    """What we say: a result or a refusal; anything else is a defect."""
    try:
        evidence = Evidence(tee=case.tee, quote=case.quote, collateral=Collateral(**case.collateral))
        return dcap.verify(evidence, anchors=anchors, now=case.now)
    except (EvidenceError, EvidenceRefused) as error:
        return error


def theirs(case: Case) -> dcap_qvl.VerifiedReport | str:
    """What dcap-qvl says: a result or the text of its refusal."""
    try:
        parts = {
            name: value if name.endswith(("_crl", "_signature")) else value.decode()
            for name, value in case.collateral.items()
        }
    except UnicodeDecodeError:
        return "not text"
    try:
        return dcap_qvl.verify(case.quote, dcap_qvl.QuoteCollateralV3(**parts), case.now)
    except ValueError as error:
        return str(error)
