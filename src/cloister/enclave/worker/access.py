"""Who signed an inner request: the part of authorization that needs no statement."""

from __future__ import annotations

from cloister.core.protocol.authorization import FIELD, RequestAuthorization, RequestContext
from cloister.enclave.server import InnerRequest
from cloister.enclave.worker.membership import Membership
from cloister.errors import AccessRefused, BindingRefused


def verify_request(
    membership: Membership, request: InnerRequest, subject: str, *, now: int
) -> RequestAuthorization:
    """The authorization of a request, once its signature is checked.

    Args:
        membership: Whose service, pool and keys the signature must cover.
        request: The request.
        subject: The model id in its path, or what stands in its place.
        now: Unix seconds.

    Raises:
        AccessRefused: it carries no signature, or one that isn't valid now.
        BindingRefused: signed for something else, or under keys that died.
        FormatError: no authorization.
    """
    field = request.http.field(FIELD)
    if field is None:
        raise AccessRefused(
            "the request carries no authorization",
            code="access.authorization",
            claim="authorization",
            expected="signed by a user whom the owner grants the model",
            actual="none",
        )
    authorization = RequestAuthorization.from_field(field)
    key = membership.keys.get(request.key_id)
    if key is None or not key.lives(now):
        raise BindingRefused(
            code="binding.epoch", claim="epoch", expected="a live one", actual="one that ended"
        )
    context = RequestContext(
        service=membership.service, pool=membership.pool_id, epoch=key.epoch, model=subject, enc=request.enc
    )
    authorization.verify(context, now=now)
    return authorization
