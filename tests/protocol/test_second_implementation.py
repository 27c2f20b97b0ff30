"""The engine connected with the second implementation of the protocol."""

from __future__ import annotations

import pytest

from bokbok_trio import MessageTooLarge, ProtocolError
from bokbok_trio._protocol.events import Answer, Bye, Failure
from bokbok_trio._protocol.flow_control import WINDOW
from bokbok_trio._protocol.packets import PacketDecoder
from bokbok_trio._protocol.session import Session

from ..support import second_implementation as second
from ..support.engines import receive
from ..support.helpers import decode


def pump(package: Session, other: second.Open) -> list[list[bytes]]:
    """Take all packets of the package, and return those that the second implementation must answer."""
    decoder = PacketDecoder(second.MAX_WHOLE)
    taken: list[list[bytes] | None] = []
    while batch := package.take(0.0):
        taken += (other.take(second.packet(fields)) for fields in decode(decoder, batch))
    assert not decoder.buffered
    return [fields for fields in taken if fields is not None]


@pytest.mark.parametrize("size", [66_432, 66_433, 66_560, 66_561, 2**20 - 128])
def test_packets_about_as_long_as_may_be_whole(size: int) -> None:
    """And the longest that may be; both ways. `size` is that of the body."""
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    text = b"a" * (size - 5)
    package.request([text])
    [request] = pump(package, other)
    assert second.unpack_body(request[-1]) == [text]
    packets = other.put([b"ok", request[1], second.body([text])])
    assert (len(packets) > 1) is (len(second.body([b"ok", request[1], second.body([text])])) > 66_560)
    assert receive(package, b"".join(packets)) == [Answer(0, [text])]


@pytest.mark.parametrize("size", [0, 1, 8192 - 10])
def test_a_context_and_a_body_share_the_room(size: int) -> None:
    """128 bytes of the limit are kept free. The context and the body share the rest."""
    package = Session("client", max_message_size=2**14, max_requests=1, slots=1)
    other = second.Open(1, 2**14, 1)
    context = {"a": bytes(size)}
    most = 2**14 - 128 - 5 - len(second.flat({b"a": bytes(size)}))
    with pytest.raises(MessageTooLarge):
        package.request([bytes(most + 1)], context=context)
    package.request([bytes(most)], 10.0**9, depth=15, context=context)
    [request] = pump(package, other)
    assert second.context(request[4]) == {b"a": bytes(size)}
    assert second.unpack_body(request[-1]) == [bytes(most)]


def test_only_requests_of_depth_0_are_taken_back_by_a_bye() -> None:
    package = Session("client", max_message_size=2**14, max_requests=1, slots=1)
    other = second.Open(1, 2**14, 1)
    asks = (package.request, package.open_channel)
    sent, waiting = ([[ask([], depth=depth) for ask in asks] for depth in (0, 1)] for _ in range(2))
    assert [int(fields[1]) for fields in pump(package, other)] == [id for ids in sent for id in ids]
    assert receive(package, second.packet([b"bye"])) == [Bye(waiting[0])]
    assert package.take(0.0) == second.BYE_OK
    for id in sent[1]:
        receive(package, b"".join(other.put([b"ok", b"%d" % id, second.body([])])))
    assert [int(fields[1]) for fields in pump(package, other)] == waiting[1]


def test_details_come_in_pieces_too() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.request([])
    pump(package, other)
    assert not other.put([b"err", b"0", b"code", b"text", bytes(16_384)])[1:]
    details = bytes(16_384)
    encoded = second.body([b"err", b"0", b"code", b"text", details])
    parts = [encoded[:9000], encoded[9000:]]
    for left, part in zip((len(parts[1]), 0), parts, strict=True):
        events = receive(package, second.packet([b"part", b"0", b"%d" % left, part]))
    assert events == [Failure(0, "code", "text", details)]


def test_the_second_implementation_reads_big_and_small_requests_together() -> None:
    package = Session("client", max_message_size=2**20, max_requests=20, slots=20)
    other = second.Open(1, 2**20, 20)
    texts = [bytes((i,)) * (300_000 if i % 2 else 300) for i in range(16)]
    for text in texts:
        package.request([text])
    requests = pump(package, other)
    assert sorted(second.unpack_body(request[-1])[0] for request in requests) == texts
    assert [len(request[-1]) > 300_000 for request in requests] == [False] * 8 + [True] * 8


def test_the_second_implementation_sees_that_a_request_was_dropped() -> None:
    package = Session("client", max_message_size=2**20, max_requests=2, slots=2)
    other = second.Open(1, 2**20, 2)
    big = package.request([b"a" * 300_000])
    for fields in decode(PacketDecoder(second.MAX_WHOLE), package.take(0.0)):
        assert other.take(second.packet(fields)) is None
    assert other.pieces
    package.cancel(big)
    package.request([b"small"])
    assert [fields[1] for fields in pump(package, other)] == [b"2"]
    assert not other.pieces


@pytest.mark.parametrize("how", ["cancel", "answer"])
def test_the_second_implementation_sees_that_an_item_was_dropped(how: str) -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.open_channel([])
    pump(package, other)
    receive(package, other.replies.pop())
    package.flow_control.send(0, *package.flow_control.encode([bytes(250_000)]))
    package.flow_control.end(0)
    for fields in decode(PacketDecoder(second.MAX_WHOLE), package.take(0.0)):
        assert other.take(second.packet(fields)) is None
    assert other.pieces
    if how == "cancel":
        package.cancel(0)
        assert pump(package, other) == [[b"cancel", b"0"]]
    else:
        [packet] = other.put([b"ok", b"0", second.body([])])
        assert receive(package, packet) == [Answer(0, [])]
        assert pump(package, other) == []
    assert not other.pieces


def test_both_count_the_credit_of_the_packages_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1, 168)
    package.open_channel([])
    pump(package, other)
    receive(package, other.replies.pop())
    # An item takes up 69 bytes more than its field. After the last of each row nothing may start.
    for sizes, more in [([30, 0], 1), ([100_000], 100_068), ([], 70), ([0, 0], 0)]:
        for size in sizes:
            package.flow_control.send(0, *package.flow_control.encode([bytes(size)]))
            assert [len(fields[2]) for fields in pump(package, other)] == [size + 5]
        assert not package.flow_control.may_send(0)
        assert other.to_take[0] == package.flow_control.credits[0].send_credit <= 0
        receive(package, b"".join(other.put([b"credit", b"0", b"%d" % more])))
    assert other.to_take[0] == -68


def test_both_count_the_credit_of_the_second_implementations_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.open_channel([])
    pump(package, other)
    for size in (0, 70_000, 250_000):
        assert other.to_send[0] == package.flow_control.credits[0].receive_credit > 0
        [event] = receive(package, b"".join(other.put([b"item", b"0", second.body([bytes(size)])])))
        assert event[:3] == (0, size + 5, [bytes(size)])
        package.flow_control.consume(0, size + 5)
        pump(package, other)
    receive(package, b"".join(other.put([b"item", b"0", second.body([bytes(WINDOW - 69)])])))
    assert other.to_send[0] == 0, "all was given back before"
    with pytest.raises(ProtocolError, match="without credit"):
        receive(package, second.packet([b"item", b"0", b"\0"]))
