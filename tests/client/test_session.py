"""A user's side of the protocol: which failures are tried again, and what a host can't make it do."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from cloister.client.identity import Identity
from cloister.client.session import (
    MAX_PREPARED,
    PREPARED_LIFETIME,
    RETRY_PAUSES,
    Session,
    model_of,
    model_path,
)
from cloister.core import oip
from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp
from cloister.core.ohttp.hpke import WIRE_SUITES
from cloister.core.protocol.document import SignedDocument
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.trust import Consent
from cloister.core.secret import Secret
from cloister.core.verifier.result import CollateralMark
from cloister.errors import (
    AccessRefused,
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Rollback,
    Tampered,
    TransportError,
    UsageError,
)
from cloister.net.messages import Answer
from cloister.party.memory import Memory
from support.realm import NOW, STRANGER, WORKER, Realm, owner_key, policy
from support.stage import IMAGE, USER, Stage

pytestmark = pytest.mark.asyncio
STALE = Answer(status=400, body=b'{"type": "https://iana.org/assignments/http-problem-types#ohttp-key"}')


class User:
    """A session on a stage."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        self.stage = stage
        policy = options.pop("policy", None) or stage.user_policy()
        self.session = Session(
            **{"policy": policy, "identity": USER, "now": stage.realm.clock.now, **options}
        )

    async def infer(self, model: str | None = None, content: bytes | None = None) -> bhttp.Response:
        model = model or self.stage.model
        header, buffers = oip.encode_request({"image": IMAGE})
        fields: tuple[tuple[bytes, bytes], ...] = ()
        if content is None:
            content = b"".join((header, *buffers))
            fields = ((oip.HEADER_LENGTH, b"%d" % len(header)),)
        path = model_path(self.session.aliases.get(model, model), "infer")
        inner = bhttp.Request(method=b"POST", path=path, fields=fields, content=content)
        return await self.stage.run(self.session.request(model, inner))


async def opened(**options: Any) -> tuple[Stage, User]:
    stage = await Stage.open()
    return stage, User(stage, **options)


def posts(stage: Stage) -> list[bytes]:
    """Encapsulated requests to the pool, in order."""
    pool = stage.pool.id.hex().encode()
    return [bytes(o.body) for o in stage.outgoing if dict(o.fields).get(b"cloister-pool") == pool]


def only_pool(stage: Stage, *answers: Answer | BaseException) -> None:
    """The host answers requests to the pool itself, as many as there are answers."""
    left = list(answers)
    pool = stage.pool.id.hex().encode()

    def before(outgoing: Any) -> Answer | None:
        if dict(outgoing.fields).get(b"cloister-pool") != pool or not left:
            return None
        answer = left.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    stage.before = before


async def refused(kind: type[CloisterError], code: str, work: Coroutine[Any, Any, Any]) -> CloisterError:
    with pytest.raises(kind) as caught:
        await work
    assert caught.value.code == code, str(caught.value)
    return caught.value


# -- what holds ----------------------------------------------------------------


async def test_an_answer_and_one_verification_for_many():
    stage, user = await opened()
    for _ in range(3):
        response = await user.infer()
        out = oip.decode_response(memoryview(response.content), response.field(oip.HEADER_LENGTH))
        assert len(next(iter(out.values()))) == 2
    assert user.session.conversation.verifications == 1
    assert len(posts(stage)) == 3
    stage.close()


def prepares(stage: Stage) -> list[bytes]:
    """Lets the session work while the worker answers; gives the encapsulated keys of its requests."""
    encs: list[bytes] = []

    def before(outgoing: Any) -> None:
        if outgoing.meanwhile is not None:
            encs.append(bytes(outgoing.body[7:1127]))
            outgoing.meanwhile()

    stage.before = before
    return encs


async def test_what_was_prepared_meanwhile_serves_one_request():
    stage, user = await opened()
    encs = prepares(stage)
    await user.infer()
    prepared = user.session._prepared[stage.model]
    await user.infer()
    await user.infer()
    assert encs[1] == prepared.sealer.enc
    assert len(set(encs)) == 3, "never the same twice"
    assert len(user.session._prepared) == 1
    stage.close()


async def test_what_was_prepared_is_dropped_with_its_document_and_with_time():
    stage, user = await opened()
    encs = prepares(stage)
    await user.infer()
    old = user.session._prepared[stage.model]
    stage.realm.clock.time += PREPARED_LIFETIME + 1
    await user.infer()
    assert old.sealer.enc not in encs
    old = user.session._prepared[stage.model]
    await stage.run(user.session.refresh())
    await user.infer()
    assert old.sealer.enc not in encs
    stage.close()


async def test_a_fork_uses_nothing_that_its_parent_prepared(monkeypatch):
    """Two requests under one key and nonce would show the host their difference."""
    stage, user = await opened()
    encs = prepares(stage)
    await user.infer()
    prepared = user.session._prepared[stage.model]
    monkeypatch.setattr("os.getpid", lambda: -1)
    await user.infer()
    assert prepared.sealer.enc not in encs
    stage.close()


async def test_only_so_many_wait_for_their_requests():
    stage, user = await opened()
    prepares(stage)
    await user.infer()
    waiting = user.session._prepared.pop(stage.model)
    user.session._prepared |= {f"other {number}": waiting for number in range(MAX_PREPARED)}
    await user.infer()
    assert len(user.session._prepared) == MAX_PREPARED
    stage.close()


async def test_the_outer_request_tells_the_pool_and_no_more():
    stage, user = await opened()
    await user.infer()
    (outgoing,) = (o for o in stage.outgoing if bytes(o.body) in posts(stage))
    assert {name for name, _ in outgoing.fields} == {b"content-type", b"cloister-pool"}
    everything = b"".join(bytes(o.body) + repr(o.fields).encode() for o in stage.outgoing)
    for secret in (stage.model.encode(), USER.user_id(stage.realm.owner.thumbprint), IMAGE.tobytes()[:64]):
        assert secret not in everything
    hinted = User(stage, pool_only=False)
    await hinted.infer()
    assert dict(stage.outgoing[-1].fields)[b"cloister-model"] == stage.model.encode()
    stage.close()


async def test_an_expired_document_is_fetched_anew():
    stage, user = await opened()
    await user.infer()
    stage.realm.clock.time += 601
    await stage.realm.service.tick()
    await stage.worker.refresh()
    stage.worker._tried = float("-inf")
    await stage.worker.refresh()
    await user.infer()
    assert user.session.conversation.verifications == 2
    stage.close()


# -- what is tried again -------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        TransportError("connection reset"),
        TransportError("refused", sent=False),
        Answer(status=500),
        Answer(status=502),
        Answer(status=503),
        Answer(status=404),
        Answer(status=429),
        STALE,
    ],
    ids=["reset", "unsent", "500", "502", "503", "404", "429", "stale"],
)
async def test_failures_outside_are_tried_again_with_a_new_encapsulation(failure):
    stage, user = await opened()
    only_pool(stage, failure, failure)
    await user.infer()
    sent = posts(stage)
    assert len(sent) == 3
    assert len({body[7:] for body in sent}) == 3
    assert {body[1:7] for body in sent} == {WIRE_SUITES[0].to_bytes()}  # never a weaker suite
    assert [pause for pause in stage.pauses if pause in RETRY_PAUSES] == list(RETRY_PAUSES[:2])
    assert user.session.conversation.verifications == (3 if failure is STALE else 1)
    stage.close()


@pytest.mark.parametrize("failure", [TransportError("reset"), Answer(status=429), STALE], ids=str)
async def test_but_not_for_ever(failure):
    stage, user = await opened()
    only_pool(stage, *[failure] * 20)
    with pytest.raises((TransportError, Overloaded)):
        await user.infer()
    assert len(posts(stage)) == 1 + len(RETRY_PAUSES)
    stage.close()


async def test_unavailability_inside_is_tried_again(monkeypatch):
    stage, user = await opened()
    left = 2

    class Full:
        async def __call__(self, request: Any) -> bhttp.Response:
            nonlocal left
            if left:
                left -= 1
                raise Overloaded("the worker's queue is full")
            return await stage.routes(request)

    assert stage.worker.server is not None
    monkeypatch.setattr(stage.worker.server, "_handler", Full())
    await user.infer()
    assert len(posts(stage)) == 3
    stage.close()


async def test_a_statement_newer_than_the_client_knows_is_fetched():
    stage, user = await opened()
    await user.infer()
    newer = stage.realm.next(stage.current, options=stage.current.options)
    await stage.realm.publish(newer, key=None)
    stage.worker._tried = float("-inf")
    await stage.worker.refresh()
    await user.infer()
    assert user.session.conversation.verifications == 2
    assert len(posts(stage)) == 3
    stage.close()


async def test_pool_keys_of_a_restarted_service_are_fetched():
    stage, user = await opened()
    await user.infer()
    documents = stage.realm.service.documents
    await documents.rotate()
    documents.epochs._live = documents.epochs._live[-1:]  # as after a restart: older keys are gone
    stage.membership.keys.clear()
    assert stage.worker.server is not None
    stage.worker.server.replace_keys([])
    await user.infer()
    assert user.session.conversation.verifications == 2
    stage.close()


# -- what is not ---------------------------------------------------------------


async def test_refusals_and_bad_input_are_final():
    stage, user = await opened()
    await refused(InvalidRequest, "request.header", user.infer(content=b"{"))
    assert len(posts(stage)) == 1
    stranger = User(stage, identity=Identity(Secret(b"v" * 32)))
    await refused(AccessRefused, "access.grant", stranger.infer())
    assert len(posts(stage)) == 2
    assert stage.pauses == []
    stage.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda body: body[:-1],
        lambda body: bytes(len(body)),
        lambda body: body + b"x",
    ],
)
async def test_altered_answers_are_final(change):
    stage, user = await opened()
    pool = stage.pool.id.hex().encode()
    stage.after = lambda outgoing, answer: (
        Answer(body=change(bytes(answer.body)))
        if dict(outgoing.fields).get(b"cloister-pool") == pool
        else answer
    )
    await refused(Tampered, "ohttp.open", user.infer())
    assert len(posts(stage)) == 1
    stage.close()


async def test_an_answer_to_another_request_is_final():
    stage, user = await opened()
    answers: list[Answer] = []
    stage.after = lambda outgoing, answer: answers.append(answer) or answer
    await user.infer()
    only_pool(stage, answers[-1])
    await refused(Tampered, "ohttp.open", user.infer())
    stage.close()


async def test_too_large_for_the_host_is_final():
    stage, user = await opened()
    only_pool(stage, Answer(status=413))
    await refused(FormatError, "request.size", user.infer())
    assert len(posts(stage)) == 1
    stage.close()


async def test_a_request_sent_twice_by_the_host_is_answered_once():
    stage, user = await opened()
    await user.infer()
    replayed = await stage.to_worker(posts(stage)[0])
    assert replayed.status == 200  # an error inside the encapsulation, for the user alone
    assert len(stage.routes._replays) == 1
    assert stage.membership._lease_requests == 1_000_000 - 1
    stage.close()


async def test_a_statement_that_stays_unknown_is_refused_in_the_end():
    """A worker that lags behind for longer than a client waits."""
    stage, user = await opened()
    await stage.realm.publish(stage.realm.next(stage.current), key=None)
    stage.realm.host.carry = None
    error = await refused(AccessRefused, "access.statement", user.infer())
    assert error.claim == "accepted statement"
    assert len(posts(stage)) == 1 + len(RETRY_PAUSES)
    stage.close()


async def test_a_pool_that_does_not_know_the_model_is_asked_twice():
    stage, user = await opened()
    stage.membership.models = {}
    stage.realm.host.carry = None
    await refused(NotFound, "not-found.model", user.infer())
    assert len(posts(stage)) == 2
    stage.close()


# -- before anything leaves ----------------------------------------------------


async def nothing_left(stage: Stage) -> None:
    assert posts(stage) == []
    stage.close()


async def test_without_an_identity():
    stage, user = await opened(identity=None)
    await refused(UsageError, "identity.none", user.infer())
    await nothing_left(stage)


async def test_a_model_that_no_pool_serves():
    stage, user = await opened()
    other = f"{owner_key('other').thumbprint.hex()}/digits"
    error = await refused(NotFound, "not-found.model", user.infer(other))
    assert error.hint == "`cloister verify URL` lists what is served"  # another owner's model may be bait
    error = await refused(NotFound, "not-found.model", user.infer(f"{stage.model}s"))
    assert error.hint == f"Did you mean {stage.model}?"
    await nothing_left(stage)


@pytest.mark.parametrize("name", ["", "digits", "x/y", "../digits"])
async def test_a_name_that_is_no_model_id(name):
    stage, user = await opened()
    with pytest.raises(UsageError) as caught:
        user.session.resolve(name)
    assert "<owner>/<name>" in caught.value.hint
    assert "--alias" in caught.value.hint
    await nothing_left(stage)


async def test_workers_that_the_user_does_not_accept():
    for worker, code in (
        (policy(STRANGER), "appraisal.not-subset"),
        (policy(WORKER, root=None), "appraisal.not-subset"),
        (policy(WORKER, max_age=60), "appraisal.not-subset"),
    ):
        stage = await Stage.open()
        user = User(stage, policy=stage.user_policy(worker=worker))
        await refused(AppraisalRefused, code, user.infer())
        await nothing_left(stage)


async def test_a_key_service_that_the_user_does_not_accept():
    stage = await Stage.open()
    user = User(stage, policy=stage.user_policy(key_service=policy(STRANGER)))
    await refused(AppraisalRefused, "appraisal.mr_enclave", user.infer())
    await nothing_left(stage)


async def test_a_pool_that_serves_another_owner_s_models():
    """The service itself would have to break its rule for this; the client looks all the same."""
    stage, user = await opened()
    signed = SignedDocument.from_bytes(stage.realm.service.documents.raw)
    document = stage.realm.document().document
    (entry,) = document.pools
    for owner in (b"m" * 32, None):
        wrong = dataclasses.replace(document, pools=(dataclasses.replace(entry, owner=owner),))
        documents = stage.realm.service.documents
        made = SignedDocument.sign(wrong, stage.realm.service.log.identity)
        documents.raw, documents.digest = made.to_bytes(), made.digest
        await refused(AccessRefused, "access.pool", User(stage).infer())
    assert signed.key
    assert user.session.policy.consent == Consent()
    await nothing_left(stage)


async def test_consents_travel_signed():
    stage = await Stage.open()
    seen: list[bhttp.Request] = []
    routes = stage.routes

    class Seeing:
        async def __call__(self, request: Any) -> bhttp.Response:
            seen.append(request.http)
            return await routes(request)

    from cloister.core.protocol.authorization import FIELD, RequestAuthorization

    assert stage.worker.server is not None
    stage.worker.server._handler = Seeing()
    for consent in (Consent(), Consent(allow_cross_user_batching=True), Consent(allow_outside_stages=True)):
        await User(stage, policy=stage.user_policy(consent=consent)).infer()
        field = seen[-1].field(FIELD)
        assert field is not None
        made = RequestAuthorization.from_field(field)
        assert made.allow_cross_user_batching == consent.allow_cross_user_batching
        assert made.allow_outside_stages == consent.allow_outside_stages
    stage.close()


# -- aliases, memory -----------------------------------------------------------


async def test_aliases_are_resolved_here_and_nowhere_else():
    stage = await Stage.open()
    user = User(stage, aliases={"d": stage.model})
    assert user.session.resolve("d") == stage.model
    assert user.session.resolve(stage.model) == stage.model
    await user.infer("d")
    assert b'"d"' not in b"".join(bytes(o.body) for o in stage.outgoing)
    stage.close()


async def test_the_newest_head_is_kept_between_runs(tmp_path):
    path = tmp_path / "deep" / "memory"
    stage, user = await opened(memory=path)
    await user.infer()
    kept, conversation = Memory.load(path), user.session.conversation
    assert kept == Memory(head=conversation.head, collateral=conversation.collateral.marks)
    assert kept.collateral
    again = User(stage, memory=path).session.conversation
    assert (again.head, again.collateral.marks) == (kept.head, kept.collateral)
    newer = TreeHead.sign(stage.realm.service.log.identity, size=99, root=bytes(32), time=NOW)
    dataclasses.replace(kept, head=newer).save(path)
    await refused(Rollback, "rollback.store", User(stage, memory=path).infer())
    assert [each.name for each in path.parent.iterdir()] == ["memory"]


async def test_collateral_older_than_in_an_earlier_run(tmp_path):
    path = tmp_path / "memory"
    stage, user = await opened(memory=path)
    await user.infer()
    kept = Memory.load(path)
    newer = {
        name: CollateralMark(issued=mark.issued, number=mark.number + 1)
        for name, mark in kept.collateral.items()
    }
    dataclasses.replace(kept, collateral=newer).save(path)
    await refused(EvidenceRefused, "evidence.collateral-older", User(stage, memory=path).infer())
    assert Memory.load(path).collateral == newer
    stage.close()


async def test_what_one_process_saw_another_does_not_forget(tmp_path):
    """A long-lived client that saw less must not cover up a rollback for the others."""
    path = tmp_path / "memory"
    stage, long_lived = await opened(memory=path)
    await stage.run(long_lived.session.refresh())
    older = copy.deepcopy(stage.realm.host.records)
    for _ in range(3):
        await stage.realm.publish(stage.realm.next(stage.current), key=None)
    await stage.run(User(stage, memory=path).session.refresh())
    newest = Memory.load(path).head.size
    stage.realm.host.records = older
    stage.realm = await Realm.start(stage.realm.host, stage.realm.clock)
    await refused(Rollback, "rollback.store", stage.run(long_lived.session.refresh()))
    assert Memory.load(path).head.size == newest
    assert stage.realm.service.halted
    stage.close()


async def test_two_runs_that_were_led_to_two_copies_of_a_service(tmp_path):
    key = SigningKey.generate()
    one, other = (TreeHead.sign(key, size=9, root=root * 32, time=1) for root in (b"a", b"b"))
    Memory(head=one).save(tmp_path / "memory")
    with pytest.raises(Rollback) as caught:
        Memory(head=other).save(tmp_path / "memory")
    assert caught.value.code == "rollback.fork"
    assert Memory.load(tmp_path / "memory").head == one


async def test_a_memory_that_is_damaged_or_another_s(tmp_path):
    stage = await Stage.open()
    path = tmp_path / "head"
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError):
        User(stage, memory=path)
    path.unlink()
    Memory(head=TreeHead.sign(SigningKey.generate(), size=1, root=bytes(32), time=1)).save(path)
    with pytest.raises(BindingRefused):
        User(stage, memory=path)
    path.unlink()
    forged = dataclasses.replace(stage.realm.service.log.head(), size=1)
    Memory(head=forged).save(path)
    with pytest.raises(Tampered):
        User(stage, memory=path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError):
        User(stage, memory=path)
    stage.close()


async def test_tasks_share_one_verification():
    stage, user = await opened()
    await asyncio.gather(*(user.infer() for _ in range(10)))
    assert user.session.conversation.verifications == 1
    assert len(posts(stage)) == 10
    stage.close()


async def test_tasks_share_a_failure_to_reach_the_service():
    stage, user = await opened()
    stage.before = lambda outgoing: Answer(status=503) if outgoing.method == b"GET" else None
    results = await asyncio.gather(*(user.infer() for _ in range(5)), return_exceptions=True)
    assert {type(result) for result in results} == {TransportError}
    assert user.session._refreshing is False
    stage.before = lambda outgoing: None
    await user.infer()
    stage.close()


async def test_a_service_that_is_away_for_a_moment_leaves_the_document_in_force():
    stage, user = await opened()
    await user.infer()
    stage.before = lambda outgoing: Answer(status=503) if outgoing.method == b"GET" else None
    await user.infer()
    assert user.session.conversation.verifications == 1
    stage.close()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (b"/v2/models/d/infer", "d"),
        (b"/v2/models/d", "d"),
        (b"/v2/models/d/ready", "d"),
        (b"/v2/models/d/versions/1/infer", "d"),
        (b"/v2/models/o/d/infer?x=1", "o/d"),
        (b"/v2/models/o%2Fd/infer", "o/d"),
    ],
)
async def test_models_in_paths(path, wanted):
    assert model_of(path) == wanted


@pytest.mark.parametrize("path", [b"/", b"/v2", b"/v2/models", b"/v1/models/x", b"http://x/v2/models/x"])
async def test_other_paths_are_not_sent(path):
    with pytest.raises(UsageError):
        model_of(path)


async def test_the_input_is_not_changed():
    before = IMAGE.copy()
    stage, user = await opened()
    await user.infer()
    np.testing.assert_array_equal(IMAGE, before)
    stage.close()
