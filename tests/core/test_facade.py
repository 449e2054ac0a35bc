"""The public names, and what loading them does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import cloister

NAMES = [
    "AppraisalPolicy",
    "AsyncClient",
    "AsyncCloisterTransport",
    "Client",
    "CloisterError",
    "CloisterTransport",
    "Collateral",
    "Consent",
    "Evidence",
    "Identity",
    "Record",
    "TrustAnchors",
    "UserPolicy",
    "VerifiedEvidence",
    "appraise",
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
    assert "cloister.core.verifier.dcap" in modules
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
