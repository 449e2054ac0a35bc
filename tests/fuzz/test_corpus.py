"""Fuzzing's targets without its engine: what was kept is checked again, and a short run of each target."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fuzz.targets import TARGETS, Broken, Target, check, exact  # noqa: E402

from cloister.errors import CloisterError, FormatError  # noqa: E402
from fuzz import seeds  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus"
CORE = ROOT / "src" / "cloister" / "core"
KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())
READERS = ("from_", "load_", "decode", "read_", "split_")
# Reached through a target for a larger thing, or given what was read before.
WITHIN = {
    "evidence.snp.SnpTcb.from_bytes": "verify",
    "verifier.policy.AppraisalPolicy.from_data": "message-appraisal-policy",
    "protocol.document.keys_from_data": "message-service-document",
    "protocol.head.hashes_from_data": "message-challenge",
    "verifier.collateral.load_chains": "verify",
    "verifier.snp.read_extensions": "verify",
    "encoding.decode": "encoding",
    "ohttp.kem.PrivateKey.from_bytes": "",  # our own keys
    "ohttp.hpke.open_from": "encapsulated-request",
}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: "/".join(path.parts[-2:])[:60])
def test_kept_input(path):
    check(TARGETS[path.parent.name], path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name):
    target = TARGETS[name]
    for seed in target.seeds():
        assert len(seed) <= target.most
        target.parse(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_real_evidence(name):
    for data in seeds.vectors(name):
        check(TARGETS[name], data)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.integers(0, 7),
    edits=st.lists(
        st.tuples(st.integers(0, 1 << 16), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4
    ),
    end=st.none() | st.integers(0, 1 << 16),
    raw=st.none() | st.binary(max_size=200),
)
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_value_or_our_error(name, which, edits, end, raw):
    """A valid input with some places changed and maybe cut, or anything."""
    target = TARGETS[name]
    found = target.seeds()
    data = raw if raw is not None else found[which % len(found)]
    for place, gone, new in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + gone :]
    check(target, data if end is None else data[: end % (len(data) + 1)])


def readers() -> set[str]:
    """Every function of `cloister.core` whose name says that it reads something, as ``module.name``."""
    found = set()
    for path in [*CORE.glob("*/*.py"), CORE / "encoding.py", CORE / "oip.py"]:
        module = ".".join(path.relative_to(CORE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{module}.{node.name}." if isinstance(node, ast.ClassDef) else f"{module}."
            for function in inner:
                if isinstance(function, ast.FunctionDef) and function.name.startswith(READERS):
                    found.add(prefix + function.name)
    return found


def test_every_reader_has_a_target():
    covered = {name for target in TARGETS.values() for name in target.covers}
    for message in seeds.messages().values():
        kind = type(message.value)
        module = kind.__module__.removeprefix("cloister.core.")
        covered |= {f"{module}.{kind.__name__}.from_bytes", f"{module}.{kind.__name__}.from_data"}
    assert sorted(readers() - covered - WITHIN.keys()) == [], "add a target to fuzz/targets.py"
    assert {name for name in WITHIN.values() if name} <= TARGETS.keys()


def test_folders_are_targets():
    assert {path.parent.name for path in KEPT} <= TARGETS.keys()


# -- the check itself ----------------------------------------------------------


def make(parse) -> Target:
    return Target(name="made", parse=parse, seeds=list, seconds=0.05)


def test_check_accepts_a_value_and_our_error():
    def refuse(data):
        raise FormatError("no")

    check(make(len), b"")
    check(make(refuse), b"")


def test_check_finds_foreign_errors():
    with pytest.raises(ValueError):
        check(make(lambda data: int(data)), b"x")


def test_check_finds_what_takes_too_long():
    with pytest.raises(Broken, match="took"):
        check(make(lambda data: sum(range(10_000_000))), b"")


def test_check_finds_what_is_not_written_as_read():
    with pytest.raises(Broken, match="another"):
        exact(bytes.strip, bytes, b" a")
    assert not issubclass(Broken, CloisterError)
