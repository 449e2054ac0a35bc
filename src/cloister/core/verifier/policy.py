"""The appraisal policy: reference values and limits that verified evidence must meet (RFC 9334).

People write it in TOML; peers exchange it as deterministic CBOR, whose digest names it. A policy speaks of
one TEE, or joins others: ``any_of`` admits what one of them admits, ``all_of`` what all of them admit.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Final

from cloister.core import encoding
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.claims import CLAIMS
from cloister.core.verifier.forms import FORMS, invalid
from cloister.core.verifier.subset import require_subset
from cloister.errors import UsageError

MAX_POLICY: Final = 256 << 10  # characters of TOML
MAX_DOTS: Final = 64  # in one line
MAX_MEMBERS: Final = 16  # policies that one joins
MAX_DEPTH: Final = 3  # of policies that join others
DEFAULT_MAX_AGE: Final = 31 * 86400  # seconds; Intel's collateral is in force for 30 days

_KIND: Final = "cloister/v1/appraisal-policy"
_COMMON: Final = ("max_age", "dangerous_simulated_roots")
_JOINS: Final = ("any_of", "all_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisalPolicy:
    """What evidence must say to be accepted; ``AppraisalPolicy()`` is empty and refuses everything.

    Every set of values lists what is accepted; where an optional one is empty, any value is. Bit fields are
    compared where their mask has a bit. A field of another TEE must keep its default.

    Attributes:
        tee: ``"sgx"``, ``"tdx"``, ``"snp"`` or ``"nitro"``; empty where ``any_of`` or ``all_of`` is set.
        any_of: One of these policies must accept; 2 to 16.
        all_of: All of these policies must accept; 2 to 16.
        max_age: Oldest accepted TCB info, QE identity or revocation list, or Nitro document, in seconds.
        dangerous_simulated_roots: A simulated platform's roots (`TrustAnchors.simulated`), then the only ones
            accepted. ``None``, the strict value, accepts the vendors' roots only.
        allowed_tcb: SGX, TDX: TCB statuses; at least one, never ``"Revoked"``.
        denied_advisories: SGX, TDX: advisories that must not apply.
        min_tcb_evaluation: SGX, TDX: least TCB evaluation data number.
        platforms: SGX, TDX: platform families (FMSPC, 6 B each); none where ``any_platform`` is set.
        any_platform: Accept every platform family (SGX, TDX) or product (SNP).
        mr_enclave: SGX: measurements, 32 B each; at least one.
        attributes: SGX: ATTRIBUTES, 16 B; never DEBUG.
        attributes_mask: SGX: 16 B; covers DEBUG.
        mr_signer: SGX: signers, 32 B each; optional, as ``mr_enclave`` identifies the code.
        isv_prod_id: SGX: the product id, exactly.
        min_isv_svn: SGX: least security version of the enclave.
        mr_td: TDX: MRTD, 48 B each; at least one.
        rtmr0: TDX: first runtime measurement register, 48 B each; at least one.
        rtmr1: TDX: the second one.
        rtmr2: TDX: the third one.
        rtmr3: TDX: the fourth one.
        mr_config_id: TDX: MRCONFIGID, 48 B each; at least one.
        mr_owner: TDX: MROWNER, 48 B each; optional.
        mr_owner_config: TDX: MROWNERCONFIG, 48 B each; optional.
        mr_seam: TDX: TDX modules, 48 B each; optional, as Intel's TCB info decides about them.
        mr_service_td: TDX: service TDs that may be bound, 48 B each; none by default.
        td_attributes: TDX: TDATTRIBUTES, 8 B; never DEBUG or MIGRATABLE. SEPT_VE_DISABLE is demanded always.
        td_attributes_mask: TDX: 8 B; covers both.
        xfam: TDX: XFAM, 8 B.
        xfam_mask: TDX: 8 B; zero by default, as XFAM depends on the processor.
        min_tee_tcb_svn: TDX: least TEE_TCB_SVN, 16 B; zero by default, as Intel's TCB info decides.
        measurement: SNP: launch measurements, 48 B each; at least one.
        guest_policy: SNP: POLICY; never DEBUG (bit 19) or MIGRATE_MA (bit 18).
        guest_policy_mask: SNP: covers both.
        platform_info: SNP: PLATFORM_INFO.
        platform_info_mask: SNP: zero by default.
        max_vmpl: SNP: highest privilege level number, 0 (most privileged) by default.
        min_guest_svn: SNP: least security version of the guest.
        host_data: SNP: HOST_DATA, 32 B each; optional.
        family_id: SNP: 16 B each; optional.
        image_id: SNP: 16 B each; optional.
        id_key_digest: SNP: 48 B each; optional.
        author_key_digest: SNP: 48 B each; optional.
        products: SNP: ``"Milan"``, ``"Genoa"``, ``"Turin"``; none where ``any_platform`` is set.
        chip_ids: SNP: processors, 64 B each; optional.
        min_bootloader: SNP: least security version of this part of the TCB: as reported, at the guest's
            launch, and committed.
        min_tee: SNP: likewise.
        min_snp: SNP: likewise.
        min_microcode: SNP: likewise.
        min_fmc: SNP: likewise; Turin alone has it, and elsewhere it counts as 0.
        any_tcb: SNP: accept every TCB; otherwise at least one part has a minimum.
        allow_vlek: SNP: accept reports signed by a cloud provider's VLEK.
        allow_missing_crl: SNP: accept evidence without AMD's revocation list.
        pcr0: Nitro: the enclave image, 48 B each; at least one.
        pcr1: Nitro: kernel and bootstrap, 48 B each; at least one.
        pcr2: Nitro: application, 48 B each; at least one.
        pcr3: Nitro: role of the parent instance, 48 B each; optional.
        pcr4: Nitro: id of the parent instance, 48 B each; optional.
        pcr8: Nitro: signer of the image, 48 B each; optional.

    Raises:
        UsageError: code ``policy.<field>``, for a value that is missing, malformed or contradictory.
    """

    tee: str = ""
    any_of: tuple[AppraisalPolicy, ...] = ()
    all_of: tuple[AppraisalPolicy, ...] = ()
    max_age: int = DEFAULT_MAX_AGE
    dangerous_simulated_roots: bytes | None = None
    allowed_tcb: frozenset[str] = frozenset()
    denied_advisories: frozenset[str] = frozenset()
    min_tcb_evaluation: int = 0
    platforms: frozenset[bytes] = frozenset()
    any_platform: bool = False
    mr_enclave: frozenset[bytes] = frozenset()
    attributes: bytes = b""
    attributes_mask: bytes = b""
    mr_signer: frozenset[bytes] = frozenset()
    isv_prod_id: int = 0
    min_isv_svn: int = 0
    mr_td: frozenset[bytes] = frozenset()
    rtmr0: frozenset[bytes] = frozenset()
    rtmr1: frozenset[bytes] = frozenset()
    rtmr2: frozenset[bytes] = frozenset()
    rtmr3: frozenset[bytes] = frozenset()
    mr_config_id: frozenset[bytes] = frozenset()
    mr_owner: frozenset[bytes] = frozenset()
    mr_owner_config: frozenset[bytes] = frozenset()
    mr_seam: frozenset[bytes] = frozenset()
    mr_service_td: frozenset[bytes] = frozenset()
    td_attributes: bytes = b""
    td_attributes_mask: bytes = b""
    xfam: bytes = bytes(8)
    xfam_mask: bytes = bytes(8)
    min_tee_tcb_svn: bytes = bytes(16)
    measurement: frozenset[bytes] = frozenset()
    guest_policy: int = 0
    guest_policy_mask: int = 0
    platform_info: int = 0
    platform_info_mask: int = 0
    max_vmpl: int = 0
    min_guest_svn: int = 0
    host_data: frozenset[bytes] = frozenset()
    family_id: frozenset[bytes] = frozenset()
    image_id: frozenset[bytes] = frozenset()
    id_key_digest: frozenset[bytes] = frozenset()
    author_key_digest: frozenset[bytes] = frozenset()
    products: frozenset[str] = frozenset()
    chip_ids: frozenset[bytes] = frozenset()
    min_bootloader: int = 0
    min_tee: int = 0
    min_snp: int = 0
    min_microcode: int = 0
    min_fmc: int = 0
    any_tcb: bool = False
    allow_vlek: bool = False
    allow_missing_crl: bool = False
    pcr0: frozenset[bytes] = frozenset()
    pcr1: frozenset[bytes] = frozenset()
    pcr2: frozenset[bytes] = frozenset()
    pcr3: frozenset[bytes] = frozenset()
    pcr4: frozenset[bytes] = frozenset()
    pcr8: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        if not self.is_empty:
            _check(self)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was stated at all."""
        return all(getattr(self, field.name) == field.default for field in fields(self))

    @property
    def members(self) -> tuple[AppraisalPolicy, ...]:
        """The policies that this one joins; none where it speaks of one TEE itself."""
        return self.any_of or self.all_of

    @property
    def anchors(self) -> TrustAnchors:
        """What evidence must be verified under: the vendors' roots or one simulated platform's."""
        if self.members:
            return self.members[0].anchors
        if self.dangerous_simulated_roots is None:
            return TrustAnchors.vendor()
        return TrustAnchors.simulated(self.dangerous_simulated_roots)

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 B) of the deterministic encoding of `to_data`: the policy's name."""
        return _digest(self)

    def admits(self, narrower: AppraisalPolicy) -> None:
        """Check, claim by claim, that this policy admits everything that ``narrower`` admits.

        Raises:
            AppraisalRefused: code ``appraisal.not-subset``, naming the claim.
        """
        require_subset(self, narrower)

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`: every field of its TEE, sets as sorted lists.

        Raises:
            UsageError: the policy is empty.
        """
        if self.is_empty:
            raise _empty()
        for join in _JOINS:
            if joined := getattr(self, join):
                return {"kind": _KIND, join: [member.to_data() for member in joined]}
        data: dict[str, Any] = {"kind": _KIND, "tee": self.tee}
        return data | {name: FORMS[name].plain(getattr(self, name)) for name in _fields_of(self.tee)}

    @classmethod
    def from_data(cls, data: Any) -> AppraisalPolicy:
        """Read exactly what `to_data` gave, so that one policy has one encoding.

        Raises:
            UsageError: any other data.
        """
        return cls._from_data(data, MAX_DEPTH)

    @classmethod
    def _from_data(cls, data: Any, depth: int) -> AppraisalPolicy:
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise _no_policy()
        for join in _JOINS:
            if data.keys() == {"kind", join}:
                members = _joined(data[join], join, depth)
                joined: dict[str, Any] = {join: tuple(cls._from_data(each, depth - 1) for each in members)}
                return cls(**joined)
        tee: Any = data.get("tee")
        names = _fields_of(tee) if type(tee) is str else ()
        if not names or data.keys() != {"kind", "tee", *names}:
            raise _no_policy()
        values = {name: FORMS[name].read(name, data[name]) for name in names}
        for name, value in values.items():
            plain = FORMS[name].plain(value)
            if type(plain) is not type(data[name]) or plain != data[name]:
                raise invalid(name, "its one encoding", "another")
        return cls(tee=tee, **values)

    @classmethod
    def from_toml(cls, text: str) -> AppraisalPolicy:
        """Read a policy file: bytes in hex, simulated roots in PEM.

        Raises:
            UsageError: not TOML, an unknown key, a wrong type, a missing or contradictory value, or empty;
                its claim is the key, after the joined policy that has it: ``any_of[2].mr_td``, the second's.
        """
        return cls.from_table(load_toml(text, "policy"))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], section: str = "") -> AppraisalPolicy:
        """Read a policy that is a table of a larger TOML file; as `from_toml`.

        Args:
            table: The table.
            section: Its name, with which the claim of an error begins: ``[worker].any_of[2].mr_td``.

        Raises:
            UsageError: an unknown key, a wrong type, a missing or contradictory value, or empty.
        """
        with _located(f"[{section}]" if section else ""):
            return cls._from_table(table, MAX_DEPTH)

    @classmethod
    def _from_table(cls, table: Mapping[str, Any], depth: int) -> AppraisalPolicy:
        if not table:
            raise _empty()
        tee = table.get("tee")
        known = sorted(("tee", *_JOINS, *((_fields_of(tee) if type(tee) is str else ()) or FORMS)))
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name not in known:
                raise UsageError(
                    "unknown key in the policy",
                    code="policy.unknown-key",
                    claim=name[:64],
                    expected=", ".join(known),
                    actual=name[:64],
                )
            if name in _JOINS:
                values[name] = tuple(cls._members(name, _joined(value, name, depth), depth - 1))
            else:
                values[name] = value if name == "tee" else FORMS[name].read(name, value)
        policy = cls(**values)
        if policy.is_empty:
            raise _empty()
        return policy

    @classmethod
    def _members(cls, join: str, tables: list[Any], depth: int) -> Iterator[AppraisalPolicy]:
        for number, table in enumerate(tables, start=1):
            with _located(f"{join}[{number}]"):
                member = cls._from_table(table if isinstance(table, dict) else {}, depth)
            yield member

    def to_toml(self, section: str = "") -> str:
        """The form that `from_toml` reads, with every field of its TEE that has a value.

        Args:
            section: Name of the table that it is, in a larger file; its header is then the first line.

        Raises:
            UsageError: the policy is empty.
        """
        if self.is_empty:
            raise _empty()
        head = f"[{section}]\n" if section else ""
        return head + "\n".join(self._lines(section)) + "\n"

    def _lines(self, section: str) -> Iterator[str]:
        for join in _JOINS:
            name = f"{section}.{join}" if section else join
            for member in getattr(self, join):
                yield f"[[{name}]]"
                yield from member._lines(name)
        if self.tee:
            yield f'tee = "{self.tee}"'
            for name in _fields_of(self.tee):
                value = getattr(self, name)
                if value is not None:
                    yield f"{name} = {FORMS[name].text(value)}"


def load_toml(text: str, what: str) -> dict[str, Any]:
    """Parse a policy file in bounded time: dotted keys cost the parser the square of their length.

    Raises:
        UsageError: code ``policy.format``; too long, too many dots in a line, or not TOML.
    """
    if len(text) > MAX_POLICY:
        raise UsageError(
            f"the {what} is too long", code="policy.format", expected=MAX_POLICY, actual=len(text)
        )
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise UsageError(f"a line of the {what} has too many dots", code="policy.format", expected=MAX_DOTS)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the {what} is not TOML: {error}"[:200], code="policy.format") from error


def AnyOf(*policies: AppraisalPolicy) -> AppraisalPolicy:  # noqa: N802  # reads as the type that it makes
    """A policy that accepts what one of these accepts."""
    return AppraisalPolicy(any_of=policies)


def AllOf(*policies: AppraisalPolicy) -> AppraisalPolicy:  # noqa: N802  # reads as the type that it makes
    """A policy that accepts what all of these accept."""
    return AppraisalPolicy(all_of=policies)


@lru_cache(maxsize=64)
def _digest(policy: AppraisalPolicy) -> bytes:
    return encoding.digest(policy.to_data())


@lru_cache(maxsize=8)
def _fields_of(tee: str) -> tuple[str, ...]:
    """The fields that a policy for this TEE has, besides ``tee``; none for an unknown TEE."""
    claimed = [name for claim in CLAIMS.get(tee, ()) for name in claim.fields]
    return (*claimed, *_COMMON) if claimed else ()


def _check(policy: AppraisalPolicy) -> None:
    stated = [field.name for field in fields(policy) if getattr(policy, field.name) != field.default]
    if policy.members:
        _check_joined(policy, stated)
        return
    if type(policy.tee) is not str or policy.tee not in CLAIMS:
        raise invalid("tee", ", ".join(CLAIMS), repr(policy.tee)[:40])
    names = _fields_of(policy.tee)
    for name in stated:
        if name != "tee" and name not in names:
            raise invalid(name, f"no such field in a policy for {policy.tee}", "stated")
    for name in names:
        FORMS[name].check(name, getattr(policy, name))
    for claim in CLAIMS[policy.tee]:
        claim.check(policy)


def _check_joined(policy: AppraisalPolicy, stated: list[str]) -> None:
    if len(stated) != 1:
        raise invalid(stated[0], "nothing else beside any_of or all_of", ", ".join(stated[1:]))
    name, members = stated[0], policy.members
    if (
        type(members) is not tuple
        or not 2 <= len(members) <= MAX_MEMBERS
        or any(type(member) is not AppraisalPolicy or member.is_empty for member in members)
    ):
        raise invalid(name, f"2 to {MAX_MEMBERS} policies, none empty", len(members))
    if _depth(policy) > MAX_DEPTH:
        raise invalid(name, f"policies, {MAX_DEPTH} deep at most", _depth(policy))
    if any(member.anchors != policy.anchors for member in members):
        raise invalid(name, "policies under the same trust anchors", "others")


def _depth(policy: AppraisalPolicy) -> int:
    return 1 + max(map(_depth, policy.members)) if policy.members else 0


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Begin the claim of an error with the place in the file: ``any_of[2]`` and ``mr_td`` give both."""
    try:
        yield
    except UsageError as error:
        error.claim = ".".join(part for part in (place, error.claim) if part)
        raise


def _joined(value: Any, name: str, depth: int) -> list[Any]:
    if type(value) is not list or not 2 <= len(value) <= MAX_MEMBERS or depth == 0:
        raise invalid(name, f"2 to {MAX_MEMBERS} policies, {MAX_DEPTH} deep at most", type(value).__name__)
    return value


def _no_policy() -> UsageError:
    return UsageError("this is no appraisal policy", code="policy.format", expected=_KIND)


def _empty() -> UsageError:
    return UsageError("the appraisal policy is empty: it would refuse everything", code="policy.empty")
