"""`Broadcast`: one message to many subscribers, where a slow one does not hold up the others.

::

    news = Broadcast[list[str]](when_full="drop-oldest")

    async def channel_handler(connection, request, channel):    # one for each subscriber
        await news.forward(channel)

    news.publish(["hello, all"])                                # to all of them

Theory
======

Each subscriber has a queue of bounded length, and publishing never waits. So if a queue is full, something
must be dropped, and the owner chooses: the oldest message, which is counted, or the subscriber. All queues
share one object for a message, which must not be changed any more. So a slow subscriber costs only
references, and the memory of messages that live longer.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, Generic, Literal, Protocol, Self, TypeAlias, TypeVar, final

import trio

from ._errors import RequestError

__all__ = ["Broadcast", "Subscription", "WhenFull"]

DEFAULT_LENGTH: Final = 100
"""Messages that may wait for a subscriber."""

_T = TypeVar("_T")
_T_contra = TypeVar("_T_contra", contravariant=True)

WhenFull: TypeAlias = Literal["drop-oldest", "close"]
"""What is dropped if the queue of a subscriber is full: its oldest message, or the subscriber."""


class _Sends(Protocol[_T_contra]):
    """An object that messages are forwarded to, such as a channel."""

    async def send(self, value: _T_contra, /) -> None: ...


@final
class Subscription(Generic[_T]):
    """The messages for one subscriber. `Broadcast.subscribe` makes it.

    ``async for`` ends when the broadcast is closed and all earlier messages were received.

    Attributes:
        dropped: how many messages were dropped because the subscriber was too slow.
    """

    def __init__(self, length: int) -> None:
        self.dropped = 0
        self._send, self._receive = trio.open_memory_channel[_T](length)
        self._scope = trio.CancelScope()

    async def receive(self) -> _T:
        """Receive the next message. No message is lost if the call is cancelled.

        Raises:
            trio.EndOfChannel: the broadcast was closed, and there are no more messages.
            trio.ClosedResourceError: the block of the subscription was left.
        """
        return await self._receive.receive()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


@final
class Broadcast(Generic[_T]):
    """Messages for all subscribers, each of which takes them at its own pace.

    It belongs to the Trio run of its subscribers: publish from that run.

    Arguments:
        when_full: what is dropped if the queue of a subscriber is full. ``"drop-oldest"``: its oldest
            message, which `Subscription.dropped` counts. ``"close"``: the subscriber. Its block is cancelled,
            with whatever it waits for, such as a send to its peer, and raises `RequestError` with the code
            ``"too-slow"``, which a handler can let pass as its answer.
        length: messages that may wait for each subscriber, 1 or more.

    Raises:
        TypeError: `length` is not an int, such as `math.inf`, which would be no bound.
        ValueError: `when_full` is neither, or `length` is less than 1.
    """

    def __init__(self, *, when_full: WhenFull, length: int = DEFAULT_LENGTH) -> None:
        if when_full not in {"drop-oldest", "close"}:
            raise ValueError(f"when_full must be 'drop-oldest' or 'close', not {when_full!r}")
        if not isinstance(length, int):
            raise TypeError(f"length must be an int, not {length!r}: a queue has a bound")
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self._when_full = when_full
        self._length = length
        self._is_closed = False
        self._subscriptions: dict[Subscription[_T], None] = {}

    def __len__(self) -> int:
        """Return the number of subscribers."""
        return len(self._subscriptions)

    def publish(self, message: _T) -> None:
        """Give a message to all subscribers. Returns at once.

        Raises:
            trio.ClosedResourceError: the broadcast was closed.
        """
        if self._is_closed:
            raise trio.ClosedResourceError("this broadcast was closed")
        for subscription in list(self._subscriptions):
            try:
                subscription._send.send_nowait(message)
            except trio.WouldBlock:
                if self._when_full == "close":
                    del self._subscriptions[subscription]
                    subscription._scope.cancel()
                else:
                    subscription._receive.receive_nowait()
                    subscription.dropped += 1
                    subscription._send.send_nowait(message)

    @contextmanager
    def subscribe(self) -> Generator[Subscription[_T]]:
        """Receive the messages that are published from now on, as long as the block lasts.

        ::

            with news.subscribe() as messages:
                async for message in messages:
                    await channel.send(message)

        Raises:
            RequestError: code ``"too-slow"``: the queue was full, and `when_full` is ``"close"``.
        """
        subscription = Subscription[_T](self._length)
        if self._is_closed:
            subscription._send.close()
        else:
            self._subscriptions[subscription] = None
        try:
            with subscription._scope:
                yield subscription
        finally:
            self._subscriptions.pop(subscription, None)
            subscription._receive.close()
            subscription._send.close()
        if subscription._scope.cancelled_caught:
            raise RequestError(
                f"this subscriber is too slow: {self._length} messages wait for it", code="too-slow"
            )

    async def forward(self, channel: _Sends[_T]) -> None:
        """Subscribe, and send every message to a channel, until the broadcast is closed.

        Raises:
            RequestError: code ``"too-slow"``: the queue was full, and `when_full` is ``"close"``.
            Exception: any error of the channel.
        """
        with self.subscribe() as messages:
            async for message in messages:
                await channel.send(message)

    def close(self) -> None:
        """End all subscriptions once their messages were received. A second call does nothing."""
        self._is_closed = True
        for subscription in self._subscriptions:
            subscription._send.close()
