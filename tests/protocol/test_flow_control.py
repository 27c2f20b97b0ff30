from __future__ import annotations

from itertools import groupby

import pytest

from bokbok_trio import MessageTooLarge, ProtocolError
from bokbok_trio._protocol.flow_control import (
    ITEM_COST,
    ITEM_OVERHEAD,
    MAX_CREDIT,
    MAX_QUEUED,
    WINDOW,
    ChannelCredit,
    FlowControl,
)
from bokbok_trio._protocol.outbox import QUANTUM, Outbox
from bokbok_trio._protocol.packets import PacketDecoder
from bokbok_trio._protocol.queued_packet import QueuedPacket
from tests.support.helpers import decode


def make_flow(send_credit: int = 0, receive_credit: int = 0) -> ChannelCredit:
    return ChannelCredit(send_credit=send_credit, receive_credit=receive_credit, started=True)


class Ends:
    """Two ends of flow control, and the items that leave."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.flow_control = FlowControl(self.outbox, 2**20, 2**30, lambda: 0)

    def take(self) -> list[list[bytes]]:
        chunks, _, items = self.outbox.take(0)
        for id, size in items:
            self.flow_control.item_departed(id, size)
        return decode(PacketDecoder(2**20), b"".join(chunks))

    def send(self, id: int, size: int) -> None:
        self.flow_control.send(id, *self.flow_control.encode([bytes(size - 5)]))


# ---- one flow ----


def test_an_item_may_start_while_some_credit_is_left() -> None:
    flow = make_flow(send_credit=10 + ITEM_COST)
    flow.send(9)
    assert flow.may_send
    flow.send(1000)
    assert not flow.may_send
    flow.add_credit(999 + ITEM_COST)
    assert not flow.may_send, "none is left"
    flow.add_credit(1)
    assert flow.may_send


def test_the_receiver_counts_as_the_sender_does() -> None:
    flow = make_flow(receive_credit=10 + ITEM_COST)
    flow.receive(9)
    flow.receive(1000)
    with pytest.raises(ProtocolError, match="`item` without credit"):
        flow.receive(1)


def test_without_any_credit_nothing_may_start() -> None:
    assert not make_flow().may_send
    with pytest.raises(ProtocolError, match="without credit"):
        make_flow().receive(1)


def test_what_waits_to_leave_is_bounded_whatever_the_credit() -> None:
    flow = make_flow(send_credit=MAX_CREDIT)
    flow.send(MAX_QUEUED - ITEM_OVERHEAD - 1)
    assert flow.may_send
    flow.send(1)
    assert not flow.may_send


def test_the_smallest_items_that_wait_are_bounded_too() -> None:
    flow = make_flow(send_credit=MAX_CREDIT)
    sent = 0
    while flow.may_send:
        flow.send(1)
        sent += 1
    assert sent <= MAX_QUEUED / ITEM_OVERHEAD
    for _ in range(sent):
        flow.item_departed(1)
    assert flow.queued == 0


def test_too_much_credit_is_an_error() -> None:
    flow = make_flow(send_credit=MAX_CREDIT)
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        flow.add_credit(1)
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        make_flow(send_credit=MAX_CREDIT + 1)


def test_nothing_comes_after_the_end() -> None:
    flow = make_flow(receive_credit=10)
    flow.receive_end()
    with pytest.raises(ProtocolError, match="`item` after `end`"):
        flow.receive(1)
    with pytest.raises(ProtocolError, match="`end` sent twice"):
        flow.receive_end()


def test_credit_is_granted_by_half_windows_and_none_is_forgotten() -> None:
    flow = make_flow(receive_credit=WINDOW)
    assert flow.consume(WINDOW // 2 - 2 * ITEM_COST - 1) == 0
    assert flow.consume(1) == WINDOW // 2, "an item counts as more than its body"
    assert flow.consume(1) == 0
    assert flow.consume(WINDOW) == WINDOW + 1 + 2 * ITEM_COST
    flow.receive_end()
    assert flow.consume(WINDOW) == 0, "nobody needs it"


# ---- all of them ----


def test_credit_goes_first_in_one_packet_and_the_end_last() -> None:
    ends = Ends()
    ends.flow_control.add_remote(0, WINDOW)
    ends.flow_control.accept(0)
    ends.send(0, 10)
    ends.flow_control.grant(0, 7)
    ends.flow_control.end(0)
    ends.flow_control.end(0)
    sent = ends.take()
    assert [packet[:1] + packet[2:] for packet in sent] == [
        [b"credit", b"%d" % (WINDOW + 7)],
        [b"item", b"\x01\x00\x00\x00\x05" + bytes(5)],
        [b"end"],
    ]
    assert {packet[1] for packet in sent} == {b"0"}


def test_credit_goes_before_the_items_of_others() -> None:
    ends = Ends()
    ends.flow_control.add_remote(0, WINDOW)
    ends.flow_control.add_remote(2, 0)
    ends.send(0, 10)
    ends.flow_control.grant(2, 7)
    assert [packet[:2] for packet in ends.take()] == [[b"credit", b"2"], [b"item", b"0"]]


def test_an_end_waits_for_the_beginning() -> None:
    ends = Ends()
    ends.flow_control.add_local(0)
    ends.flow_control.end(0)
    assert ends.take() == []
    ends.flow_control.start(0)
    assert ends.take() == [[b"end", b"0"]]
    ends.flow_control.add_local(2)
    ends.flow_control.start(2)
    assert ends.take() == []


def test_channels_take_turns() -> None:
    ends = Ends()
    for id, size in ((0, 10), (2, QUANTUM // 2), (4, MAX_QUEUED - 1000)):
        ends.flow_control.add_remote(id, WINDOW)
        while ends.flow_control.may_send(id):
            ends.send(id, size)
    taken = [int(packet[1]) for _ in range(9) for packet in ends.take()]
    turns = [(id, len(list(items))) for id, items in groupby(taken)]
    assert [id for id, _ in turns[:6]] == [0, 2, 4, 2, 4, 2], "the items of 0 take less than a turn"
    assert [count for _, count in turns[1:4]] == [2, 1, 2]


def test_a_channel_of_small_items_gets_as_much_as_one_of_large_ones() -> None:
    ends = Ends()
    for id in (0, 2, 4):
        ends.flow_control.add_remote(id, MAX_CREDIT)
    shares = {0: 0, 2: 0, 4: 0}
    for _ in range(200):
        for id, size in ((0, 1000), (2, MAX_QUEUED - 2000), (4, 20)):
            while ends.flow_control.may_send(id):
                ends.send(id, size)
        for packet in ends.take():
            shares[int(packet[1])] += len(packet[2])
    assert shares[0] > shares[2] / 5, "what may wait of it is a turn of 16 KiB, beside items of 62 KiB"
    assert shares[4] > 200 * 20, "more than an item for each batch"


def test_small_packets_go_between_the_items_of_many_channels() -> None:
    ends = Ends()
    for id in range(0, 40, 2):
        ends.flow_control.add_remote(id, MAX_CREDIT)
        ends.send(id, MAX_QUEUED - 2000)
    ends.outbox.put(QueuedPacket(b"ok", 100, body=[b"\0"], body_size=1))
    assert [b"ok", b"100", b"\0"] in ends.take()


def test_items_are_not_starved_by_small_packets() -> None:
    ends = Ends()
    ends.flow_control.add_remote(0, MAX_CREDIT)
    ends.send(0, 1000)
    for id in range(100, 1000, 2):
        ends.outbox.put(QueuedPacket(b"ok", id, body=[bytes(1000)], body_size=1000))
    assert b"item" in [packet[0] for packet in ends.take()]


def test_writers_are_told_when_credit_comes_and_when_items_have_left() -> None:
    ends = Ends()
    ends.flow_control.add_remote(0, 10)
    ends.flow_control.on_credit(0, 2**20)
    assert ends.flow_control.take_writable() == {0}
    assert ends.flow_control.take_writable() == set()
    ends.send(0, MAX_QUEUED)
    assert not ends.flow_control.may_send(0)
    while not ends.flow_control.may_send(0):
        assert ends.flow_control.take_writable() == set()
        assert ends.take()
    assert ends.flow_control.take_writable() == {0}
    ends.flow_control.on_credit(0, 1)
    ends.flow_control.remove(0)
    assert ends.flow_control.take_writable() == set()


def test_credit_that_is_not_enough_wakes_nobody() -> None:
    ends = Ends()
    ends.flow_control.add_remote(0, 10)
    ends.send(0, 100)
    ends.flow_control.on_credit(0, 90)
    ends.take()
    assert ends.flow_control.take_writable() == set()


def test_what_is_done_does_nothing() -> None:
    ends = Ends()
    assert not ends.flow_control.may_send(0)
    ends.flow_control.end(0)
    ends.flow_control.consume(0, WINDOW)
    ends.flow_control.item_departed(0, 10)
    ends.flow_control.start(0)
    ends.flow_control.remove(0)
    assert ends.take() == []


def test_an_item_has_the_limit_of_a_packet() -> None:
    flows = FlowControl(Outbox(), 100, 2**30, lambda: 0)
    assert flows.encode([bytes(95)])[1] == 100
    with pytest.raises(MessageTooLarge):
        flows.encode([bytes(96)])
