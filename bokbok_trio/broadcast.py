"""`Broadcast`: one message to many subscribers, none of whom can keep the others waiting.

::

    news = Broadcast[list[str]](when_full="drop-oldest")

    async def channel_handler(connection, request, channel):    # one for each subscriber
        await news.forward(channel)

    news.publish(["hello, all"])                                # to all of them, at once

Theory
======

Each subscriber has a queue of its own, of bounded length, and publishing waits for nobody. So where a queue
is full something must give way, and the owner says what: the oldest message, which is counted, or the
subscriber. A message is one object in all queues, not to be changed any more: what a slow subscriber costs is
references, and that messages live longer.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, Generic, Literal, Protocol, Self, TypeAlias, TypeVar, final

import trio

from ._errors import RequestError

__all__ = ["Broadcast", "Subscription", "WhenFull"]

DEFAULT_LENGTH: Final = 100
"""Messages that wait for a subscriber at most."""

_T = TypeVar("_T")
_T_contra = TypeVar("_T_contra", contravariant=True)

WhenFull: TypeAlias = Literal["drop-oldest", "close"]
"""What gives way where the queue of a subscriber is full: its oldest message, or the subscriber."""


class _Sends(Protocol[_T_contra]):
    """What messages are forwarded to, such as a channel."""

    async def send(self, value: _T_contra, /) -> None: ...


@final
class Subscription(Generic[_T]):
    """The messages for one subscriber, from `Broadcast.subscribe`.

    ``async for`` ends when the broadcast has been closed, and what was published before has been received.

    Attributes:
        dropped: how many messages it has missed, because it was too slow.
    """

    def __init__(self, length: int) -> None:
        self.dropped = 0
        self._send, self._receive = trio.open_memory_channel[_T](length)
        self._scope = trio.CancelScope()

    async def receive(self) -> _T:
        """Receive the next message. Cancelled, it loses none.

        Raises:
            trio.EndOfChannel: there will be none.
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
    """Messages for all who have subscribed, each of whom takes them at its own pace.

    It belongs to the Trio run of its subscribers: publish from there.

    Arguments:
        when_full: what gives way for a subscriber whose queue is full. ``"drop-oldest"``: its oldest message,
            which `Subscription.dropped` counts. ``"close"``: the subscriber; what its block waits for, such
            as a send to its peer, is cancelled, and the block raises `RequestError`, code ``"too-slow"``,
            which is a handler's answer.
        length: messages that wait for each subscriber at most.

    Raises:
        ValueError: `when_full` is neither, or `length` is under 1.
    """

    def __init__(self, *, when_full: WhenFull, length: int = DEFAULT_LENGTH) -> None:
        if when_full not in {"drop-oldest", "close"}:
            raise ValueError(f"when_full must be 'drop-oldest' or 'close', not {when_full!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self._when_full = when_full
        self._length = length
        self._is_closed = False
        self._subscriptions: dict[Subscription[_T], None] = {}

    def __len__(self) -> int:
        """How many subscribers there are."""
        return len(self._subscriptions)

    def publish(self, message: _T) -> None:
        """Give a message to all subscribers. Returns at once.

        Raises:
            trio.ClosedResourceError: it was closed.
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
        """Receive what is published from now on, as long as the block lasts.

        ::

            with news.subscribe() as messages:
                async for message in messages:
                    await channel.send(message)

        Raises:
            RequestError: code ``"too-slow"``, by the policy ``"close"``.
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
            RequestError: code ``"too-slow"``, by the policy ``"close"``.
            Exception: what the channel raises.
        """
        with self.subscribe() as messages:
            async for message in messages:
                await channel.send(message)

    def close(self) -> None:
        """Let all subscriptions end, once what was published has been received. Again it does nothing."""
        self._is_closed = True
        for subscription in self._subscriptions:
            subscription._send.close()
