"""Streams of arguments and of results: items of a channel, as values."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast, final, runtime_checkable

import trio

from bokbok_trio import RemoteError

from ._coding import ValueCoder

if TYPE_CHECKING:
    from bokbok_trio import Channel


@runtime_checkable
class _Closeable(Protocol):
    async def aclose(self) -> None: ...


@final
class Items(trio.abc.ReceiveChannel[Any]):
    """The items that come over a channel.

    Arguments:
        decode: an item.
        explain: makes the exception to raise of an error that the other side answered.
        is_shared: this side goes on to send over the channel when this is closed.
    """

    def __init__(
        self,
        channel: Channel,
        decode: Callable[[list[bytes]], Any],
        explain: Callable[[RemoteError], Exception],
        *,
        is_shared: bool = False,
    ) -> None:
        self._channel = channel
        self._decode = decode
        self._explain = explain
        self._is_shared = is_shared
        self._is_closed = False
        self._waiting: set[trio.CancelScope] = set()

    async def receive(self) -> Any:
        """Receive an item; see `trio.abc.ReceiveChannel.receive`."""
        try:
            fields = await (self._receive_shared() if self._is_shared else self._channel.receive())
        except trio.BrokenResourceError as exc:
            if not isinstance(exc.__cause__, RemoteError):
                raise
            raise self._explain(exc.__cause__)  # noqa: B904  (it says itself what its cause is)
        return self._decode(fields)

    async def _receive_shared(self) -> list[bytes]:
        """Receive an item, unless this is closed meanwhile: the channel is not."""
        if not self._is_closed:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    return await self._channel.receive()
                finally:
                    self._waiting.remove(scope)
        await trio.lowlevel.checkpoint()
        raise trio.ClosedResourceError("this side closed the stream")

    async def aclose(self) -> None:
        """Take no more items."""
        if not self._is_shared:
            await self._channel.aclose()
            return
        self._is_closed = True
        for scope in self._waiting:
            scope.cancel()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def pump(source: AsyncIterable[Any], channel: Channel, coder: ValueCoder) -> AsyncGenerator[None]:
    """Send what an async iterable yields, during a block; what it raises ends the block and comes out."""
    failure: Exception | None = None

    async def run() -> None:
        nonlocal failure
        try:
            await _send_arguments(source, channel, coder)
        except Exception as exc:  # noqa: BLE001  (raised below)
            failure = exc
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Of the block and of the task above. What is a group itself is somebody else's, and stays one.
        errors = [each for each in group.exceptions if not isinstance(each, trio.Cancelled)]
        if len(errors) > 1:
            raise
        error = (errors or group.exceptions)[0]
        try:
            raise error from error.__cause__
        finally:
            del error, errors  # or this frame and the error would keep each other alive
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # or this frame and its traceback would keep each other alive


async def _send_arguments(source: AsyncIterable[Any], channel: Channel, coder: ValueCoder) -> None:
    iterator = aiter(source)
    try:
        while True:
            try:
                item = await anext(iterator)
            except StopAsyncIteration:
                break
            data = coder.encode(item)
            try:
                await channel.send([data])
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the answer is there, or why there is none
        await channel.end()
    finally:
        # Cancelled with the call, it still ends the iterator, as the block of a generator is left.
        if isinstance(iterator, _Closeable):
            await iterator.aclose()


async def send_results(source: Any, channel: Channel, coder: ValueCoder, path: str) -> None:
    """Send what a method yields: an async generator, or a block with an async iterable."""
    if isinstance(source, AsyncGenerator):
        await _send_generated(cast("AsyncGenerator[Any]", source), channel, coder)
    elif hasattr(source, "__aenter__"):
        async with source as items:
            async for item in items:
                await channel.send([coder.encode(item)])
    else:
        raise TypeError(f"{path} returned {type(source).__qualname__}, which is no stream")


async def _send_generated(generator: AsyncGenerator[Any], channel: Channel, coder: ValueCoder) -> None:
    """Send what a generator yields. What goes wrong meanwhile is raised in it, where it yielded.

    For it may have a cancel scope or a nursery open there, which sending then runs in.
    """
    async with aclosing(generator):
        step: Callable[[], Any] = generator.__anext__
        while True:
            try:
                item = await step()
            except StopAsyncIteration:
                return
            step = generator.__anext__
            try:
                await channel.send([coder.encode(item)])
            except BaseException as exc:  # noqa: BLE001  (the generator raises it on)
                step = partial(generator.athrow, exc)
