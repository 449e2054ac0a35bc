"""A simulated AMD: reports of SEV-SNP guests in the genuine format, under a root of its own.

What it vouches for is worth nothing: whoever administers the machine has its keys. Its names say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.core.evidence.bundle import AmdCollateral
from cloister.core.evidence.snp import ALGORITHM_ECDSA_P384, PRODUCTS, SnpReport, SnpTcb
from cloister.core.evidence.snp_table import CertificateTable, make_collateral
from cloister.errors import UsageError
from cloister.sim import pki, snp_pki
from cloister.sim.snp_pki import Authority, Endorser

ROLES: Final = ("snp-ark", "snp-ask", "snp-vcek")  # names of keys and certificates in `SimulatedAmd.to_pem`
GUEST_POLICY: Final = 0x30000  # SMT is allowed; bit 17 is always set (AMD 56860, POLICY)
DEBUG: Final = 1 << 19  # of the guest policy
PROVIDER: Final = "CN=simulated.cloister.invalid"
LIFETIME: Final = 30 * 86400  # seconds that a revocation list is in force
CERTIFICATE_LIFETIME: Final = 10 * 366 * 86400  # seconds

_STEP: Final = 3600  # seconds; lists issued within one hour carry one date, so none looks older
_SLACK: Final = 300  # seconds that a verifier's clock may be behind
_CPUID: Final = {"Milan": (0x19, 0x01, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 0x02, 1)}
_NO_CPUID: Final = (0, 0, 0)
_STEPPING: Final = {"Milan": "Milan-B0", "Genoa": "Genoa", "Turin": "Turin"}  # as AMD writes it into VCEKs
_TCB: Final = SnpTcb(bootloader=10, tee=0, snp=23, microcode=200)
_PLATFORM_INFO: Final = 0x25  # SMT, ECC memory, alias check complete
_FIRMWARE: Final = bytes((40, 55, 1))  # 1.55, build 40
_NO_MIGRATION_AGENT: Final = b"\xff" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpFlaws:
    """What to get wrong in collateral, so that each refusal can be shown. The default is flawless.

    Attributes:
        ask_revoked: List the ASK.
        ark_revoked: List the ARK.
        age: Seconds to date the revocation list back.
        no_crl: Leave the revocation list out.
        expired: Give a VCEK whose validity has ended.
        tcb: TCB that the VCEK is made for, in place of the platform's.
        chip_id: Chip that the VCEK is made for, in place of the platform's; 64 B, on Turin 8.
        vlek: Give the chain of a VLEK.
    """

    ask_revoked: bool = False
    ark_revoked: bool = False
    age: int = 0
    no_crl: bool = False
    expired: bool = False
    tcb: SnpTcb | None = None
    chip_id: bytes | None = None
    vlek: bool = False


FLAWLESS: Final = SnpFlaws()


class SimulatedAmd:
    """ARK, ASK and one platform with its VCEK: `create` one, or restore it `from_pem`."""

    def __init__(self, ark: Authority, ask: Authority, vcek: Endorser) -> None:
        self._ark, self._ask, self._vcek = ark, ask, vcek
        self.product: Final = ark.common_name.removeprefix(f"{snp_pki.PREFIX}ARK-")
        self._start: Final = int(ark.certificate.not_valid_before_utc.timestamp())

    @classmethod
    def create(cls, *, now: int, product: str = "Genoa") -> SimulatedAmd:
        """Make new keys and certificates, which takes about a tenth of a second.

        Args:
            now: Unix seconds; the certificates are valid from the day before.
            product: ``"Milan"``, ``"Genoa"`` or ``"Turin"``.

        Raises:
            UsageError: another product.
        """
        if product not in PRODUCTS:
            raise UsageError("unknown product", claim="product", expected=", ".join(PRODUCTS), actual=product)
        start = now - 86400
        end = start + CERTIFICATE_LIFETIME
        ark = snp_pki.issue_authority(f"ARK-{product}", None, not_before=start, not_after=end)
        ask = snp_pki.issue_authority(f"SEV-{product}", ark, not_before=start, not_after=end, path_length=0)
        vcek = snp_pki.issue_endorser(
            "SEV-VCEK",
            ask,
            key=ec.generate_private_key(ec.SECP384R1()),
            not_before=start,
            not_after=end,
            extensions=snp_pki.vcek_extensions(
                _STEPPING[product], platform_tcb(product), _chip_id(product, ark)
            ),
        )
        return cls(ark, ask, vcek)

    def to_pem(self) -> dict[str, tuple[bytes, bytes]]:
        """Private key and certificate in PEM, for each of `ROLES`; `from_pem` restores from it."""
        identities = (self._ark.to_pem(), self._ask.to_pem(), self._vcek.to_pem())
        return dict(zip(ROLES, identities, strict=True))

    @classmethod
    def from_pem(cls, parts: Mapping[str, tuple[bytes, bytes]]) -> SimulatedAmd:
        """What `to_pem` was called on.

        Raises:
            UsageError: a part is missing or damaged, or a key isn't its certificate's.
        """
        try:
            amd = cls(
                snp_pki.restore_authority(*parts["snp-ark"]),
                snp_pki.restore_authority(*parts["snp-ask"]),
                pki.restore(*parts["snp-vcek"]),
            )
        except (KeyError, ValueError):
            amd = None  # without a cause: a parser's message could quote a key
        if amd is None or amd.product not in PRODUCTS:
            raise UsageError("the simulated AMD is damaged", code="sim.authority")
        return amd

    @property
    def root_der(self) -> bytes:
        """The ARK."""
        return self._ark.der

    @property
    def chip_id(self) -> bytes:
        """64 B identifier of its one processor."""
        return _chip_id(self.product, self._ark).ljust(64, b"\0")

    @property
    def tcb(self) -> SnpTcb:
        """The platform's TCB version: current, committed and reported."""
        return platform_tcb(self.product)

    def collateral(self, now: int, *, flaws: SnpFlaws = FLAWLESS) -> AmdCollateral:
        """VCEK, ASK, ARK, and a revocation list in force from ``now`` (unix seconds) on for 30 days."""
        vek, ask = (self._vlek, self._asvk) if flaws.vlek else (self._flawed_vcek(now, flaws), self._ask)
        listed = ((ask, flaws.ask_revoked), (self._ark, flaws.ark_revoked))
        issued = (now - _SLACK) // _STEP * _STEP - flaws.age
        crl = snp_pki.revoke(
            [authority.certificate.serial_number for authority, revoked in listed if revoked],
            self._ark,
            issued=issued,
            next_update=issued + LIFETIME,
            number=issued // _STEP,
        )
        return make_collateral(vek=vek.der, ask=ask.der, ark=self._ark.der, crl=b"" if flaws.no_crl else crl)

    def certificate_table(self) -> bytes:
        """What a host hands to the guest beside a report."""
        parts = {"ARK": self._ark.der, "ASK": self._ask.der, "VCEK": self._vcek.der}
        return CertificateTable.pack(parts).to_bytes()

    def report(
        self,
        *,
        report_data: bytes,
        measurement: bytes,
        guest_policy: int = GUEST_POLICY,
        vmpl: int = 0,
        host_data: bytes = bytes(32),
        guest_svn: int = 0,
        version: int = 3,
        debug: bool = False,
        vlek: bool = False,
        masked: bool = False,
    ) -> bytes:
        """A signed report over these values.

        Args:
            report_data: 64 B that the guest binds.
            measurement: 48 B.
            guest_policy: 64 bits, bit 17 set.
            vmpl: 0 to 3.
            host_data: 32 B.
            guest_svn: 0 to 2**32 - 1.
            version: 2 to 5.
            debug: Let the policy open the guest to a debugger.
            vlek: Have it signed by a VLEK.
            masked: Leave the chip's identifier out.

        Raises:
            EvidenceError: a value is out of range or has another length.
        """
        family, model, stepping = _CPUID[self.product] if version > 2 else _NO_CPUID
        tcb = self.tcb.to_bytes()
        report = SnpReport(
            version=version,
            guest_svn=guest_svn,
            policy=guest_policy | (DEBUG if debug else 0),
            family_id=bytes(16),
            image_id=bytes(16),
            vmpl=vmpl,
            signature_algorithm=ALGORITHM_ECDSA_P384,
            current_tcb=tcb,
            platform_info=_PLATFORM_INFO,
            key_info=1 << 2 if vlek else 0,
            report_data=report_data,
            measurement=measurement,
            host_data=host_data,
            id_key_digest=bytes(48),
            author_key_digest=bytes(48),
            report_id=hashlib.sha256(b"simulated guest" + measurement).digest(),
            report_id_ma=_NO_MIGRATION_AGENT,
            reported_tcb=tcb,
            cpuid_family=family,
            cpuid_model=model,
            cpuid_stepping=stepping,
            chip_id=bytes(64) if masked else self.chip_id,
            committed_tcb=tcb,
            current_version=_FIRMWARE,
            committed_version=_FIRMWARE,
            launch_tcb=tcb,
            launch_mitigation_vector=0,
            current_mitigation_vector=0,
            signature=bytes(96),
        )
        return self.sign(report)

    def sign(self, report: SnpReport) -> bytes:
        """``report`` with a new signature, by the key that it names; by the VCEK where it names none."""
        key = self._vlek.key if report.signer == "VLEK" else self._vcek.key
        return replace(report, signature=pki.raw_sign(key, report.signed_bytes)).to_bytes()

    @cached_property
    def _asvk(self) -> Authority:
        """Issuer of the VLEK; both are made when first asked for, and not kept."""
        return snp_pki.issue_authority(
            f"SEV-VLEK-{self.product}",
            self._ark,
            not_before=self._start,
            not_after=self._start + CERTIFICATE_LIFETIME,
            path_length=0,
        )

    @cached_property
    def _vlek(self) -> Endorser:
        return snp_pki.issue_endorser(
            "SEV-VLEK",
            self._asvk,
            key=ec.generate_private_key(ec.SECP384R1()),
            not_before=self._start,
            not_after=self._start + CERTIFICATE_LIFETIME,
            extensions=snp_pki.vlek_extensions(self.product, self.tcb, PROVIDER),
        )

    def _flawed_vcek(self, now: int, flaws: SnpFlaws) -> Endorser:
        if not flaws.expired and flaws.tcb is None and flaws.chip_id is None:
            return self._vcek
        chip_id = _chip_id(self.product, self._ark) if flaws.chip_id is None else flaws.chip_id
        return snp_pki.issue_endorser(
            "SEV-VCEK",
            self._ask,
            key=self._vcek.key,
            not_before=self._start,
            not_after=now - 1 if flaws.expired else self._start + CERTIFICATE_LIFETIME,
            extensions=snp_pki.vcek_extensions(_STEPPING[self.product], flaws.tcb or self.tcb, chip_id),
        )


def platform_tcb(product: str) -> SnpTcb:
    """The TCB version of every simulated platform of a product."""
    return replace(_TCB, fmc=1) if product == "Turin" else _TCB


def _chip_id(product: str, ark: Authority) -> bytes:
    """What a VCEK says: 64 B, on Turin 8."""
    return hashlib.sha512(b"simulated chip" + ark.der).digest()[: 8 if product == "Turin" else 64]
