"""Helpers that several test files use: handlers, a peer made by hand, and checks."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    ChannelHandler,
    CombinedHandler,
    Connection,
    ReconnectingConnection,
    RequestError,
    RequestHandler,
    Settings,
    open_connection,
)
from bokbok_trio._protocol.packets import PacketDecoder, encode_body, encode_packet

MAGIC = b"bokbok1\n"


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return request


async def busy_handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    """Answer in each of the ways in which a handler can."""
    match request:
        case [b"ping", text]:
            await trio.lowlevel.checkpoint()
            return [b"pong", text]
        case [b"sleep", seconds]:
            await trio.sleep(float(seconds))
            return ["slept"]
        case [b"back", *rest]:
            return list(await connection.request(rest))
        case _:
            raise RequestError("unknown request", code="unknown-request")


def packet(*fields: bytes, body: list[bytes] | None = None) -> bytes:
    """Encode a packet. If a body is given, it is the last field."""
    if body is None:
        return encode_packet(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_packet(*fields, body_size=size) + b"".join(chunks)


def decode(decoder: PacketDecoder, data: bytes | bytearray) -> list[list[bytes]]:
    """Return copies of the packets that some bytes complete."""
    packets = [list(map(bytes, fields)) for fields in decoder.decode(data)]
    while decoder.has_rest:
        packets += [list(map(bytes, fields)) for fields in decoder.decode(b"")]
    return packets


class RawPeer:
    """The server's end of a plain connection, made by hand."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._decoder = PacketDecoder(2**32)
        self._packets: list[list[bytes]] = []

    async def send(self, *fields: bytes, body: list[bytes] | None = None) -> None:
        await self.stream.send_all(packet(*fields, body=body))

    async def receive(self) -> list[bytes]:
        while not self._packets:
            data = await self.stream.receive_some()
            assert data, "the connection was closed"
            self._packets += decode(self._decoder, data)
        return self._packets.pop(0)

    async def shake_hands(self, max_message_size: int = 2**20, max_requests: int = 3) -> None:
        hello = MAGIC + packet(b"hello", b"client", b"plain", b"")
        received = b""
        while len(received) < len(hello):
            received += await self.stream.receive_some(len(hello) - len(received))
        assert received == hello
        await self.stream.send_all(MAGIC + packet(b"hello", b"server", b"plain", b""))
        assert (await self.receive())[0] == b"open"
        await self.send(b"accepted", b"%d" % max_message_size, b"%d" % max_requests, b"\0", b"")


def documented_code(file: str, word: str = "") -> list[str]:
    """Return the blocks of Python in a file of the documentation that contain this word."""
    text = (Path(__file__).parents[2] / "docs" / file).read_text()
    blocks = re.findall(r"\.\. code:: python\n\n((?:    .*\n|\n)+)", text)
    return [textwrap.dedent(block) for block in blocks if word in block]


def load_example(name: str) -> Any:
    """Import an example: a script in a folder that is not a package."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def run_documented(code: str, names: dict[str, Any]) -> None:
    """Run a block of the documentation, which may await at its top level, as in a notebook."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    waiting = eval(compile(code, "<documentation>", "exec", flags, dont_inherit=True), names)
    if waiting is not None:
        await waiting


needs_safe_channel = pytest.mark.skipif(
    not hasattr(trio, "as_safe_channel"), reason="an older Trio has no as_safe_channel"
)


class WholeStream(trio.abc.Stream):
    """A stream around another one that can be closed only as a whole, and not half."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.transport.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.transport.aclose()


@asynccontextmanager
async def raw_peer(
    request_handler: RequestHandler | CombinedHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008
    *,
    channel_handler: ChannelHandler | None = None,
    max_message_size: int = 2**20,
    max_requests: int = 3,
    over_sockets: bool = False,
) -> AsyncGenerator[tuple[Connection, RawPeer]]:
    """Open a connection with a peer made by hand at its other end, and yield both."""
    ours: trio.abc.Stream
    theirs: trio.abc.Stream
    if over_sockets:
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    else:
        ours, theirs = trio.testing.memory_stream_pair()
    peer = RawPeer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands, max_message_size, max_requests)
        async with open_connection(
            ours, request_handler=request_handler, channel_handler=channel_handler, settings=settings
        ) as connection:
            try:
                yield connection, peer
            finally:
                await trio.aclose_forcefully(theirs)  # otherwise this side would wait for the peer's end


@asynccontextmanager
async def open_peer(
    request_handler: RequestHandler | CombinedHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008
    **options: Any,
) -> AsyncGenerator[tuple[Connection, RawPeer]]:
    """Do as `raw_peer` does, and wait until both sides have finished the handshake."""
    async with raw_peer(request_handler, settings, **options) as pair:
        await settle()
        yield pair


async def settle() -> None:
    """Let every other task go as far as it can."""
    await trio.testing.wait_all_tasks_blocked()


def req(id: int, *fields: bytes, timeout: bytes = b"") -> bytes:
    """Make a request of the peer by hand."""
    return packet(b"req", b"%d" % id, timeout, b"", b"", body=list(fields))


def cancel(id: int) -> bytes:
    return packet(b"cancel", b"%d" % id)


async def receive_but_credit(peer: RawPeer) -> list[bytes]:
    """Receive the next packet that is not `credit`."""
    while (received := await peer.receive())[0] == b"credit":
        pass
    return received


async def outcomes(peer: RawPeer, count: int) -> dict[int, bytes]:
    """Receive the answers to so many requests, and return for each `ok` or the code of its error."""
    outcome: dict[int, bytes] = {}
    while len(outcome) < count:
        kind, id, *rest = await receive_but_credit(peer)
        assert int(id) not in outcome, "answered twice"
        assert kind in (b"ok", b"err")
        outcome[int(id)] = kind if kind == b"ok" else rest[0]
    return outcome


async def close_in_one_step(connection: Connection | ReconnectingConnection) -> None:
    """Close an object, and wait for nothing, even in a task that this cancels."""
    with trio.CancelScope(shield=True) as scope:
        scope.cancel()
        await connection.aclose()


def check_holds_no_secret(error: BaseException, *secrets: bytes | str) -> None:
    """Check that neither an error shows a secret, nor the frames and causes that a report of it shows."""
    errors: list[BaseException | None] = [error]
    while errors:
        error_ = errors.pop()
        if error_ is None:
            continue
        errors += [error_.__cause__, error_.__context__]
        shown: list[object] = [error_, error_.args, vars(error_)]
        for frame, _ in traceback.walk_tb(error_.__traceback__):
            if not Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1]):
                shown += frame.f_locals.values()
        for thing in shown:
            for secret in secrets:
                assert str(secret) not in f"{thing!r} {thing}"
                assert repr(secret)[2:-1] not in f"{thing!r} {thing}"
