"""Refusals: the client's error, its time, and the log."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import AuthenticationError, ConnectionRefused, Key, Settings
from bokbok_trio._keys import MAX_KEYS
from bokbok_trio._protocol.packets import encode_packet
from bokbok_trio._stream.establish import REFUSAL_DELAY, Refusal
from tests.support.establishing import (
    OTHER,
    TIMEOUT,
    Ending,
    K,
    Mode,
    as_client,
    as_server,
    end_of,
    enter_as_client,
    enter_as_server,
    in_both_modes,
    make_wires,
    meet,
    never_admit,
)

pytestmark = pytest.mark.usefixtures("fixed_grease")


async def raising(_user: str) -> Key:
    raise LookupError("the database is down")


async def none_of(_user: str) -> None:
    return None


async def finding_raw_bytes(_user: str) -> bytes:
    return K.raw


async def finding_mixed(_user: str) -> list[object]:
    return [K, K.raw]


def not_async(_user: str) -> Key:
    return K


REFUSED: dict[str, tuple[bytes, Any]] = {
    "unknown user": (b"myuser", {"other": K}),
    "unknown user, by function": (b"myuser", none_of),
    "no keys": (b"myuser", {"myuser": []}),
    "wrong key": (b"myuser", {"myuser": OTHER}),
    "wrong keys": (b"myuser", {"myuser": [OTHER] * 5}),
    "empty name": (b"", {"": K}),
    "name with control character": (b"a\0b", {"a\0b": K}),
    "name that is not UTF-8": (b"\xff", {"\xff": K}),
    "name that is too long": (b"x" * 256, {"x" * 256: K}),
    "look-up raises": (b"myuser", raising),
    "look-up is not async": (b"myuser", not_async),
    "look-up finds bytes": (b"myuser", finding_raw_bytes),
    "look-up finds bytes in a list": (b"myuser", finding_mixed),
    "mapping holds bytes": (b"myuser", {"myuser": K.raw}),
}


@dataclass(frozen=True)
class Seen:
    """All that a client can see of a refusal."""

    packet: bytes
    seconds: float
    sizes: tuple[int, ...]


async def be_refused(name: bytes, user_key: Any, *, late: float = 0) -> tuple[Seen, Ending]:
    client, server = make_wires()
    endings: list[Ending] = []

    async def serve() -> None:
        endings.append(await end_of(server, as_server(server, user_key=user_key, admit=never_admit)))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        stream, opening = await enter_as_client(client, name)
        await trio.sleep(late)
        await stream.send_all(opening)
        packet = await stream.receive_some()
        seconds = trio.current_time() - start
    return Seen(packet, round(seconds, 6), tuple(map(len, server.sent))), endings[0]


async def test_every_refusal_of_a_user_looks_the_same_and_comes_at_the_same_time(
    autojump_clock: MockClock,
) -> None:
    refusals = {why: await be_refused(name, user_key) for why, (name, user_key) in REFUSED.items()}
    for refusal, ending in refusals.values():
        assert refusal == refusals["unknown user"][0]
        assert type(ending.error) is AuthenticationError
    assert refusal.seconds == REFUSAL_DELAY
    assert refusal.packet == encode_packet(b"refused", b"authentication", b"authentication failed")


@pytest.mark.parametrize("late", [0.0, 0.45, 0.5, 1.0, 3.0])
async def test_a_late_open_does_not_show_how_long_a_look_up_took(
    late: float, autojump_clock: MockClock
) -> None:
    async def slow_where_known(user: str) -> Key | None:
        if user != "myuser":
            return None
        await trio.sleep(0.1)
        return OTHER

    known, _ = await be_refused(b"myuser", slow_where_known, late=late)
    unknown, _ = await be_refused(b"nobody", slow_where_known, late=late)
    unusable, _ = await be_refused(b"a\0b", slow_where_known, late=late)
    assert known == unknown == unusable
    assert known.seconds >= REFUSAL_DELAY


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ("look-up raises", LookupError),
        ("look-up is not async", TypeError),
        ("look-up finds bytes", TypeError),
        ("look-up finds bytes in a list", TypeError),
        ("mapping holds bytes", TypeError),
    ],
)
async def test_a_failing_look_up_is_logged(
    why: str, error: type[Exception], caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await be_refused(*REFUSED[why])
    (record,) = caplog.records
    assert record.name == "bokbok_trio"
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "looking up the key of user 'myuser' failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is error
    assert repr(K.raw)[2:-1] not in caplog.text


@pytest.mark.parametrize("user_key", [raising, {"myuser": [OTHER] * (MAX_KEYS + 1)}], ids=["fails", "keys"])
async def test_what_is_wrong_with_a_look_up_is_logged_after_the_refusal(
    user_key: Any, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Logging takes time, by which one could tell who is known."""
    client, server = make_wires()
    logged: list[int] = []

    async def note_when_sent() -> None:
        stream, opening = await enter_as_client(client, b"myuser")
        await stream.send_all(opening)
        await stream.receive_some()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(len(server.sent))

    note = Note()
    logging.getLogger("bokbok_trio").addHandler(note)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note_when_sent)
            await end_of(server, as_server(server, user_key=user_key))
    finally:
        logging.getLogger("bokbok_trio").removeHandler(note)
    assert logged == [2]  # hello, and the refusal


ONCE = ExceptionGroup("made once", [LookupError("the database is down")])


async def test_failing_look_ups_keep_no_tracebacks(autojump_clock: MockClock) -> None:
    """An exception that was made once and is raised each time would collect them."""

    async def raise_it_again(user: str) -> Key:
        raise ONCE

    for _ in range(3):
        await be_refused(b"myuser", raise_it_again)
    assert ONCE.__traceback__ is None
    assert ONCE.exceptions[0].__traceback__ is None


async def test_a_look_up_that_fails_while_it_is_cancelled_is_logged(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def fail_late(user: str) -> Key:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise LookupError("the database is down")

    options = {"user_key": fail_late, "settings": Settings(handshake_timeout=TIMEOUT)}
    _client, server = await meet(make_wires(), server=options)
    assert "not done within 7 seconds" in str(server.error)
    assert caplog.text.count("looking up the key of user 'myuser' failed") == 1


async def test_a_look_up_that_takes_too_long_is_no_cyclic_garbage(autojump_clock: MockClock) -> None:
    class Held:
        """Something."""

    held: list[weakref.ref[Held]] = []

    async def hang(user: str) -> Key:
        something = Held()
        held.append(weakref.ref(something))
        await trio.sleep_forever()
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        await meet(make_wires(), server={"user_key": hang, "settings": Settings(handshake_timeout=TIMEOUT)})
        assert [each() for each in held] == [None]
    finally:
        gc.enable()


async def test_no_look_up_is_asked_for_an_unusable_name(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await be_refused(b"a\0b", raising)
    assert caplog.records == []


async def test_a_client_is_told_that_it_was_refused(autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), client={"key": OTHER})
    assert type(client.error) is AuthenticationError
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == "user 'myuser' has no key that fits"
    assert client.seconds == REFUSAL_DELAY


async def test_a_wrong_key_is_known_for_one_though_the_client_hung_up(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def hang_up() -> None:
        stream, opening = await enter_as_client(client)
        await stream.send_all(opening)
        await trio.aclose_forcefully(client)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        ending = await end_of(server, as_server(server, user_key={"myuser": OTHER}))
    assert str(ending.error) == "user 'myuser' has no key that fits"


async def test_a_server_without_the_key_is_no_server(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def pretend() -> None:
        stream, _ = await enter_as_server(server)
        await stream.send_all(encode_packet(b"accepted", b"65536", b"10", b"\0", bytes(32)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pretend)
        ending = await end_of(client, as_client(client))
    assert type(ending.error) is AuthenticationError
    assert len(client.sent) == 2


@in_both_modes
@pytest.mark.parametrize("code", ["busy", "stopping"])
async def test_a_server_may_not_admit_a_client(
    mode: Mode, code: Literal["busy", "stopping"], autojump_clock: MockClock
) -> None:
    asked = 0

    def admit(user: str | None) -> Refusal:
        nonlocal asked
        asked += 1
        assert user == ("myuser" if mode == "sealed" else None)
        return Refusal(code, "told so", "for a reason")

    texts = []
    for ending in await meet(make_wires(), mode, server={"admit": admit}):
        assert isinstance(ending.error, ConnectionRefused)
        assert ending.error.code == code
        assert ending.seconds == 0
        texts.append(str(ending.error))
    assert asked == 1
    assert "told so" in texts[0]
    assert "for a reason" in texts[1]


@in_both_modes
async def test_what_admit_raises_comes_out_as_itself(mode: Mode, autojump_clock: MockClock) -> None:
    client, server = make_wires()

    def admit(_: str | None) -> None:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of, client, as_client(client, mode))
        with pytest.raises(ZeroDivisionError):
            await as_server(server, mode, admit=admit)
        await trio.aclose_forcefully(server)
