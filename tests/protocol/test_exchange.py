"""The smaller messages: proofs of possession, statement queries, and errors as they travel."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import errors
from cloister.core.identity import SigningKey
from cloister.core.merkle import MerkleTree
from cloister.core.protocol import problem
from cloister.core.protocol.exchange import HeadRequest, Possession, StatementQuery
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import MAX_REQUEST_LIFETIME
from cloister.errors import AccessRefused, BindingRefused, CloisterError, FormatError, Rollback, Tampered
from support.realm import NOW, owner_key

# -- possession ----------------------------------------------------------------


def verify(realm, possession: Possession, request: HeadRequest) -> None:
    possession.verify(request, service=realm.id, service_key=realm.service.log.identity.public)


@pytest.fixture
def possession(messages) -> Possession:
    return messages["possession"].value


@pytest.fixture
def asked(messages) -> HeadRequest:
    return HeadRequest(nonce=b"o" * 32, head=messages["head request"].value.head)


def test_possession_holds(realm, possession, asked):
    verify(realm, possession, asked)


def test_a_proof_for_another_nonce(realm, possession, asked):
    for nonce in (b"n" * 32, b"p" * 32, b"q" * 32):
        with pytest.raises(Tampered) as caught:
            verify(realm, possession, dataclasses.replace(asked, nonce=nonce))
        assert caught.value.code == "tampered.inclusion"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"document": bytes(32)}, "tampered.signature"),
        ({"root": bytes(32)}, "tampered.inclusion"),
        ({"size": 4}, "tampered.signature"),
        ({"index": 0}, "tampered.inclusion"),
        ({"index": 2}, "tampered.inclusion"),
        ({"path": ()}, "tampered.inclusion"),
        ({"path": (bytes(32), bytes(32))}, "tampered.inclusion"),
        ({"signature": bytes(64)}, "tampered.signature"),
    ],
)
def test_altered_possession(realm, possession, asked, change, code):
    with pytest.raises(Tampered) as caught:
        verify(realm, dataclasses.replace(possession, **change), asked)
    assert caught.value.code == code


def test_a_proof_by_another_key(realm, possession, asked):
    """The nonce is in the tree, but not the service signed its root."""
    tree = MerkleTree([asked.nonce])
    forged = dataclasses.replace(
        possession,
        root=tree.root(),
        size=1,
        index=0,
        path=(),
        signature=Possession.sign(SigningKey.generate(), possession.document, tree),
    )
    with pytest.raises(Tampered):
        verify(realm, forged, asked)


def test_a_head_that_is_not_the_services_or_not_an_extension(realm, possession, asked):
    identity = realm.service.log.identity
    other = TreeHead.sign(SigningKey.generate(), size=9, root=bytes(32), time=NOW)
    with pytest.raises(BindingRefused):
        verify(realm, dataclasses.replace(possession, head=other), asked)
    older = TreeHead.sign(identity, size=1, root=realm.service.log.tree.root(1), time=NOW)
    with pytest.raises(Rollback) as caught:
        verify(realm, dataclasses.replace(possession, head=older), asked)
    assert caught.value.code == "rollback.head"
    with pytest.raises(Rollback) as caught:
        verify(realm, dataclasses.replace(possession, consistency=()), asked)
    assert caught.value.code == "rollback.fork"
    fork = TreeHead.sign(identity, size=9, root=bytes(32), time=NOW)
    with pytest.raises(Rollback) as caught:
        verify(realm, dataclasses.replace(possession, head=fork), asked)
    assert caught.value.code == "rollback.fork"


# -- statement queries ---------------------------------------------------------


def test_only_the_owner_may_ask(messages, realm):
    query = messages["statement query"].value
    query.verify(service=realm.id, now=NOW)
    stranger = StatementQuery.sign(owner_key("stranger"), service=realm.id, model=query.model, time=NOW)
    with pytest.raises(AccessRefused) as caught:
        stranger.verify(service=realm.id, now=NOW)
    assert caught.value.code == "access.owner"
    for change in ({"time": NOW + 1}, {"signature": bytes(64)}, {"model": query.model + "x"}):
        with pytest.raises(Tampered):
            dataclasses.replace(query, **change).verify(service=realm.id, now=NOW)
    with pytest.raises(Tampered):
        query.verify(service=bytes(32), now=NOW)


@pytest.mark.parametrize("late", [MAX_REQUEST_LIFETIME + 1, -MAX_REQUEST_LIFETIME - 1, 1 << 50])
def test_a_recorded_query_does_not_last(messages, realm, late):
    with pytest.raises(AccessRefused) as caught:
        messages["statement query"].value.verify(service=realm.id, now=NOW + late)
    assert caught.value.code == "access.query"


def test_a_query_for_no_model(messages, realm):
    query = dataclasses.replace(messages["statement query"].value, model="digits")
    with pytest.raises(FormatError):
        query.verify(service=realm.id, now=NOW)


# -- errors on the wire --------------------------------------------------------

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, CloisterError) and kind is not CloisterError
]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel(kind):
    sent = kind("what", code="a.b", claim="c", expected=1, actual=b"x", hint="h")
    back = problem.from_bytes(problem.to_bytes(sent))
    assert type(back) is kind
    assert back.to_dict() == sent.to_dict()
    assert 400 <= problem.status_of(sent) <= 504


def test_an_error_of_a_kind_below_ours_travels_as_its_parent():
    class Own(errors.Tampered):
        pass

    assert type(problem.from_bytes(problem.to_bytes(Own("x")))) is errors.Tampered


def test_an_error_is_one_of_the_open_inference_protocol_too():
    """Its clients show what stands in `error`."""
    sent = errors.InvalidRequest(
        "other inputs", code="request.inputs", claim="inputs", expected="x", actual="y"
    )
    found = json.loads(problem.to_bytes(sent))
    assert found["error"] == "other inputs: expected x, found y"
    assert (found["code"], found["kind"], found["expected"]) == ("request.inputs", "InvalidRequest", "x")
    back = problem.from_bytes(b'{"error": "from another server"}')
    assert (back.message, back.code) == ("from another server", "error")


@pytest.mark.parametrize(
    "kind", ["", "Exception", "SystemExit", "__builtins__", "annotations", "ClassVar", "x"]
)
def test_a_peer_names_none_but_our_errors(kind):
    back = problem.from_bytes(json.dumps({"kind": kind, "code": "e"}).encode())
    assert type(back) is CloisterError
    assert back.code == "e"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b'{"kind": 1}',
        b'{"kind": "Tampered", "claim": null}',
        b"[" * 16000,
        b'{"a":' * 3000,
        b"1" * 6000,
        b"\xff",
        b'{"error": "' + b"x" * problem.MAX_PROBLEM + b'"}',
    ],
)
def test_an_unreadable_error_is_an_error(raw):
    back = problem.from_bytes(raw)
    assert type(back) is CloisterError
    assert back.code == "problem"


@given(st.binary(max_size=60) | st.dictionaries(st.text(), st.text()).map(lambda it: json.dumps(it).encode()))
def test_any_bytes_are_an_error(raw):
    assert isinstance(problem.from_bytes(memoryview(raw)), CloisterError)


def test_status_table():
    assert problem.status_of(errors.Replayed()) == 409
    assert problem.status_of(errors.AccessRefused()) == 403
    assert problem.status_of(errors.NotFound()) == 404
    assert problem.status_of(errors.FormatError()) == 400
    assert problem.status_of(errors.Overloaded()) == 429
    assert problem.status_of(errors.LeaseExpired()) == 503
    assert problem.status_of(CloisterError()) == 500
