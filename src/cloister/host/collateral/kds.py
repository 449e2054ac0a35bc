"""SEV-SNP certificates and revocation lists from a service with the interface of AMD's KDS (AMD 57230).

::

    GET /vcek/v1/{product}/{chip id}?blSPL=..&teeSPL=..&snpSPL=..&ucodeSPL=..   VCEK, DER (Turin: also fmcSPL)
    GET /vcek/v1/{product}/cert_chain                                           ASK and ARK, PEM
    GET /vcek/v1/{product}/crl                                                  the ARK's list, DER

A VLEK is given out to its cloud provider alone, whose hosts put it into the certificate table of a report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cloister.core.evidence.bundle import MAX_COLLATERAL_PART
from cloister.core.evidence.snp import PRODUCTS, SnpTcb
from cloister.core.evidence.snp_table import make_collateral
from cloister.core.evidence.vek import TURIN_CHIP_ID_SIZE, VekExtensions
from cloister.core.verifier.certificates import AMD, MAX_CERTIFICATE, MAX_PEM, load_chain, load_crl, read_pem
from cloister.core.verifier.chain import verify_chain, verify_crl
from cloister.core.verifier.collateral_key import SnpKey
from cloister.core.verifier.snp import read_extensions
from cloister.errors import FormatError, UsageError
from cloister.host.collateral.service import Service, require_url

AMD_KDS: Final = "https://kdsintf.amd.com"

_ARGUMENTS: Final = {
    "fmc": "fmcSPL",
    "bootloader": "blSPL",
    "tee": "teeSPL",
    "snp": "snpSPL",
    "microcode": "ucodeSPL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductCollateral:
    """What one product's processors share: ASK and ARK in DER, and the ARK's revocation list in DER."""

    ask: bytes
    ark: bytes
    crl: bytes


def fetch_snp(
    service: Service,
    key: SnpKey,
    product: str,
    *,
    now: int,
    kds: str = AMD_KDS,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[bytes, ProductCollateral]:
    """Fetch one processor's certificates (PEM: VCEK, ASK, ARK), and what its product shares.

    Args:
        service: Carries the requests.
        key: Chip and reported TCB.
        product: One of `PRODUCTS`.
        now: Unix seconds.
        kds: Base URL of the service.
        say: Told what is being fetched.

    Raises:
        UsageError: an unknown product, a masked chip, or a URL that is none.
        NotFound: the service doesn't know the chip, or not with this TCB.
        FormatError: an answer does not parse, or is for another processor or TCB.
        EvidenceRefused: a signature is wrong, or something has expired.
        Unavailable: the service doesn't answer.
    """
    _require_product(product)
    if not any(key.chip_id):
        raise UsageError(
            "the host masks its chip's identifier, so that nothing can be fetched for it",
            code="collateral.masked",
            claim="chip id",
            expected="a chip's",
            actual="zero",
            hint="Its certificates must come in the table that the host gives with a report",
        )
    parts = SnpTcb.from_bytes(key.tcb, product).parts
    # Turin's service knows 8 B of the report's 64; the others are zero.
    chip = key.chip_id[:TURIN_CHIP_ID_SIZE] if product == "Turin" else key.chip_id
    shared = fetch_snp_crl(service, product, now=now, kds=kds, say=say)
    say("VCEK")
    vcek = service.get(
        f"{require_url(kds)}/vcek/v1/{product}/{chip.hex()}",
        {_ARGUMENTS[name]: str(value) for name, value in parts.items()},
        limit=MAX_CERTIFICATE,
        what="VCEK",
    ).body
    certificates = make_collateral(vek=vcek, ask=shared.ask, ark=shared.ark).certificates
    chain = load_chain(certificates, AMD)
    verify_chain(chain, now=now, code="collateral.chain", what="VCEK chain", leaf_states_usage=False)
    _require_vcek(read_extensions(chain[0]), parts, chip)
    return certificates, shared


def fetch_snp_crl(
    service: Service,
    product: str,
    *,
    now: int,
    kds: str = AMD_KDS,
    say: Callable[[str], None] = lambda _: None,
) -> ProductCollateral:
    """Fetch what one product's processors share; enough where hosts give the certificates with a report.

    Raises:
        UsageError, NotFound, FormatError, EvidenceRefused, Unavailable: as `fetch_snp`.
    """
    _require_product(product)
    base = f"{require_url(kds)}/vcek/v1/{product}"
    say("ASK and ARK")
    pem = service.get(f"{base}/cert_chain", {}, limit=MAX_PEM, what="ASK and ARK").body
    ders = read_pem(pem, most=2)
    chain = load_chain(pem, AMD)
    if len(ders) != 2 or product not in chain[1].common_name:
        raise FormatError(
            "the service's chain is another",
            code="collateral.foreign",
            claim="ASK and ARK",
            expected=f"those of {product}",
            actual=", ".join(certificate.common_name for certificate in chain),
        )
    verify_chain(chain, now=now, code="collateral.chain", what="ASK chain", leaf_is_ca=True)
    say("revocation list")
    crl = service.get(f"{base}/crl", {}, limit=MAX_COLLATERAL_PART, what="revocation list").body
    verify_crl(load_crl(crl, AMD), chain[1], now=now, code="collateral.crl", what="revocation list")
    return ProductCollateral(ask=ders[0], ark=ders[1], crl=crl)


def _require_vcek(vcek: VekExtensions, tcb: Mapping[str, int], chip: bytes) -> None:
    """Refuse a VCEK for something else than was asked for: it would replace the one that fits."""
    for claim, expected, actual in (
        ("TCB", str(dict(tcb)), str(dict(vcek.tcb.parts))),
        ("chip", chip.hex(), vcek.chip_id.hex()),
    ):
        if expected != actual:
            raise FormatError(
                "the service's VCEK is another",
                code="collateral.foreign",
                claim=claim,
                expected=expected,
                actual=actual,
            )


def _require_product(product: str) -> None:
    if product not in PRODUCTS:
        raise UsageError(
            "unknown product",
            code="collateral.product",
            claim="product",
            expected=", ".join(PRODUCTS),
            actual=product[:40],
            hint="A report of version 2 doesn't name it: say --product",
        )
