"""Requests of this side: cancelling, and the timeouts that are sent."""

from __future__ import annotations

import math

import pytest

from bokbok_trio._protocol.events import Cancel
from tests.support.engines import make, receive
from tests.support.helpers import packet

# ---- cancelling ----


def test_a_request_cancelled_in_the_queue_never_existed() -> None:
    client = make("client", slots=1)
    queued, waiting, third = client.request([]), client.request([]), client.request(["third"])
    client.cancel(waiting)
    client.cancel(queued)
    assert client.take(0) == packet(b"req", b"%d" % third, b"", b"", b"", body=[b"third"])


def test_a_request_cancelled_later_is_followed_by_cancel_and_still_answered() -> None:
    client, server = make("client", slots=1), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    client.cancel(0)
    waiting = client.request([])
    sent = client.take(0)
    assert sent == packet(b"cancel", b"0"), "its slot is not free before its answer came"
    assert list(receive(server, sent)) == [Cancel(0)]
    server.fail(0, "cancelled", "")
    assert list(receive(client, server.take(0))) == []
    assert client.is_unsent(waiting)
    assert b"req" in client.take(0)
    assert not client.is_unsent(waiting)


def test_cancel_leaves_before_what_was_queued_earlier() -> None:
    client = make("client")
    client.request([])
    client.take(0)
    client.request(["later"])
    client.cancel(0)
    assert client.take(0) == packet(b"cancel", b"0") + packet(b"req", b"2", b"", b"", b"", body=[b"later"])


@pytest.mark.parametrize("answered", [False, True])
def test_a_cancel_that_crosses_the_answer_is_ignored(answered: bool) -> None:
    server = make("server")
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.answer(0, [])
    if answered:
        server.take(0)
        assert list(receive(server, packet(b"cancel", b"0"))) == []
    else:
        assert list(receive(server, packet(b"cancel", b"0"))) == []
        assert server.take(0) == packet(b"ok", b"0", body=[])


# ---- deadlines ----


@pytest.mark.parametrize(
    ("deadline", "now", "field"),
    [
        (math.inf, 5, b""),
        (7.5, 5, b"2500000"),
        (5.0000004, 5, b"0"),
        (4, 5, b"0"),
        (-math.inf, 5, b"0"),
        (5 + 1e10, 5, b"10000000000000000"),
        (5 + 1e11 + 1e9, 5, b""),
    ],
)
def test_the_timeout_is_what_is_left_when_it_leaves(deadline: float, now: float, field: bytes) -> None:
    client = make("client")
    client.request([], deadline)
    assert client.take(now) == packet(b"req", b"0", field, b"", b"", body=[])
