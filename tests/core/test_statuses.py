"""One table from errors to HTTP statuses, and what differs where an error leaves."""

from __future__ import annotations

import pytest

from cloister import errors
from cloister.client.proxy import forward
from cloister.core.protocol import problem
from cloister.host import problems

# Class: inside the encapsulation, from the host, from the local proxy.
STATUSES = {
    "AccessRefused": (403, 403, 403),
    "AppraisalRefused": (403, 422, 502),
    "BindingRefused": (403, 422, 502),
    "CloisterError": (500, 500, 500),
    "DeadlineExceeded": (504, 504, 504),
    "EvidenceError": (400, 400, 400),
    "EvidenceRefused": (403, 422, 502),
    "FormatError": (400, 400, 400),
    "InvalidRequest": (400, 400, 400),
    "LeaseExpired": (503, 503, 503),
    "NotFound": (404, 404, 404),
    "Overloaded": (429, 503, 429),
    "Refused": (403, 422, 502),
    "Replayed": (409, 422, 502),
    "Rollback": (409, 422, 502),
    "StoreConflict": (503, 409, 503),
    "Tampered": (403, 422, 502),
    "TransportError": (503, 502, 503),
    "Unavailable": (503, 503, 503),
    "UsageError": (400, 400, 400),
}


def test_every_class_has_its_statuses() -> None:
    assert STATUSES.keys() == set(errors.__all__)


@pytest.mark.parametrize("name", STATUSES)
def test_the_status_of_each_class(name: str) -> None:
    error = getattr(errors, name)()
    found = (problem.status_of(error), problems.status_of(error), forward.status_of(error))
    assert found == STATUSES[name]


def test_an_edge_goes_before_the_table_and_only_for_its_classes() -> None:
    edge = ((errors.Rollback, 418), (errors.Refused, 451))
    assert problem.status_of(errors.Rollback(), edge=edge) == 418
    assert problem.status_of(errors.Tampered(), edge=edge) == 451
    assert problem.status_of(errors.NotFound(), edge=edge) == 404
