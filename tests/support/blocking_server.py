"""A server for blocking clients, whose handlers record what happens."""

from __future__ import annotations

from typing import Any

import trio

from bokbok_trio import Channel, Connection, Key, RequestError, Server, current_request
from bokbok_trio.blocking import connect

from .threads import Story

KEY = Key.generate()

STORY = Story()


async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    match request:
        case [b"sleep"]:
            STORY.tell(trio.current_effective_deadline() - trio.current_time())
            try:
                await trio.sleep_forever()
            finally:
                STORY.tell("cancelled")
        case [b"context"]:
            return [f"{name}={value!r}" for name, value in current_request().context.items()]
        case [b"back", *rest]:
            return list(await connection.request(rest))
        case [b"lose"]:
            await connection.aclose()
        case [b"error"]:
            raise RequestError("no", code="no")
    await trio.lowlevel.checkpoint()
    return list(request)


async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
    match request:
        case [b"count", upto]:
            for number in range(int(upto)):
                await channel.send([str(number)])
        case [b"error"]:
            raise RequestError("no", code="no")
        case _:
            STORY.tell(trio.current_effective_deadline() - trio.current_time())
            try:
                async for item in channel:
                    await channel.send(item)
            except trio.Cancelled:
                STORY.tell("cancelled")
                raise
    return ["done"]


def dial(server: Server, **options: Any) -> Any:
    return connect(server.addresses[0], user="alice", key=KEY, **options)
