"""Requests of the peer: the answers for handlers that failed."""

from __future__ import annotations

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._errors import MAX_ERROR_TEXT_SIZE
from bokbok_trio._protocol.events import Failure
from tests.support.engines import LIMIT, make, receive
from tests.support.helpers import packet


def test_a_failure_reaches_the_asker() -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    server.fail(0, "no-such", "there is none")
    assert list(receive(client, server.take(0))) == [Failure(0, "no-such", "there is none")]


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", "\ud800"])
def test_a_long_message_is_cut_between_characters(character: str) -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    server.fail(0, "long", "x" + character * MAX_ERROR_TEXT_SIZE)
    [failure] = receive(client, server.take(0))
    assert isinstance(failure, Failure)
    size = len(failure.message.encode())
    assert MAX_ERROR_TEXT_SIZE - 3 <= size <= MAX_ERROR_TEXT_SIZE
    assert failure.message.startswith("x" + character.encode(errors="backslashreplace").decode())


def test_the_longest_error_fits_the_smallest_limit() -> None:
    server = make("server")
    list(receive(server, packet(b"req", b"9" * 17 + b"8", b"", b"", b"", body=[])))
    server.fail(int("9" * 17 + "8"), "c" * 64, "x" * 5000)
    assert len(server.take(0)) <= LIMIT


def test_details_that_do_not_fit_are_left_out() -> None:
    client, server = make("client"), make("server")
    client.request([])
    receive(server, client.take(0))
    assert not server.fail(0, "c", "m", bytes(LIMIT))
    assert receive(client, server.take(0)) == [Failure(0, "c", "m", b"")]


def test_details_over_their_limit_break_the_protocol() -> None:
    client = make("client", limit=2**20)
    client.request([])
    client.take(0)
    with pytest.raises(ProtocolError, match="details of 16385 bytes exceed the limit of 16384"):
        receive(client, packet(b"err", b"0", b"c", b"m", bytes(2**14 + 1)))
