"""The public names, and what loading them does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import cloister

NAMES = [
    "AccessRefused",
    "AllOf",
    "AmdCollateral",
    "AnyOf",
    "AppraisalPolicy",
    "AsyncClient",
    "AsyncCloisterTransport",
    "AsyncOpenAITransport",
    "Client",
    "CloisterError",
    "CloisterTransport",
    "Collateral",
    "Consent",
    "DeadlineExceeded",
    "Evidence",
    "Identity",
    "InvalidRequest",
    "NotFound",
    "OpenAITransport",
    "Overloaded",
    "Record",
    "Refused",
    "TextEmbedder",
    "TransportError",
    "TrustAnchors",
    "Unavailable",
    "UserPolicy",
    "VerifiedEvidence",
    "appraise",
    "async_httpx_transport",
    "httpx_transport",
    "verify_evidence",
]


def loaded(statement: str) -> set[str]:
    """Top-level packages and our own modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_exported_names():
    assert cloister.__all__ == NAMES
    assert cloister.__version__ == "0.1.0"
    for name in NAMES:
        assert getattr(cloister, name) is not None
        assert name in dir(cloister)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = cloister.nonesuch


def test_a_verifier_loads_neither_numpy_nor_a_runtime_nor_an_http_client():
    modules = loaded("import cloister; cloister.verify_evidence; cloister.AppraisalPolicy; cloister.Evidence")
    assert "cloister.core.verifier" in modules
    for heavy in ("numpy", "onnxruntime", "onnx", "httpx", "starlette", "uvloop", "rich", "typer", "asyncio"):
        assert heavy not in modules, heavy
    assert not {
        name for name in modules if name.startswith(("cloister.client", "cloister.sim", "cloister.cli"))
    }


def test_a_policy_needs_no_client():
    modules = loaded("import cloister; cloister.UserPolicy; cloister.Consent")
    assert not modules & {"numpy", "httpx", "onnxruntime"}


def test_a_client_loads_no_runtime_and_no_host():
    modules = loaded("import cloister; cloister.Client")
    assert not modules & {"onnxruntime", "onnx", "starlette", "typer"}
    ours = {name for name in modules if name.startswith("cloister.")}
    assert not {name for name in ours if name.split(".")[1] in ("enclave", "host", "sim", "cli", "owner")}


@pytest.mark.parametrize("entry", ["cloister.enclave.worker.main", "cloister.enclave.keyservice.main"])
def test_an_enclave_loads_core_net_and_enclave_alone(entry):
    ours = {name for name in loaded(f"import {entry}") if name.startswith("cloister.")}
    assert {name.split(".")[1] for name in ours} == {"core", "net", "enclave", "errors"}


def test_the_key_service_loads_no_numpy():
    modules = loaded("import cloister.enclave.keyservice.main")
    assert not modules & {"numpy", "onnxruntime", "httpx"}


ONLY_CORE = """
import sys, time

class Absent:
    allowed = {"cloister", "cryptography", "cffi", "_cffi_backend", "cbor2", "_cbor2"}

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.allowed | sys.stdlib_module_names and not top.startswith("__editable__"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
start = time.process_time()
from cloister import verify_evidence
took = time.process_time() - start
from cloister import AppraisalPolicy, Collateral, Evidence, TrustAnchors, appraise
from cloister.core.verifier import dcap, nitro, snp
assert TrustAnchors.vendor().roots.keys() == {"dcap", "snp", "nitro"}
print(took * 1e3)
"""


def test_a_relying_party_needs_the_core_install_alone_and_does_not_wait_for_it():
    """Two dependencies, no network, and at most 150 ms of processor time at the import."""
    took = [
        float(subprocess.run([sys.executable, "-c", ONLY_CORE], check=True, capture_output=True).stdout)
        for _ in range(5)
    ]
    assert min(took) < 150
