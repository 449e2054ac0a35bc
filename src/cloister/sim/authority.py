"""The simulated platform's own vendor: a private root, its certificates and its collateral.

It makes SGX and TDX evidence in the genuine format, so that one verifier serves simulation and production.
What it vouches for is worth nothing: whoever administers the machine has its keys. Its names say so.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core.evidence.bundle import Collateral
from cloister.core.evidence.pck import PckExtension
from cloister.core.secret import Secret
from cloister.errors import UsageError
from cloister.sim import authority_files, pki, snp, tcb
from cloister.sim import nitro as aws
from cloister.sim.authority_files import FOLDER
from cloister.sim.nitro import SimulatedNitro
from cloister.sim.pki import Identity, raw_sign, require_valid, restore
from cloister.sim.quote import (
    ATTRIBUTES,
    DEBUG_ATTRIBUTES,
    TD_ATTRIBUTES,
    XFAM,
    QuotingEnclave,
    report,
    td_report,
    td_report_15,
)
from cloister.sim.snp import SimulatedAmd

FMSPC: Final = b"SIMSGX"  # recognisable in every certificate and in TCB info
PCE_ID: Final = bytes(2)
LIFETIME: Final = 30 * 86400  # seconds that issued collateral is in force, as Intel's
CERTIFICATE_LIFETIME: Final = 10 * 366 * 86400  # seconds

_TDX: Final = tcb.TdxReference()
_TD_VERSIONS: Final = {4: "1.0", 5: "1.5"}  # of the report in a quote, where nothing else is asked for
_STEP: Final = 3600  # seconds; collateral issued within one hour carries one date, so none looks older
_SLACK: Final = 300  # seconds that a verifier's clock may be behind
_SVN: Final = (2,) * 16
_ROLES: Final = ("root", "pck-ca", "pck", "tcb-signing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaws:
    """What to get wrong, so that each refusal can be shown end to end. The default is flawless.

    Attributes:
        pck_revoked: List the PCK on the PCK CRL.
        pck_ca_revoked: List the PCK CA on the root CRL.
        tcb_signing_revoked: List the TCB signing certificate on the root CRL.
        tcb_status: Status of the platform's own TCB level.
        advisories: Advisories of that level.
        qe_status: Status of the quoting enclave's own version.
        age: Seconds to date the collateral back.
        fmspc: Platform family that TCB info speaks of.
        pce_id: PCE that TCB info speaks of.
        tdx: What TCB info says of the TDX module.
    """

    pck_revoked: bool = False
    pck_ca_revoked: bool = False
    tcb_signing_revoked: bool = False
    tcb_status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    qe_status: str = "UpToDate"
    age: int = 0
    fmspc: bytes = FMSPC
    pce_id: bytes = PCE_ID
    tdx: tcb.TdxReference = _TDX


FLAWLESS: Final = Flaws()

_Principal: TypeAlias = Identity[ec.EllipticCurvePrivateKey]


class SimulatedAuthority:
    """Root, PCK CA, PCK and TCB signer of one data directory: `create`, `open` or `open_or_create` it."""

    def __init__(
        self,
        identities: dict[str, _Principal],
        platform_secret: Secret,
        amd: SimulatedAmd,
        nitro: SimulatedNitro,
    ) -> None:
        self.amd: Final = amd
        self.nitro: Final = nitro
        self._root = identities["root"]
        self._pck_ca = identities["pck-ca"]
        self._pck = identities["pck"]
        self._tcb_signing = identities["tcb-signing"]
        self._platform_secret = platform_secret
        self._platform = _platform(self._root.certificate)
        self._quoting_enclave = QuotingEnclave(
            attestation_key=ec.generate_private_key(ec.SECP256R1()),
            pck_key=self._pck.key,
            certification_data=_pem(self._pck, self._pck_ca, self._root),
            cpu_svn=self._platform.cpu_svn,
            pce_svn=self._platform.pce_svn,
        )

    @classmethod
    def create(cls, directory: Path, *, now: int) -> SimulatedAuthority:
        """Make a new authority and keep it in ``directory``; keys are readable by the owner only.

        Args:
            directory: The data directory; made if it doesn't exist.
            now: Unix seconds; the certificates are valid from the day before.

        Raises:
            UsageError: there already is one, or the directory can't be written.
        """
        identities = _issue_all(now - 86400)
        platform_secret = Secret(secrets.token_bytes(32))
        amd, nitro = SimulatedAmd.create(now=now), SimulatedNitro.create(now=now)
        parts = {role: identity.to_pem() for role, identity in identities.items()}
        authority_files.write(directory, parts | amd.to_pem() | nitro.to_pem(), platform_secret)
        return cls(identities, platform_secret, amd, nitro)

    @classmethod
    def open(cls, directory: Path) -> SimulatedAuthority:
        """Read the authority of a data directory.

        Raises:
            UsageError: there is none, it is damaged, or others can read its keys.
        """
        parts, platform_secret = authority_files.read(directory, (*_ROLES, *snp.ROLES, *aws.ROLES))
        try:
            identities = {role: restore(*parts[role]) for role in _ROLES}
        except ValueError:
            raise authority_files.damaged(directory) from None
        return cls(identities, platform_secret, SimulatedAmd.from_pem(parts), SimulatedNitro.from_pem(parts))

    @classmethod
    def open_or_create(cls, directory: Path, *, now: int) -> SimulatedAuthority:
        """Open the authority of ``directory``; make it at the first time. Safe against a second maker.

        Raises:
            UsageError: as `create` and `open`.
        """
        if not (directory / FOLDER).exists():
            try:
                return cls.create(directory, now=now)
            except UsageError:
                if not (directory / FOLDER).exists():
                    raise
        return cls.open(directory)

    @property
    def roots_der(self) -> bytes:
        """Every root, one after the other: what a policy names as ``dangerous_simulated_roots``."""
        return self.root_der + self.amd.root_der + self.nitro.root_der

    @property
    def root_der(self) -> bytes:
        """The root of its SGX and TDX quotes."""
        return self._root.certificate.public_bytes(Encoding.DER)

    @property
    def root_pem(self) -> str:
        """The same in PEM."""
        return self._root.certificate.public_bytes(Encoding.PEM).decode()

    def collateral(self, now: int, *, tee: str = "sgx", flaws: Flaws = FLAWLESS) -> Collateral:
        """Issue collateral in force from ``now`` on for 30 days; its numbers grow.

        Args:
            now: Unix seconds.
            tee: ``"sgx"`` or ``"tdx"``: the kind of quote that it serves.
            flaws: What to get wrong.
        """
        issued = (now - _SLACK) // _STEP * _STEP - flaws.age
        next_update = issued + LIFETIME
        number = issued // _STEP
        signing_chain = _pem(self._tcb_signing, self._root)
        revoked_by_root = [
            identity.certificate.serial_number
            for identity, revoked in (
                (self._pck_ca, flaws.pck_ca_revoked),
                (self._tcb_signing, flaws.tcb_signing_revoked),
            )
            if revoked
        ]
        revoked_pcks = [self._pck.certificate.serial_number] if flaws.pck_revoked else []
        described = PckExtension(
            ppid=self._platform.ppid,
            tcb_components=self._platform.tcb_components,
            pce_svn=self._platform.pce_svn,
            cpu_svn=self._platform.cpu_svn,
            pce_id=flaws.pce_id,
            fmspc=flaws.fmspc,
            sgx_type=self._platform.sgx_type,
        )
        info = tcb.tcb_info(
            described,
            issued=issued,
            next_update=next_update,
            evaluation_number=number,
            status=flaws.tcb_status,
            advisories=flaws.advisories,
            tdx=flaws.tdx if tee == "tdx" else None,
        )
        identity = tcb.qe_identity(
            issued=issued,
            next_update=next_update,
            evaluation_number=number,
            status=flaws.qe_status,
            tdx=tee == "tdx",
        )

        def revoke(issuer: _Principal, serials: list[int]) -> bytes:
            return pki.revoke(
                serials,
                issuer=issuer.certificate,
                issuer_key=issuer.key,
                issued=issued,
                next_update=next_update,
                number=number,
            )

        return Collateral(
            pck_crl_issuer_chain=_pem(self._pck_ca, self._root),
            root_ca_crl=revoke(self._root, revoked_by_root),
            pck_crl=revoke(self._pck_ca, revoked_pcks),
            tcb_info_issuer_chain=signing_chain,
            tcb_info=info,
            tcb_info_signature=raw_sign(self._tcb_signing.key, info),
            qe_identity_issuer_chain=signing_chain,
            qe_identity=identity,
            qe_identity_signature=raw_sign(self._tcb_signing.key, identity),
        )

    def quote(
        self,
        *,
        report_data: bytes,
        mr_enclave: bytes,
        mr_signer: bytes,
        isv_prod_id: int,
        isv_svn: int,
        debug: bool = False,
        now: int,
    ) -> bytes:
        """A signed quote over these values.

        Args:
            report_data: 64 B that the enclave binds.
            mr_enclave: 32 B.
            mr_signer: 32 B.
            isv_prod_id: 0 to 65535.
            isv_svn: 0 to 65535.
            debug: Mark the enclave as open to a debugger.
            now: Unix seconds.

        Raises:
            UsageError: a number is out of range, or the platform's certificates have expired.
            EvidenceError: a value has another length.
        """
        for name, number in (("isv_prod_id", isv_prod_id), ("isv_svn", isv_svn)):
            if not 0 <= number <= 0xFFFF:
                raise UsageError("out of range", claim=name, expected="0 to 65535", actual=number)
        require_valid(self._pck.certificate, now)
        body = report(
            cpu_svn=self._platform.cpu_svn,
            attributes=DEBUG_ATTRIBUTES if debug else ATTRIBUTES,
            mr_enclave=mr_enclave,
            mr_signer=mr_signer,
            isv_prod_id=isv_prod_id,
            isv_svn=isv_svn,
            report_data=report_data,
        )
        return self._quoting_enclave.sign(body)

    def td_quote(
        self,
        *,
        report_data: bytes,
        mr_td: bytes,
        rtmrs: Sequence[bytes] = (bytes(48),) * 4,
        mr_config_id: bytes = bytes(48),
        td_attributes: bytes = TD_ATTRIBUTES,
        xfam: bytes = XFAM,
        version: int = 4,
        td_version: str = "",
        debug: bool = False,
        mr_service_td: bytes = bytes(48),
        tee_tcb_svn: bytes = tcb.TEE_TCB_SVN,
        tee_tcb_svn2: bytes = tcb.TEE_TCB_SVN,
        now: int,
    ) -> bytes:
        """A signed quote over a trust domain with these values.

        Args:
            report_data: 64 B that the guest binds.
            mr_td: 48 B.
            rtmrs: Four registers of 48 B.
            mr_config_id: 48 B.
            td_attributes: 8 B.
            xfam: 8 B.
            version: 4 or 5, of the quote.
            td_version: ``"1.0"`` or ``"1.5"``, of the report; by default 1.0 in version 4, 1.5 in version 5.
            debug: Mark the TD as open to a debugger.
            mr_service_td: 48 B; TDX 1.5 only.
            tee_tcb_svn: 16 B; versions of the TDX module that launched the TD.
            tee_tcb_svn2: 16 B; of the module that runs now; TDX 1.5 only.
            now: Unix seconds.

        Raises:
            UsageError: other versions, not four registers, or the platform's certificates have expired.
            EvidenceError: a value has another length, or a reserved attribute is set.
        """
        td_version = td_version or _TD_VERSIONS.get(version, "none")
        if (version, td_version) not in {(4, "1.0"), (5, "1.0"), (5, "1.5")} or len(rtmrs) != 4:
            raise UsageError(
                "there is no such quote",
                claim="version of quote and report, registers",
                expected="4 with 1.0, or 5 with 1.0 or 1.5; 4 registers",
                actual=f"{version} with {td_version}; {len(rtmrs)} registers",
            )
        require_valid(self._pck.certificate, now)
        body = td_report(
            report_data=report_data,
            mr_td=mr_td,
            rtmrs=rtmrs,
            mr_config_id=mr_config_id,
            td_attributes=_with_debug(td_attributes) if debug else td_attributes,
            xfam=xfam,
            tee_tcb_svn=tee_tcb_svn,
        )
        if td_version == "1.5":
            body = td_report_15(body, tee_tcb_svn2=tee_tcb_svn2, mr_service_td=mr_service_td)
        return self._quoting_enclave.sign(body, version=version)

    def sealing_key(self, mr_enclave: bytes) -> Secret:
        """The 32-byte key that only enclaves with this measurement get from this platform.

        Raises:
            UsageError: ``mr_enclave`` hasn't 32 bytes.
        """
        if len(mr_enclave) != 32:
            raise UsageError(
                "a measurement has 32 bytes", claim="mr_enclave", expected="32 B", actual=len(mr_enclave)
            )
        info = b"cloister/v1/simulated-sealing-key" + mr_enclave
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info)
        return Secret(kdf.derive(self._platform_secret.reveal()))


def _with_debug(td_attributes: bytes) -> bytes:
    return (int.from_bytes(td_attributes, "little") | 1).to_bytes(len(td_attributes), "little")


def _issue_all(not_before: int) -> dict[str, _Principal]:
    not_after = not_before + CERTIFICATE_LIFETIME
    issued: dict[str, _Principal] = {}

    def issue(role: str, name: str, issuer: str, path_length: int | None, sgx: bytes | None = None) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        by = issued.get(issuer)
        certificate = pki.issue(
            name,
            key.public_key(),
            issuer=by.certificate if by else None,
            issuer_key=by.key if by else key,
            not_before=not_before,
            not_after=not_after,
            path_length=path_length,
            sgx=sgx,
        )
        issued[role] = Identity(key=key, certificate=certificate)

    issue("root", pki.ROOT_NAME, "", 1)
    issue("pck-ca", pki.PCK_CA_NAME, "root", 0)
    issue("tcb-signing", pki.TCB_SIGNING_NAME, "root", None)
    platform = _platform(issued["root"].certificate)
    issue("pck", pki.PCK_NAME, "pck-ca", None, pki.sgx_extension(platform))
    return issued


def _platform(root: x509.Certificate) -> PckExtension:
    return PckExtension(
        ppid=hashlib.sha256(b"simulated PPID" + root.public_bytes(Encoding.DER)).digest()[:16],
        tcb_components=_SVN,
        pce_svn=2,
        cpu_svn=bytes(_SVN),
        pce_id=PCE_ID,
        fmspc=FMSPC,
        sgx_type=0,
    )


def _pem(*chain: _Principal) -> bytes:
    return b"".join(identity.certificate.public_bytes(Encoding.PEM) for identity in chain)
