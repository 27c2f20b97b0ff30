"""Streams: writes the items of a channel as they arrive, and reads the items to send over one."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Final

import trio

from .. import Channel, RemoteError
from ._connecting import Session
from ._exits import CommandError, Exit
from ._fields import MAX_SIZE, STDIN, cannot_read
from ._output import Output, while_read
from ._progress import Progress

CHUNK: Final = 2**16
"""Bytes read at once, and so the size of an item: a field of this size is sent whole."""


async def write_items(
    session: Session,
    fields: list[bytes],
    encode: Callable[[list[bytes]], bytes],
    out: Output,
    sending: Callable[[Channel], AbstractAsyncContextManager[None]],
) -> list[bytes]:
    """Make a request with a channel, write its items as they arrive, and return its answer.

    Arguments:
        session: the session of the command.
        fields: the fields of the request.
        encode: encodes an item for the output.
        out: the output.
        sending: a block that sends items meanwhile.
    """
    progress = Progress(out, is_seen=out.is_terminal)
    async with while_read(), session.connection.open_channel(fields) as channel, sending(channel):
        try:
            async for item in channel:
                data = encode(item)
                await out.item(data)
                progress.add(len(data))
        except trio.BrokenResourceError as exc:
            raise find_answer(exc) from None
        finally:
            progress.end()
        return await channel.answer()


@asynccontextmanager
async def send_nothing(channel: Channel) -> AsyncGenerator[None]:
    """End the direction of this side at once."""
    await channel.end()
    yield


def find_answer(error: trio.BrokenResourceError) -> Exception:
    """Return the error answer that a channel broke by; if there is none, the error itself."""
    return error.__cause__ if isinstance(error.__cause__, RemoteError) else error


async def read_chunks(path: str, out: Output) -> AsyncGenerator[bytes]:
    """Yield the bytes of a file, or of the standard input if the path is ``-``, as they arrive.

    Raises:
        CommandError: the file cannot be read.
    """
    try:
        fd = 0 if path == STDIN else os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as exc:
        raise cannot_read(path, exc) from exc
    progress = Progress(out, os.fstat(fd).st_size)
    try:
        # A pipe or a terminal may be silent for as long as it likes.
        while chunk := await trio.to_thread.run_sync(os.read, fd, CHUNK, abandon_on_cancel=True):
            yield chunk
            progress.add(len(chunk))
    except OSError as exc:
        raise cannot_read(path, exc) from exc
    finally:
        progress.end()
        if fd:
            os.close(fd)


async def split_lines(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the lines of some chunks without their newlines. The last line may have none.

    Raises:
        CommandError: a line is too large for any message.
    """
    pieces: list[bytes] = []  # of a line that has not ended
    size = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            pieces.append(chunk)
            size += len(chunk)
            if b"\n" in chunk:
                *lines, rest = b"".join(pieces).split(b"\n")
                for line in lines:
                    yield line
                pieces, size = [rest], len(rest)
            elif size > MAX_SIZE:
                raise CommandError(f"a line has more than {MAX_SIZE} bytes", Exit.BAD_ARGUMENTS)
    if size:
        yield b"".join(pieces)


async def give(items: list[Any]) -> AsyncGenerator[Any]:
    """Yield the items of a list."""
    for item in items:
        yield item
