"""`Channel`: a Trio channel of lists of fields, over a connection.

Theory
======

The session's `FlowControl` counts credit; this file has the tasks that wait. An item is queued or handed over
at the same moment as its waiter is woken, as in Trio's memory channels. So tasks are served in turn, and a
cancelled `send` or `receive` has done all of its work or none of it.

Small items that no task waits for are kept encoded, as they were received: lists of fields would take up a
multiple of the window.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, final

import trio

from .._errors import RemoteError
from .._protocol.events import End, Item
from .._protocol.flow_control import FlowControl
from .._protocol.packets import Chunks, decode_body
from .._trio_util import check_cancelled, check_run
from .._types import Fields
from .calls import Call

if TYPE_CHECKING:
    from ..instruments import Direction

OnItem: TypeAlias = "Callable[[int, Direction, int], object]"
"""Told of an item: the id of its channel, its direction, its size in bytes."""

OVER_BUDGET: Final = (
    "items that nobody received take up too many bytes of this connection; receive them faster, take more of "
    "them at once, or raise Settings.budget"
)


@final
class _Waiter:
    """A task in `send`, `receive` or `answer`.

    Attributes:
        item: the encoded item to send, and its size in bytes.
        fields: the item that was received.
        done: whether the item was sent or received, or the answer is here.
    """

    __slots__ = ("done", "fields", "item", "task")

    def __init__(self, item: tuple[Chunks, int] = ([], 0)) -> None:
        self.task = trio.lowlevel.current_task()
        self.item = item
        self.fields: list[bytes] = []
        self.done = False


async def _sleep(waiters: dict[_Waiter, None], waiter: _Waiter) -> None:
    """Sleep as one of `waiters` until woken, with the item done or not."""

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        del waiters[waiter]
        return trio.lowlevel.Abort.SUCCEEDED

    waiters[waiter] = None
    await trio.lowlevel.wait_task_rescheduled(abort)


def _wake_first(waiters: dict[_Waiter, None]) -> _Waiter:
    waiter = next(iter(waiters))
    del waiters[waiter]
    trio.lowlevel.reschedule(waiter.task)
    return waiter


def _wake_all(waiters: dict[_Waiter, None]) -> None:
    while waiters:
        _wake_first(waiters)


@final
class Channel(trio.abc.Channel[list[bytes]]):
    """Sends and receives items, as part of a request. `Connection.open_channel` makes it, and a channel
    handler gets one.

    An item is a list of fields, as a request is. Several tasks may send at once, and several may receive;
    each item goes to one of them, and they are served in turn. A cancelled call loses no item and repeats
    none. Items that have arrived and that nobody has received are bounded by 256 KiB and one item more; each
    counts its encoded size and 64 bytes. Beyond that the other side's `send` waits.
    ``async for item in channel`` ends when the other side has ended its direction, or has answered.

    On the handler's side the channel is closed when the handler returns. The items that it sent before arrive
    before its answer.
    """

    def __init__(
        self,
        flows: FlowControl,
        id: int,
        packet_queued: Callable[[], object],
        home: trio.lowlevel.TrioToken,
        *,
        call: Call | None = None,
        cancel: Callable[[], object] | None = None,
        on_item: OnItem | None = None,
    ) -> None:
        self._flow_control = flows
        self._id = id
        self._packet_queued = packet_queued
        self._home = home
        self._call = call  # None on the handler's side, as `cancel` is
        self._cancel = cancel
        self._on_item_passed = on_item
        self._senders: dict[_Waiter, None] = {}
        self._receivers: dict[_Waiter, None] = {}
        self._askers: dict[_Waiter, None] = {}
        self._buffer: deque[bytes | tuple[int, list[bytes]]] = deque()
        self._is_closed = False
        self._has_ended = False
        self._peer_has_ended = False
        self._broken: Exception | None = None  # why nothing can be sent or arrive any more
        self._lost: Exception | None = None  # why an item was dropped
        self._answer_told = False
        self._has_given_up = False  # on the answer
        if call is not None:
            call.on_settled = self._on_settled

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open" if self._broken is None else "broken"
        return f"<bokbok_trio.Channel {self._id} {state}>"

    # ---- methods ----

    @trio.lowlevel.enable_ki_protection
    async def send(self, value: Fields) -> None:
        """Send an item, as soon as the other side has room and the items before it are on their way.

        It returns before the item has arrived.

        Arguments:
            value: 0 to 255 fields of bytes or str (sent as UTF-8).

        Raises:
            TypeError, ValueError: `value` cannot be sent.
            MessageTooLarge: the item is larger than the two sides agreed on.
            trio.ClosedResourceError: this side called `end` or `aclose`, or closed the connection.
            trio.BrokenResourceError: the peer's handler has answered, or the peer cancelled the
                channel. If the handler answered with an error, that is the cause.
            ConnectionLost: the connection was lost; this is a `trio.BrokenResourceError` too.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        await check_cancelled()
        waiter = _Waiter(self._flow_control.encode(value))
        if not self._senders and self._send_error() is None and self._flow_control.may_send(self._id):
            self._put(waiter)
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(self._senders, waiter, self._send_error)

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> list[bytes]:
        """Receive an item.

        Raises:
            trio.EndOfChannel: the other side has ended its direction, or answered, and all of its
                items have been received.
            trio.ClosedResourceError: this side called `aclose`, or closed the connection before the
                answer came.
            trio.BrokenResourceError: before the other side ended its direction, it cancelled the channel,
                or answered with an error, which is the cause. Or items that nobody received took up too
                much of `Settings.budget`.
            ConnectionLost: the connection was lost; this is a `trio.BrokenResourceError` too.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        await check_cancelled()
        if self._buffer:
            fields = self._take_buffered()
            await trio.lowlevel.cancel_shielded_checkpoint()
            return fields
        waiter = _Waiter()
        await self._wait(self._receivers, waiter, self._receive_error)
        return waiter.fields

    @trio.lowlevel.enable_ki_protection
    async def end(self) -> None:
        """Send no more items. Receiving goes on. Tasks that wait in `send` get `trio.ClosedResourceError`.

        A second call, or one after the channel was closed, does nothing.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        await trio.lowlevel.checkpoint()
        if not self._has_ended:
            self._has_ended = True
            _wake_all(self._senders)
            self._flow_control.end(self._id)
            self._packet_queued()

    @trio.lowlevel.enable_ki_protection
    async def answer(self) -> list[bytes]:
        """Wait for the answer of the peer's handler. A second call gives the same answer.

        Items that nobody receives may block that handler: receive them first, or at the same time.

        Returns:
            The fields of the answer.

        Raises:
            RemoteError: the handler answered with an error.
            ConnectionLost, ConnectionClosed: as for `Connection.request`.
            trio.ClosedResourceError: the channel was closed here before the answer came.
            RuntimeError: called on the handler's side, which gives the answer, or from another Trio run.
        """
        check_run(self._home, self)
        call = self._call
        if call is None:
            raise RuntimeError("a handler gives the answer, and does not wait for it")
        if isinstance(call.outcome, list):
            await trio.lowlevel.checkpoint()
        else:
            await self._wait(self._askers, _Waiter(), self._answer_error)
        self._answer_told = True
        assert isinstance(call.outcome, list)
        return list(call.outcome)

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close both directions. Items that have arrived and were not received are dropped, and so are later
        ones.

        On the side that opened the channel, this cancels the peer's handler unless its answer came. On
        the handler's side, the handler goes on, and must still answer.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        self._close()
        await trio.lowlevel.checkpoint()

    # ---- errors ----

    def _send_error(self) -> Exception | None:
        if self._has_ended:
            return trio.ClosedResourceError("this side ended or closed the channel")
        return self._unless_embargoed(self._broken)

    def _receive_error(self) -> Exception | None:
        """Return the reason why nothing can be received, if nothing is buffered."""
        if self._is_closed:
            return trio.ClosedResourceError("this side closed the channel")
        if self._lost is not None:
            return self._lost
        if self._peer_has_ended:
            return trio.EndOfChannel()
        return self._unless_embargoed(self._broken)

    def _answer_error(self) -> Exception | None:
        assert self._call is not None
        outcome = self._call.outcome
        assert not isinstance(outcome, list)
        error = self._unless_embargoed(outcome)
        if error is None and self._has_given_up:
            return trio.ClosedResourceError("this side closed the channel before its answer came")
        return error

    @property
    def _embargo(self) -> float | None:
        return None if self._call is None else self._call.embargo

    def _unless_embargoed(self, error: Exception | None) -> Exception | None:
        return None if self._embargo is not None and trio.current_time() < self._embargo else error

    async def _wait(
        self, waiters: dict[_Waiter, None], waiter: _Waiter, find_error: Callable[[], Exception | None]
    ) -> None:
        """Sleep among others until `waiter` is done, or raise the reason why it cannot be."""
        while not waiter.done:
            error = find_error()
            if error is not None:
                self._answer_told = self._answer_told or waiters is self._askers
                await trio.lowlevel.checkpoint()
                try:
                    # Raise a copy: an error that is raised again and again collects frames.
                    raise copy.copy(error) from error.__cause__
                finally:
                    del error  # or this frame and its traceback would keep each other alive
            if self._embargo is None:
                await _sleep(waiters, waiter)
            else:
                with trio.move_on_at(self._embargo):
                    await _sleep(waiters, waiter)

    # ---- for the connection ----

    def _on_settled(self) -> None:
        """The request has its outcome: its answer came, or none will come."""
        assert self._call is not None
        self._call.on_settled = None
        outcome = self._call.outcome
        assert outcome is not None
        if isinstance(outcome, list):
            self._peer_has_ended = True
            for asker in self._askers:
                asker.done = True
            self._break(trio.BrokenResourceError("the peer's handler has answered"))
        elif isinstance(outcome, RemoteError):
            error = trio.BrokenResourceError(f"the peer's handler has answered with an error: {outcome}")
            error.__cause__ = outcome
            self._break(error)
        else:
            self._break(outcome)

    def _break(self, error: Exception) -> None:
        """Note that nothing can be sent or arrive any more, and wake all tasks that wait."""
        if self._broken is None:
            self._broken = error
            if isinstance(error, trio.ClosedResourceError):
                self._drop_buffer()  # this side closed the connection, and receives nothing more
            _wake_all(self._senders)
            _wake_all(self._receivers)
            _wake_all(self._askers)

    def _on_event(self, event: Item | End) -> None:
        if isinstance(event, Item):
            self._on_item(event)
        else:
            self._peer_has_ended = True
            _wake_all(self._receivers)

    def _on_item(self, item: Item) -> None:
        if self._receivers:
            waiter = _wake_first(self._receivers)
            waiter.fields = item.fields
            waiter.done = True
        elif self._broken is not None:
            return  # the other side has cancelled
        elif not self._is_closed:
            if self._flow_control.hold(item.size):
                self._buffer.append((item.size, item.fields) if item.body is None else item.body)
            else:
                self._lost = trio.BrokenResourceError(OVER_BUDGET)
                self._break(self._lost)
            return
        self._consume(item.size)

    def _on_writable(self) -> None:
        while self._senders and self._flow_control.may_send(self._id):
            self._put(_wake_first(self._senders))

    def _put(self, waiter: _Waiter) -> None:
        self._flow_control.send(self._id, *waiter.item)
        if self._on_item_passed is not None:
            self._on_item_passed(self._id, "out", waiter.item[1])
        waiter.done = True
        self._packet_queued()

    def _take_buffered(self) -> list[bytes]:
        item = self._buffer.popleft()
        size, fields = (len(item), decode_body(item)) if isinstance(item, bytes) else item
        self._flow_control.release(size)
        self._consume(size)
        return fields

    def _consume(self, size: int) -> None:
        if self._flow_control.consume(self._id, size):
            self._packet_queued()

    async def _finish(self) -> None:
        """Leave the block, which raised nothing."""
        if self._has_ended and not self._is_closed and not self._answer_told:
            self._stop_receiving()
            await self.answer()
        else:
            await trio.lowlevel.checkpoint()

    def _close(self, *, answered: bool = False) -> None:
        """Close both directions. `answered`: the handler's answer follows next."""
        was_ended, self._has_ended = self._has_ended, True
        _wake_all(self._senders)
        if self._cancel is not None:
            self._cancel()
            self._has_given_up = True
            _wake_all(self._askers)
        elif not was_ended and not answered:
            self._flow_control.end(self._id)
            self._packet_queued()
        if self._cancel is not None or answered:
            self._drop_buffer()  # nobody waits for credit
        self._stop_receiving()

    def _drop_buffer(self) -> None:
        for item in self._buffer:
            self._flow_control.release(len(item) if isinstance(item, bytes) else item[0])
        self._buffer.clear()

    def _stop_receiving(self) -> None:
        """Drop present and later items as if they were received, so that the other side does not wait."""
        self._is_closed = True
        _wake_all(self._receivers)
        while self._buffer:
            self._take_buffered()


@final
class Channels:
    """The channels of a connection that this side uses, whichever side opened them.

    Arguments:
        flows: has their credit.
        packet_queued: `Sender.packet_queued`.
        on_item: called with the id, the direction and the size of each item; None if there are no
            instruments.
    """

    __slots__ = ("_channels", "_flow_control", "_home", "_on_item", "_packet_queued")

    def __init__(
        self, flows: FlowControl, packet_queued: Callable[[], object], on_item: OnItem | None = None
    ) -> None:
        self._home = trio.lowlevel.current_trio_token()
        self._flow_control = flows
        self._packet_queued = packet_queued
        self._on_item = on_item
        self._channels: dict[int, Channel] = {}

    def __len__(self) -> int:
        return len(self._channels)

    def open(self, call: Call, cancel: Callable[[], object]) -> Channel:
        """Add a channel that this side opened. `cancel` is called when it is closed."""
        channel = self._channels[call.id] = Channel(
            self._flow_control,
            call.id,
            self._packet_queued,
            self._home,
            call=call,
            cancel=cancel,
            on_item=self._on_item,
        )
        return channel

    def take(self, id: int) -> Channel:
        """Add a channel that the peer opened. The peer may send from now on."""
        channel = self._channels[id] = Channel(
            self._flow_control, id, self._packet_queued, self._home, on_item=self._on_item
        )
        self._flow_control.accept(id)
        return channel

    def remove(self, id: int) -> None:
        """Forget a channel: nobody here uses it any more."""
        del self._channels[id]

    def on_event(self, event: Item | End) -> None:
        """Give an item, or the end, to its channel.

        If the handler has ended, it is dropped: items may arrive until the peer has the answer.
        """
        if event.id in self._channels:
            if self._on_item is not None and isinstance(event, Item):
                self._on_item(event.id, "in", event.size)
            self._channels[event.id]._on_event(event)

    def on_cancel(self, id: int) -> None:
        """The peer has cancelled one of its requests. Break its channel, if it has one."""
        if id in self._channels:
            self._channels[id]._break(trio.BrokenResourceError("the other side has cancelled it"))

    def wake_writers(self) -> None:
        """Let channels queue items, if the peer has granted credit or items have left."""
        for id in self._flow_control.take_writable():
            if id in self._channels:
                self._channels[id]._on_writable()

    def break_all(self, error: Exception) -> None:
        """Break all channels, because the connection is over."""
        for channel in self._channels.values():
            channel._break(error)
