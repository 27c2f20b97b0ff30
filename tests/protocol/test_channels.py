"""Channels of an engine: items both ways, their ends, and cancelling."""

from __future__ import annotations

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Answer, Bye, Cancel, End, Request
from bokbok_trio._protocol.flow_control import WINDOW
from bokbok_trio._protocol.local_requests import State
from tests.support.engines import item_event, make, open_pair, receive, send_item
from tests.support.helpers import packet
from tests.support.inside import held_in_pieces


def test_a_channel_with_items_both_ways_and_its_answer() -> None:
    client, server = make("client"), make("server")
    assert client.open_channel(["hello"], 2.5) == 0
    sent = client.take(0)
    assert sent == packet(b"chan", b"0", b"2500000", b"", b"", b"%d" % WINDOW, body=[b"hello"])
    assert list(receive(server, sent)) == [Request(0, 2.5, [b"hello"], has_channel=True)]
    assert not client.flow_control.may_send(0)
    assert server.flow_control.may_send(0)
    server.flow_control.accept(0)
    sent = server.take(0)
    assert sent == packet(b"credit", b"0", b"%d" % WINDOW)
    assert list(receive(client, sent)) == []
    assert client.flow_control.take_writable() == {0}
    send_item(client, 0, b"up")
    client.flow_control.end(0)
    sent = client.take(0)
    assert sent == packet(b"item", b"0", body=[b"up"]) + packet(b"end", b"0")
    assert list(receive(server, sent)) == [item_event(0, b"up"), End(0)]
    send_item(server, 0, b"down")
    server.answer(0, ["answer"])
    sent = server.take(0)
    assert sent == packet(b"item", b"0", body=[b"down"]) + packet(b"ok", b"0", body=[b"answer"])
    assert list(receive(client, sent)) == [item_event(0, b"down"), Answer(0, [b"answer"])]
    assert not len(client.flow_control)
    assert not len(server.flow_control)
    assert server.handling == 0


def test_the_answer_waits_for_big_items_and_small_ones_of_other_channels_do_not() -> None:
    client, server = open_pair(2**20)
    list(receive(server, packet(b"chan", b"2", b"", b"", b"", b"100", body=[])))
    send_item(server, 0, bytes(2**17))
    send_item(server, 2, b"small")
    server.answer(0, [])
    client.local.states[2] = State.SENT
    client.flow_control.add_local(2)
    events: list[object] = []
    while sent := server.take(0):
        events += receive(client, sent)
        assert (Answer(0, []) in events) == (server.handling == 1), "its slot is free with its answer"
    assert events == [item_event(2, b"small"), item_event(0, bytes(2**17)), Answer(0, [])]


def test_cancelling_a_channel_drops_what_has_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(client, 0, bytes(2**17))
    list(receive(server, client.take(0)))
    assert held_in_pieces(server)
    send_item(server, 0, b"crosses")
    server.flow_control.end(0)
    client.flow_control.end(0)
    client.cancel(0)
    sent = client.take(0)
    assert sent == packet(b"drop", b"0") + packet(b"cancel", b"0")
    assert list(receive(server, sent)) == [Cancel(0)]
    assert list(receive(client, server.take(0))) == [], "nobody wants it"
    server.fail(0, "cancelled", "")
    assert list(receive(client, server.take(0))) == []
    assert not len(client.flow_control)


def test_what_a_cancelled_channel_gets_is_still_checked() -> None:
    client, server = open_pair()
    client.cancel(0)
    server.flow_control.end(0)
    list(receive(client, server.take(0)))
    with pytest.raises(ProtocolError, match="`item` after `end`"):
        list(receive(client, packet(b"item", b"0", body=[])))


def test_a_channel_cancelled_before_it_leaves_never_existed() -> None:
    client = make("client", slots=1)
    client.open_channel([])
    client.open_channel([])
    client.flow_control.end(0)
    client.flow_control.end(2)
    client.cancel(2)
    client.cancel(0)
    assert client.take(0) == b""
    assert not len(client.flow_control)


def test_a_channel_that_was_ended_while_it_had_no_slot() -> None:
    client = make("client", slots=1)
    client.request([])
    client.take(0)
    client.open_channel([])
    client.flow_control.end(2)
    list(receive(client, packet(b"ok", b"0", body=[])))
    chan = packet(b"chan", b"2", b"", b"", b"", b"%d" % WINDOW, body=[])
    assert client.take(0) == chan + packet(b"end", b"2")


def test_who_is_cancelled_takes_back_the_items_that_have_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(server, 0, bytes(2**17))
    list(receive(client, server.take(0)))
    assert held_in_pieces(client)
    client.cancel(0)
    assert list(receive(server, client.take(0))) == [Cancel(0)]
    server.drop_items(0)
    server.fail(0, "cancelled", "")
    sent = server.take(0)
    assert sent == packet(b"drop", b"0") + packet(b"err", b"0", b"cancelled", b"", b"")
    assert list(receive(client, sent)) == []
    assert held_in_pieces(client) == client.asked == 0


def test_a_cancel_that_crosses_the_answer_leaves_what_comes_before_it() -> None:
    client, server = open_pair()
    send_item(server, 0, b"x")
    server.answer(0, [])
    client.cancel(0)
    assert list(receive(server, client.take(0))) == []
    assert server.take(0) == packet(b"item", b"0", body=[b"x"]) + packet(b"ok", b"0", body=[])


def test_the_answer_drops_our_items_that_have_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(client, 0, bytes(2**17))
    list(receive(server, client.take(0)))
    server.answer(0, [])
    assert list(receive(client, server.take(0))) == [Answer(0, [])]
    sent = client.take(0)
    assert sent == packet(b"drop", b"0")
    list(receive(server, sent))
    assert held_in_pieces(server) == 0


def test_a_channel_without_a_slot_fails_when_the_peer_drains() -> None:
    client = make("client", slots=1)
    client.open_channel([])
    client.open_channel([])
    assert list(receive(client, packet(b"bye"))) == [Bye([2])]
    client.cancel(0)
    assert not len(client.flow_control)


def test_after_close_no_item_of_ours_leaves() -> None:
    client, server = open_pair()
    send_item(client, 0, b"x")
    client.close()
    client.flow_control.end(0)
    client.flow_control.consume(0, WINDOW)
    assert client.take(0) == b""
    send_item(server, 0, b"x")
    server.answer(0, [])
    server.close()
    assert server.take(0) == packet(b"item", b"0", body=[b"x"]) + packet(b"ok", b"0", body=[])
