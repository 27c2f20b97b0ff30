"""Streams of arguments and of results: a channel carries their items."""

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
    """Receives the items of a stream over a channel.

    Arguments:
        channel: the channel.
        decode: decodes an item.
        explain: makes an exception of an error answer.
        is_shared: whether the channel stays open when this is closed, because this side still sends over it.
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
            raise self._explain(exc.__cause__)  # noqa: B904  (its cause is set already)
        return self._decode(fields)

    async def _receive_shared(self) -> list[bytes]:
        """Receive an item, or raise if this is closed meanwhile. The channel stays open."""
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
        """Receive no more items."""
        if not self._is_shared:
            await self._channel.aclose()
            return
        self._is_closed = True
        for scope in self._waiting:
            scope.cancel()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def pump(source: AsyncIterable[Any], channel: Channel, coder: ValueCoder) -> AsyncGenerator[None]:
    """Send the items of an async iterable during a block. An exception of the iterable ends the block."""
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
        # The group holds the errors of the block and of the task above. If one of these is a group itself, it
        # was raised like that, and stays one.
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
                return  # the call has its answer, or an error that explains why not
        await channel.end()
    finally:
        # If the call is cancelled, the iterator is still closed, so that a generator leaves its blocks.
        if isinstance(iterator, _Closeable):
            await iterator.aclose()


async def send_results(source: Any, channel: Channel, coder: ValueCoder, path: str) -> None:
    """Send the results of a method: of an async generator, or of a block with an async iterable."""
    if isinstance(source, AsyncGenerator):
        await _send_generated(cast("AsyncGenerator[Any]", source), channel, coder)
    elif hasattr(source, "__aenter__"):
        async with source as items:
            async for item in items:
                await channel.send([coder.encode(item)])
    else:
        raise TypeError(f"{path} returned {type(source).__qualname__}, which is not a stream")


async def _send_generated(generator: AsyncGenerator[Any], channel: Channel, coder: ValueCoder) -> None:
    """Send the items of a generator. If sending fails, raise the error inside the generator, at its yield.

    The generator may have a cancel scope or a nursery open there. Sending runs inside that scope, so its
    error belongs there.
    """
    async with aclosing(generator):
        step: Callable[[], Any] = generator.__anext__
        while True:
            try:
                item = await step()
            except StopAsyncIteration:
                return
            finally:
                step = generator.__anext__  # an error that it threw refers to this frame
            try:
                await channel.send([coder.encode(item)])
            except BaseException as exc:  # noqa: BLE001  (the generator raises it on)
                step = partial(generator.athrow, exc)
