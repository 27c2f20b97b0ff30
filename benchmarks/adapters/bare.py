"""The yardstick: a `trio.SocketStream`, and frames of a u32 length, a u8 kind and the bytes.

One call at a time on a connection: where several callers share one, each holds a lock until it is answered.
"bare pipelined" has them hold it only while they write; as the server answers in order, a reader task
hands the answers out in that order. A stream of items is a frame for each, and ends with the connection.
"""

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from struct import Struct

import trio

from .base import HOST, JOB_BYTES, Adapter, Announce, Connection, Take, Task, TrioAdapter, Unsupported

HEADER = Struct(">IB")
ECHO, GIVE, CALL_BACK, STREAM = range(4)


class Frames:
    """Frames over a stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, kind: int, data: bytes) -> None:
        await self._stream.send_all(HEADER.pack(len(data), kind) + data)

    async def receive(self) -> tuple[int, bytes]:
        await self._receive_until(HEADER.size)
        length, kind = HEADER.unpack_from(self._buffer)
        end = HEADER.size + length
        await self._receive_until(end)
        with memoryview(self._buffer) as view:
            data = bytes(view[HEADER.size : end])
        del self._buffer[:end]
        return kind, data

    async def _receive_until(self, size: int) -> None:
        while len(self._buffer) < size:
            received = await self._stream.receive_some()
            if not received:
                raise trio.EndOfChannel
            self._buffer += received


async def answer(stream: trio.abc.Stream) -> None:
    """Answer the requests of one connection, in order, until the client has gone."""
    frames = Frames(stream)
    with suppress(trio.EndOfChannel, trio.BrokenResourceError):
        while True:
            kind, data = await frames.receive()
            if kind == GIVE:
                data = bytes(int(data))
            elif kind == CALL_BACK:
                await frames.send(CALL_BACK, data)
                _, data = await frames.receive()
            elif kind == STREAM:
                item = bytes(int(data))
                while True:
                    await frames.send(STREAM, item)
            await frames.send(ECHO, data)


class BareConnection(Connection):
    def __init__(self, stream: trio.abc.Stream) -> None:
        self._frames = Frames(stream)
        self._lock = trio.Lock()
        self._shared = False

    async def _call(self, kind: int, data: bytes) -> bytes:
        if self._shared:  # else a lock would cost a turn of the event loop
            async with self._lock:
                return await self._call_alone(kind, data)
        return await self._call_alone(kind, data)

    async def _call_alone(self, kind: int, data: bytes) -> bytes:
        await self._frames.send(kind, data)
        return (await self._frames.receive())[1]

    async def echo(self, data: bytes) -> bytes:
        return await self._call(ECHO, data)

    async def echo_job(self) -> bytes:
        return await self.echo(JOB_BYTES)

    async def give(self, size: int) -> bytes:
        return await self._call(GIVE, b"%d" % size)

    async def call_back(self, data: bytes) -> bytes:
        return await self._call_alone(ECHO, await self._call(CALL_BACK, data))

    async def stream(self, size: int, take: Take) -> None:
        await self._frames.send(STREAM, b"%d" % size)
        while await take(len((await self._frames.receive())[1])):
            pass

    async def gather(self, adapter: Adapter, tasks: Sequence[Task]) -> None:
        self._shared = True
        await adapter.gather(tasks)
        self._shared = False


class PipelinedConnection(BareConnection):
    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self._callers: deque[trio.MemorySendChannel[bytes]] = deque()

    async def _call(self, kind: int, data: bytes) -> bytes:
        if not self._shared:
            raise Unsupported("for a caller who is alone on a connection it is the same as bare")
        caller, answers = trio.open_memory_channel[bytes](1)
        async with self._lock:
            self._callers.append(caller)
            await self._frames.send(kind, data)
        return await answers.receive()

    async def stream(self, size: int, take: Take) -> None:
        raise Unsupported("it is the same as bare")

    async def gather(self, adapter: Adapter, tasks: Sequence[Task]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hand_out)
            await super().gather(adapter, tasks)
            nursery.cancel_scope.cancel()

    async def _hand_out(self) -> None:
        while True:
            _, data = await self._frames.receive()
            self._callers.popleft().send_nowait(data)


class Bare(TrioAdapter):
    connection: type[BareConnection] = BareConnection

    async def serve(self, announce: Announce) -> None:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        announce(str(listener.socket.getsockname()[1]))
        await trio.serve_listeners(answer, [listener])

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        async with await trio.open_tcp_stream(HOST, int(address)) as stream:
            yield self.connection(stream)


class Pipelined(Bare):
    connection = PipelinedConnection
