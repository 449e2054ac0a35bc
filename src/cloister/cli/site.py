"""Layout of a data directory: one folder in which a whole service on one host lives."""

from __future__ import annotations

import json
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.cli.output import read_text, write_text
from cloister.core.evidence.pem import to_pem
from cloister.core.protocol.pool import Pool, require_name
from cloister.core.protocol.trust import hex_digest, subtable
from cloister.core.verifier.anchors import split_certificates
from cloister.core.verifier.appraisal import SGX_ATTRIBUTES_MASK, AppraisalPolicy
from cloister.errors import UsageError
from cloister.party import files
from cloister.sim.measurement import Measurement
from cloister.sim.quote import ATTRIBUTES, TD_ATTRIBUTES
from cloister.sim.snp import GUEST_POLICY
from cloister.sim.tees import registers

ALLOWED_TCB: Final = frozenset({"UpToDate"})

# What a reference policy says besides the registers, for TEEs that the simulated platform plays.
_REFERENCE: Final[dict[str, dict[str, Any]]] = {
    "tdx": {
        "mr_config_id": frozenset({bytes(48)}),
        "td_attributes": TD_ATTRIBUTES,
        "td_attributes_mask": b"\xff" * 8,
        "allowed_tcb": ALLOWED_TCB,
        "any_platform": True,
    },
    "snp": {
        "guest_policy": GUEST_POLICY,
        "guest_policy_mask": (1 << 64) - 1,
        "any_tcb": True,
        "any_platform": True,
        "max_age": 366 * 86400,  # AMD dates its revocation lists for about a year
    },
    "nitro": {},
}


@dataclass(frozen=True, slots=True)
class Site:
    """Paths in a data directory."""

    root: Path

    @property
    def authority(self) -> Path:
        """The simulated platform's private root."""
        return self.root / "sim"

    @property
    def blobs(self) -> Path:
        """Sealed models."""
        return self.root / "store" / "blobs"

    @property
    def records(self) -> Path:
        """Sealed records of the key service."""
        return self.root / "store" / "records.sqlite"

    @property
    def admin(self) -> Path:
        """The gateway's Unix socket for launchers."""
        return self.root / "run" / "gateway.sock"

    @property
    def enclaves(self) -> Path:
        """The gateway's Unix socket for what enclaves send to each other."""
        return self.root / "run" / "enclaves.sock"

    @property
    def user_policy(self) -> Path:
        """A user policy that fits this service."""
        return self.root / "user-policy.toml"

    @property
    def model_policy(self) -> Path:
        """A model policy that fits this service."""
        return self.root / "model-policy.toml"

    @property
    def facts(self) -> Path:
        """What scripts want to know: URL, service id, pool id, process ids."""
        return self.root / "service.json"

    @property
    def roots_file(self) -> Path:
        """The simulated platform's roots (PEM), which policies for this service name."""
        return self.root / "roots.pem"

    def run_dir(self, name: str) -> Path:
        """Run folder of one enclave."""
        return self.root / "run" / name

    def lock_file(self, name: str) -> Path:
        """Held by the process of a role while it runs."""
        return self.root / "run" / f"{name}.lock"

    def pool_file(self, name: str) -> Path:
        """Definition of one pool."""
        return self.root / "pools" / f"{name}.toml"

    def make(self) -> None:
        """Make the folders (mode 0700); raises UsageError."""
        try:
            for folder in (self.root, self.admin.parent, self.records.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                "the data directory can't be made",
                code="site.directory",
                claim=str(self.root),
                actual=error.strerror,
            ) from error

    def read_facts(self) -> dict[str, Any]:
        """What `write_facts` wrote last; empty where nothing was."""
        if not self.facts.exists():
            return {}
        try:
            facts = json.loads(read_text(self.facts, "service facts"))
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise UsageError("the service facts are damaged", code="site.facts", claim=str(self.facts))
        return facts

    def write_facts(self, **facts: Any) -> None:
        """Add to what scripts want to know; several processes may do so."""
        with files.locked(self.root):
            write_text(self.facts, json.dumps({**self.read_facts(), **facts}, indent=1) + "\n")

    def service(self) -> bytes:
        """The service id; raises UsageError before the key service has started once."""
        return hex_digest(self._fact("service", "key service"), "service")

    def url(self) -> str:
        """The gateway's URL; raises UsageError before a gateway has started once."""
        return str(self._fact("url", "gateway"))

    def _fact(self, name: str, role: str) -> Any:
        facts = self.read_facts()
        if name not in facts:
            raise UsageError(
                f"no {role} has started here yet",
                code="site.service",
                claim="data directory",
                expected="one where a service runs",
                actual=self.root,
                hint="Check --data; `cloister gateway` comes first, then `cloister keyservice`",
            )
        return facts[name]

    def roots(self) -> bytes:
        """The simulated platform's roots (DER), made where they aren't there yet; raises UsageError."""
        from cloister.sim.authority import SimulatedAuthority

        roots = SimulatedAuthority.open_or_create(self.authority, now=int(time.time())).roots_der
        text = "".join(map(to_pem, split_certificates(roots)))
        if not self.roots_file.exists() or read_text(self.roots_file, "roots") != text:
            write_text(self.roots_file, text)
        return roots

    def write_pool(self, pool: Pool) -> None:
        """Keep a pool's definition, for the workers that join it."""
        text = f'name = "{pool.name}"\nshared = {str(pool.shared).lower()}\n\n' + pool.policy.to_toml(
            "policy"
        )
        write_text(self.pool_file(pool.name), text)

    def read_pool(self, name: str) -> Pool:
        """A pool's definition; raises UsageError."""
        require_name(name, "pool name")
        try:
            text = read_text(self.pool_file(name), "pool definition")
        except UsageError as error:
            error.hint = f"Make it with: cloister pool create {name}"
            raise
        try:
            table = tomllib.loads(text)
        except ValueError as error:
            raise UsageError(f"the pool definition is not TOML: {error}"[:200], code="pool.format") from error
        if table.keys() != {"name", "shared", "policy"} or type(table["shared"]) is not bool:
            raise UsageError(
                code="pool.format", claim="pool", expected="name, shared, policy", actual=sorted(table)
            )
        return Pool(
            name=str(table["name"]),
            shared=table["shared"],
            policy=AppraisalPolicy.from_table(subtable(table, "policy"), "policy"),
        )


def reference_policy(measurement: Measurement, root: bytes | None, tee: str = "sgx") -> AppraisalPolicy:
    """The appraisal policy that admits exactly one image, under the simulated roots or the vendors'."""
    if tee != "sgx":
        found: dict[str, Any] = {
            name: frozenset({value}) for name, value in registers(measurement, tee).items()
        }
        return AppraisalPolicy(tee=tee, dangerous_simulated_roots=root, **found, **_REFERENCE[tee])
    return AppraisalPolicy(
        tee="sgx",
        mr_enclave=frozenset({measurement.mr_enclave}),
        attributes=bytes(a & b for a, b in zip(ATTRIBUTES, SGX_ATTRIBUTES_MASK, strict=True)),
        attributes_mask=SGX_ATTRIBUTES_MASK,
        isv_prod_id=measurement.isv_prod_id,
        min_isv_svn=measurement.isv_svn,
        allowed_tcb=ALLOWED_TCB,
        any_platform=True,
        dangerous_simulated_roots=root,
    )
