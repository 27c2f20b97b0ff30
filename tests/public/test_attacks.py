"""Attacks on the wire: a real client and a real server, sealed, and somebody in the middle of them.

What an attacker does to single messages and streams is tested where these are: `test_handshake`,
`test_handshake_attacks`, `test_establish_attacked`, `test_records`, `test_vectors`; an attacker who only
waits, in `test_watchdog`.
"""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Address,
    AuthenticationError,
    Connection,
    ConnectionLost,
    HandshakeError,
    Key,
    TCPAddress,
    open_connection,
    open_server,
)
from bokbok_trio._protocol.key_schedule import DirectionKeys

from ..support import second_implementation as second

CLIENT, SERVER = 0, 1  # who sends
HELLO_SIZE = 78
PLAIN_HELLOS = [second.MAGIC + second.packet([b"hello", side, b"plain", b""]) for side in second.SIDES]
K = Key(bytes(range(32)))
OTHER = Key(bytes(range(100, 132)))

from_either_side = pytest.mark.parametrize("sender", [CLIENT, SERVER], ids=["client", "server"])


@asynccontextmanager
async def in_time() -> AsyncGenerator[None]:
    """What an attack might make hang."""
    with trio.fail_after(5):
        yield


class Cut(Exception):
    """The attacker ends the connection, so that both sides see an end of the transport."""


Attack = Callable[[int, int, bytes], Iterable[bytes]]
"""Told who sends, which message of theirs it is, and that: a hello or a record. Returns what arrives."""


def pass_on(sender: int, number: int, message: bytes) -> Iterable[bytes]:
    return [message]


class Middle:
    """Somebody between clients and a server.

    Attributes:
        attack: what is done to the next connection.
        seen: what the two sides sent in all connections so far, by sender.
    """

    def __init__(self, server: Address) -> None:
        assert isinstance(server, TCPAddress)
        self.server = server
        self.attack: Attack = pass_on
        self.seen: tuple[list[bytes], list[bytes]] = ([], [])

    async def serve(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self.server.port)
        try:
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, client, server, CLIENT, self.attack)
                nursery.start_soon(self._carry, server, client, SERVER, self.attack)
        except* (Cut, trio.BrokenResourceError):
            pass

    async def _carry(
        self, source: trio.SocketStream, target: trio.SocketStream, sender: int, attack: Attack
    ) -> None:
        data = b""
        number = 0
        while some := await source.receive_some():
            data += some
            while len(message := data[: message_size(number, data)]) > 0:
                data = data[len(message) :]
                self.seen[sender].append(message)
                for changed in attack(sender, number, message):
                    await target.send_all(changed)
                number += 1
        await target.send_eof()


def message_size(number: int, data: bytes) -> int:
    """The size of the message that some bytes begin with; 0 if it has not wholly come."""
    size = HELLO_SIZE if number == 0 else 2 + int.from_bytes(data[:2], "big")
    return size if len(data) >= max(size, 2) else 0


class Scene:
    """A server, somebody in the middle, and what the server's user is told."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.handled: list[bytes] = []
        self.middle: Middle
        self.address = ""

    async def on_open(self, connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        self.opened.append(connection)

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        self.handled += request
        return request

    def connect(self, attack: Attack = pass_on, **options: Any) -> Any:
        """A client that dials, and whom this happens to."""
        self.middle.attack = attack
        return open_connection(self.address, **{"user": "user", "key": K, **options})


@asynccontextmanager
async def open_scene(**options: Any) -> AsyncGenerator[Scene]:
    scene = Scene()
    listener: trio.SocketListener
    async with (
        open_server(
            "127.0.0.1:0",
            scene.handle,
            **{"user_key": {"user": K}, "open_handler": scene.on_open, **options},
        ) as server,
        trio.open_nursery() as nursery,
    ):
        scene.middle = Middle(server.addresses[0])
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        scene.address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, scene.middle.serve, [listener])
        yield scene
        nursery.cancel_scope.cancel()


async def test_one_in_the_middle_who_does_nothing_is_not_noticed() -> None:
    async with open_scene() as scene:
        async with scene.connect() as client:
            assert await client.request(["x"]) == [b"x"]
            assert client.encrypted
        assert scene.handled == [b"x"]
        seen = b"".join(scene.middle.seen[CLIENT])
        assert seen.startswith(second.MAGIC)
        assert b"user" not in seen


# ---- what is changed ----


def change(message: bytes, at: int) -> bytes:
    """Take a bit of a byte away, so that nobody waits for more because of a length; or add one to a zero."""
    changed = bytearray(message)
    at = min(at, len(message) - 1)  # the options differ in length
    changed[at] = changed[at] & (changed[at] - 1) if changed[at] else 0x80
    return bytes(changed)


def changing(who: int, which: int, at: int) -> Attack:
    """Change a byte of that message of one side."""

    def attack(sender: int, number: int, message: bytes) -> Iterable[bytes]:
        return [change(message, at) if (sender, number) == (who, which) else message]

    return attack


@from_either_side
@pytest.mark.parametrize(("which", "step"), [(0, 3), (1, 11)], ids=["hello", "open or accepted"])
async def test_no_changed_byte_of_the_handshake_opens_a_connection(
    sender: int, which: int, step: int
) -> None:
    async with open_scene() as scene:
        async with scene.connect():
            size = len(scene.middle.seen[sender][which])
        opened = len(scene.opened)
        for at in sorted({0, 1, 2, *range(3, size, step), size - 1}):
            with pytest.raises(HandshakeError):
                async with scene.connect(changing(sender, which, at)):
                    raise AssertionError(at)
        assert scene.handled == []
        if sender == CLIENT or which == 0:
            assert len(scene.opened) == opened


@from_either_side
async def test_no_changed_byte_of_a_record_is_told_to_a_user(sender: int) -> None:
    async with open_scene() as scene:
        async with scene.connect() as client:
            await client.request(["first"])
            size = len(scene.middle.seen[sender][2])
        scene.handled.clear()
        # Not the first byte: where a length became larger, more would be awaited, until no ping is answered.
        for at in sorted({1, 2, *range(3, size, 5), size - 1}):
            async with scene.connect(changing(sender, 2, at)) as client, in_time():
                with pytest.raises(ConnectionLost):
                    await client.request(["secret"])
                assert client.closed
        assert set(scene.handled) == ({b"secret"} if sender == SERVER else set())


# ---- what comes again, not at all, or in another place ----

Trick = Callable[[Scene], Attack]


def repeat_the_first(who: int, scene: Scene) -> Attack:
    return lambda sender, number, message: [message] * (1 + ((sender, number) == (who, 2)))


def leave_out_the_first(who: int, scene: Scene) -> Attack:
    return lambda sender, number, message: [message] if (sender, number) != (who, 2) else []


def swap_two(who: int, scene: Scene) -> Attack:
    held: list[bytes] = []

    def attack(sender: int, number: int, message: bytes) -> Iterable[bytes]:
        if (sender, number) == (who, 2):
            held.append(message)
            return []
        return [message, *held] if (sender, number) == (who, 3) else [message]

    return attack


def reflect(who: int, scene: Scene) -> Attack:
    """Instead of the first record, the receiver's own first record comes back, which has the same count."""
    own: list[bytes] = []

    def attack(sender: int, number: int, message: bytes) -> Iterable[bytes]:
        if sender != who and number == 2:
            own.append(message)
        return own or [message] if (sender, number) == (who, 3 - (who == SERVER)) else [message]

    return attack


def repeat_the_handshake(who: int, scene: Scene) -> Attack:
    """Instead of the first record comes `open`, or `accepted`."""
    return lambda sender, number, message: (
        [scene.middle.seen[who][-2]] if (sender, number) == (who, 2) else [message]
    )


def take_from_another_connection(who: int, scene: Scene) -> Attack:
    """Instead of the first record comes the first one of another connection of the same user."""
    other = scene.middle.seen[who][2]
    return lambda sender, number, message: [other] if (sender, number) == (who, 2) else [message]


TRICKS = [
    repeat_the_first,
    leave_out_the_first,
    swap_two,
    reflect,
    repeat_the_handshake,
    take_from_another_connection,
]


@from_either_side
@pytest.mark.parametrize("trick", TRICKS)
async def test_a_record_out_of_its_place_ends_the_connection(
    sender: int, trick: Callable[[int, Scene], Attack]
) -> None:
    """Two requests, one after the other, of which neither is handled twice or answered wrong."""
    answers: list[bytes] = []

    async def ask(client: Connection, text: bytes) -> None:
        try:
            answers.extend(await client.request([text]))
        except ConnectionLost:
            answers.append(b"lost")

    async with open_scene() as scene:
        async with scene.connect() as client:
            await client.request([b"before"])
        scene.handled.clear()
        async with (
            scene.connect(trick(sender, scene)) as client,
            in_time(),
            trio.open_nursery() as nursery,
        ):
            arrived = len(scene.middle.seen[sender])
            nursery.start_soon(ask, client, b"one")
            while len(scene.middle.seen[sender]) == arrived and not client.closed:
                await trio.sleep(0.001)
            nursery.start_soon(ask, client, b"two")
        server = scene.opened[-1]
        await server.wait_closed()
        told = server if sender == CLIENT else client
        assert told.reason is not None
        assert "a record did not open" in told.reason
        assert answers in ([b"lost", b"lost"], [b"one", b"lost"])
        assert scene.handled in ([], [b"one"], [b"one", b"two"])


# ---- what is cut short ----


@from_either_side
@pytest.mark.parametrize("inside", [True, False], ids=["inside of a record", "between records"])
async def test_an_end_that_nobody_sealed_is_no_end(sender: int, inside: bool) -> None:
    def attack(who: int, number: int, message: bytes) -> Iterable[bytes]:
        if (who, number) == (sender, 3):
            if inside:
                yield message[:-1]
            raise Cut
        yield message

    async with open_scene() as scene:
        async with scene.connect(attack) as client:
            await client.request(["one"])
            with pytest.raises(ConnectionLost):
                await client.request(["two"])
            await scene.opened[0].wait_closed()
            reasons = client.reason, scene.opened[0].reason
        assert all(reason is not None and "cut short" in reason for reason in reasons)
        async with scene.connect() as client:  # as it is said when it is one
            await client.request(["three"])
        await scene.opened[1].wait_closed()
        assert scene.opened[1].reason is not None
        assert "cut short" not in scene.opened[1].reason
    assert scene.handled == [b"one", *([b"two"] if sender == SERVER else []), b"three"]


# ---- recordings ----


async def test_a_recorded_session_gets_in_nowhere() -> None:
    async with open_scene() as scene:
        async with scene.connect() as client:
            await client.request(["order"])
        sent, received = scene.middle.seen
        for upto in (2, len(sent)):
            stream = await trio.open_tcp_stream("127.0.0.1", scene.middle.server.port)
            await stream.send_all(b"".join(sent[:upto]))
            answered = b""
            async with in_time():
                while some := await stream.receive_some():
                    answered += some
            assert len(answered) == HELLO_SIZE
            assert answered != received[0]
            await stream.aclose()
        assert scene.handled == [b"order"]
        assert len(scene.opened) == 1


async def test_a_recorded_server_convinces_nobody() -> None:
    async with open_scene() as scene:
        async with scene.connect() as client:
            await client.request(["x"])
        recorded = list(scene.middle.seen[SERVER])

        def attack(sender: int, number: int, message: bytes) -> Iterable[bytes]:
            return recorded[number : number + 1] if sender == SERVER else [message]

        with pytest.raises(HandshakeError):
            async with scene.connect(attack):
                raise AssertionError


# ---- somebody who talks to both ----


class Impostor:
    """Somebody without the key, who is a server to the client and a client to the server.

    The two channels are the impostor's own, and `open` and `accepted` are passed on between them.
    """

    def __init__(self, *, lies: bool = False) -> None:
        self.lies = lies  # the server is said to have accepted
        self.server = second.Server({}, b"", (4096, 1), bytes(range(32)))
        self.client = second.Client(b"user", OTHER.raw, b"", (4096, 1), bytes(range(1, 33)))
        self.read: list[bytes] = []

    def attack(self, sender: int, number: int, message: bytes) -> Iterable[bytes]:
        """Told the messages of both; what is passed on is what the other side may want to hear."""
        mine, other = (self.server, self.client) if sender == CLIENT else (self.client, self.server)
        if number == 0:
            mine.take_hello(message)
            return [other.own_hello]
        read = second.Records(mine.hs[:32] if sender == CLIENT else mine.hs[32:]).open(message)
        self.read.append(read)
        if self.lies and sender == SERVER:
            read = second.packet([b"accepted", b"4096", b"1", b"\0", bytes(32)])
        return [second.Records(other.hs[:32] if sender == CLIENT else other.hs[32:]).seal(read)]


@pytest.mark.parametrize("lies", [False, True])
async def test_an_impostor_between_the_two_can_pass_on_neither_box_nor_proof(lies: bool) -> None:
    impostor = Impostor(lies=lies)
    async with open_scene() as scene:
        with pytest.raises(AuthenticationError):
            async with scene.connect(impostor.attack):
                raise AssertionError
        assert scene.opened == []
    opening, refused = map(second.unpack, impostor.read)
    assert opening[:2] == [b"open", b"user"]  # that much a fake server learns
    assert refused == [b"refused", b"authentication", b"authentication failed"]


async def test_nobody_is_talked_down_to_plain() -> None:
    """The hello of either side says another mode than it did."""
    async with open_scene() as scene:
        with pytest.raises(HandshakeError):
            async with scene.connect(lambda sender, number, message: [PLAIN_HELLOS[sender]]):
                raise AssertionError
        assert scene.middle.seen[SERVER] == []
        assert scene.opened == []


async def test_a_keyed_client_says_nothing_to_a_plain_server() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(PLAIN_HELLOS[SERVER])
    with pytest.raises(HandshakeError, match="this side is sealed, and the peer may be plain"):
        async with open_connection(ours, user="user", key=K):
            raise AssertionError
    said = b""
    while some := await theirs.receive_some():
        said += some
    assert len(said) == HELLO_SIZE


# ---- what is shown ----


async def test_no_key_shows_in_anything_that_a_program_keeps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a user's key nor those of a connection: in logs, errors, and what objects say of themselves."""
    secrets = [K.raw, OTHER.raw]
    split = DirectionKeys.split

    def note(derived: bytes) -> DirectionKeys:
        secrets.extend((derived[:32], derived[32:]))
        return split(derived)

    monkeypatch.setattr(DirectionKeys, "split", note)
    shown: list[object] = []

    def show(*things: object) -> None:
        for thing in things:
            shown.extend((repr(thing), str(thing)))
            if isinstance(thing, BaseException):
                shown.append("".join(traceback.format_exception(thing)))

    async def refuse(user: str) -> Key:
        await trio.lowlevel.checkpoint()
        raise LookupError(user)

    async with open_scene() as scene:
        for attack, key in (
            (pass_on, OTHER),
            (changing(CLIENT, 1, 100), K),
            (changing(SERVER, 1, 50), K),
            (Impostor(lies=True).attack, K),
        ):
            with pytest.raises(HandshakeError) as caught:
                async with scene.connect(attack, key=key):
                    raise AssertionError
            show(caught.value)
        async with scene.connect(changing(SERVER, 3, 20)) as client:
            await client.request(["x"])
            show(client, client.statistics(), *scene.opened, scene.middle)
            with pytest.raises(ConnectionLost) as lost:
                await client.request(["y"])
            show(lost.value, client.reason)
    async with open_scene(user_key=refuse) as scene:
        with pytest.raises(HandshakeError) as caught:
            async with scene.connect():
                raise AssertionError
        show(caught.value)
    text = "\n".join(map(str, shown)) + caplog.text
    assert "LookupError" in text
    assert len(secrets) > 10
    for secret in secrets:
        for form in (repr(secret)[2:-1], secret.hex(), str(list(secret))[1:-1]):
            assert form not in text
