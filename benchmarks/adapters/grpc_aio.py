"""grpcio's asyncio interface, with generic handlers: bytes, and no protobuf. It sets TCP_NODELAY.

What is typed it encodes by msgspec, as ours does.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import msgspec

from .base import HOST, JOB, Announce, AsyncioAdapter, Connection, Job, Take

ENCODE, DECODE = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Job).decode

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel
]


async def echo(data: bytes, context: object) -> bytes:
    return data


async def echo_job(job: Job, context: object) -> Job:
    return job


async def give(size: bytes, context: object) -> bytes:
    return bytes(int(size))


async def stream(size: bytes, context: object) -> AsyncGenerator[bytes]:
    item = bytes(int(size))
    while True:
        yield item


class GrpcConnection(Connection):
    def __init__(self, channel: Any) -> None:
        self._echo = channel.unary_unary("/bench/echo")
        self._echo_job = channel.unary_unary("/bench/echo_job", ENCODE, DECODE)
        self._give = channel.unary_unary("/bench/give")
        self._stream = channel.unary_stream("/bench/stream")

    async def echo(self, data: bytes) -> bytes:
        return await self._echo(data)

    async def echo_job(self) -> Job:
        return await self._echo_job(JOB)

    async def give(self, size: int) -> bytes:
        return await self._give(b"%d" % size)

    async def stream(self, size: int, take: Take) -> None:
        call = self._stream(b"%d" % size)
        async for item in call:
            if not await take(len(item)):
                break
        call.cancel()


class GrpcAio(AsyncioAdapter):
    async def serve(self, announce: Announce) -> None:
        server = grpc.aio.server(options=OPTIONS)
        handlers = {
            "echo": grpc.unary_unary_rpc_method_handler(echo),
            "echo_job": grpc.unary_unary_rpc_method_handler(echo_job, DECODE, ENCODE),
            "give": grpc.unary_unary_rpc_method_handler(give),
            "stream": grpc.unary_stream_rpc_method_handler(stream),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench", handlers)])
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        announce(f"{HOST}:{port}")
        await server.wait_for_termination()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            yield GrpcConnection(channel)
