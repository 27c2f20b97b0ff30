"""The peer of a UNIX socket: its credentials, and the name that `peer_user` gives it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import AuthenticationError, PeerCredentials
from tests.support.establishing import (
    Mode,
    as_client,
    as_server,
    end_of,
    in_both_modes,
    make_wires,
    meet,
    never_admit,
    open_sockets,
)

pytestmark = pytest.mark.usefixtures("fixed_grease")

THIS_PROCESS = PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


@in_both_modes
async def test_both_sides_know_who_is_at_the_other_end_of_a_unix_socket(
    mode: Mode, autojump_clock: MockClock
) -> None:
    async with open_sockets() as sockets:
        for ending in await meet(sockets, mode):
            assert ending.opened.peer_credentials == THIS_PROCESS
    for ending in await meet(make_wires(), mode):
        assert ending.opened.peer_credentials is None


async def test_peer_user_names_the_peer_for_the_server(autojump_clock: MockClock) -> None:
    asked: list[PeerCredentials] = []

    def name(credentials: PeerCredentials) -> str:
        asked.append(credentials)
        return "alïce"

    async with open_sockets() as sockets:
        client, server = await meet(sockets, "plain", server={"peer_user": name})
        assert server.opened.user == "alïce"
        assert client.opened.user is None
        assert server.opened.key_fingerprint is None
        assert asked == [THIS_PROCESS]


def name_badly(_credentials: PeerCredentials) -> str:
    raise LookupError("the database is down")


@pytest.mark.parametrize(
    ("peer_user", "error"),
    [
        (lambda _: None, None),
        (name_badly, LookupError),
        (lambda _: "", ValueError),
        (lambda _: "x" * 256, ValueError),
        (lambda _: "a\0b", ValueError),
        (lambda _: b"alice", TypeError),
        (lambda credentials: credentials.uid, TypeError),
        (lambda: "alice", TypeError),
    ],
)
async def test_whom_peer_user_does_not_name_is_refused_at_once(
    peer_user: Any,
    error: type[Exception] | None,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    async with open_sockets() as sockets:
        client, server = await meet(sockets, "plain", server={"peer_user": peer_user, "admit": never_admit})
    for ending in (client, server):
        assert type(ending.error) is AuthenticationError
        assert ending.seconds == 0
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == f"peer_user has no name for {THIS_PROCESS}"
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info is not None]
    assert logged == ([] if error is None else [error])
    assert caplog.text.count(f"naming the peer {THIS_PROCESS} failed") == len(logged) == len(caplog.records)


async def test_who_has_no_credentials_is_refused_unasked(autojump_clock: MockClock) -> None:
    def never_ask(credentials: PeerCredentials) -> str:
        raise AssertionError

    client, server = await meet(make_wires(), "plain", server={"peer_user": never_ask, "admit": never_admit})
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == "the system does not tell who the peer is, so peer_user was not asked"
    assert type(client.error) is type(server.error) is AuthenticationError


async def test_what_ends_the_program_is_no_refusal(autojump_clock: MockClock) -> None:
    def leave(credentials: PeerCredentials) -> str:
        raise SystemExit(3)

    async with open_sockets() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(end_of, ours, as_client(ours, "plain"))
        with pytest.raises(SystemExit):
            await as_server(theirs, "plain", peer_user=leave)
        await theirs.aclose()
