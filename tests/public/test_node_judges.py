"""The engine and the implementation in Node judge random sequences of packets, and must always agree."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bokbok_trio._protocol.events import Abort, Answer, Event, Failure, Item, Request
from bokbok_trio._protocol.session import Session

from ..support import second_implementation as second
from ..support.node_peer import NodeProcess, why_not
from ..support.vectors import CONNECTION, engine_of_a_sequence

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

SEQUENCES = 250
"""For each seed."""


class Client:
    """A client that mostly keeps to the protocol, and at times not."""

    WEIGHTS = {  # noqa: RUF012  (never changed)
        "req": 10, "chan": 8, "ok": 0.6, "err": 0.5, "cancel": 6, "item": 14, "credit": 6, "end": 2,
        "ping": 3, "pong": 2, "bye": 0.5, "bye-ok": 0.4, "abort": 0.1, "odd": 0.2,
    }  # fmt: skip

    def __init__(self, choices: random.Random) -> None:
        self.choices = choices
        self.next_id = 0
        self.next_packet = 0
        # Each client has kinds of packets that it likes, or bounds would seldom be reached.
        self.weights = {
            kind: weight * choices.choice([0.3, 1, 1, 12]) for kind, weight in self.WEIGHTS.items()
        }
        self.in_pieces = choices.choice([0, 0.25, 0.9])
        self.most_at_once = choices.choice([1, 3, 12])
        self.depths = choices.choice([[b""], [b"", b"1"], [b"", b"1", b"2", b"15"]])

    def one(self, *likely: bytes, bad: tuple[bytes, ...], chance: float = 0.02) -> bytes:
        return self.choices.choice(bad if self.choices.random() < chance else likely)

    def own_id(self) -> bytes:
        used = [b"%d" % id for id in range(0, self.next_id + 2, 2)]
        return self.one(
            *used, bad=(b"1", b"1", b"00", b"-1", b"", b"999999999999999998", b"1000000000000000000")
        )

    def new_id(self) -> bytes:
        self.next_id += 2
        return self.one(b"%d" % (self.next_id - 2), bad=(self.own_id(),), chance=0.04)

    def channel_id(self) -> bytes:
        return self.one(b"1", b"1", b"1", self.own_id(), self.own_id(), bad=(b"3", b"5", b"01", b"\xb2"))

    def body(self) -> bytes:
        likely = (
            b"\0",
            b"\1\0\0\0\1a",
            b"\2" + bytes(8),
            b"\1\0\0\0\x47" + bytes(71),  # an item that takes just the credit that is granted at first
            b"\1\0\0\0\x8c" + bytes(140),
        )
        return self.one(*likely, bad=(b"", b"\1", b"\0\0", b"\1\0\0\0\2a"), chance=0.01)

    def credit(self) -> bytes:
        return self.one(
            b"0", b"1", b"140", b"262144", b"4294705151", bad=(b"4294967296", b"", b"-1"), chance=0.01
        )

    def asked(self) -> list[bytes]:
        return [
            self.one(b"", b"", b"1500000", b"999999999999999999", bad=(b"1.5",), chance=0.01),
            self.one(*self.depths, bad=(b"0", b"16", b"01"), chance=0.01),
            self.one(b"", b"", second.flat({b"a": b"1"}), bad=(b"\0", b"\1\0\0\0\1a"), chance=0.01),
        ]

    def fields(self) -> list[bytes]:  # noqa: PLR0911  (one for each kind)
        [kind] = self.choices.choices([*self.weights], [*self.weights.values()])
        match kind:
            case "req":
                return [b"req", self.new_id(), *self.asked(), self.body()]
            case "chan":
                return [b"chan", self.new_id(), *self.asked(), self.credit(), self.body()]
            case "ok":
                return [b"ok", self.one(b"1", b"3", bad=(b"5", b"0")), self.body()]
            case "err":
                details = bytes(self.choices.choice([0, 0, 3, 16_384, 16_385]))
                return [
                    b"err",
                    self.one(b"1", b"3", bad=(b"5",)),
                    self.one(b"c", b"", bad=(b"\xff",)),
                    b"m",
                    details,
                ]
            case "cancel":
                return [b"cancel", self.own_id()]
            case "item":
                return [b"item", self.channel_id(), self.body()]
            case "credit":
                return [b"credit", self.channel_id(), self.credit()]
            case "end":
                return [b"end", self.channel_id()]
            case "abort":
                return [
                    b"abort",
                    *self.choices.choice([[b"c", b"m"], [], [b"\xff", b"m"], [b"c", bytes(257)]]),
                ]
            case "odd":
                return self.choices.choice([[], [b""], [b"hello"], [b"ping", b""], [b"req"], [b"drop", b"0"]])
            case word:
                return [word.encode()]

    def parts(self, fields: list[bytes]) -> list[list[bytes]]:
        """The packet in pieces; the last of them may be missing, and `drop` in their place."""
        rest = second.packet(fields)[4:]
        number = self.one(b"%d" % self.next_packet, bad=(b"0",), chance=0.01)
        self.next_packet += 1
        parts = []
        while rest:
            size = 0 if self.choices.random() < 0.003 else self.choices.randint(1, 60)
            piece, rest = rest[:size], rest[size:]
            left = self.one(b"%d" % len(rest), bad=(b"%d" % (len(rest) + 1),), chance=0.005)
            parts.append([b"part", number, left, piece])
        if self.choices.random() < 0.2:
            parts = [*parts[: self.choices.randrange(len(parts))], [b"drop", number]]
        return parts

    def sequence(self) -> list[bytes]:
        """Some packets, some of them in pieces, with others in between."""
        waiting = [self.fields() for _ in range(self.choices.randint(1, 25))]
        under_way: list[list[list[bytes]]] = []
        packets = []
        while waiting or under_way:
            if waiting and (
                not under_way or (len(under_way) < self.most_at_once and self.choices.random() < 0.5)
            ):
                fields = waiting.pop(0)
                under_way.append(self.parts(fields) if self.choices.random() < self.in_pieces else [fields])
            parts = self.choices.choice(under_way)
            packets.append(second.packet(parts.pop(0)))
            under_way = [parts for parts in under_way if parts]
        return packets


def judge(server: Session, packets: list[bytes]) -> dict[str, Any]:
    """As ``interop/node/judge.mjs`` does."""
    events: list[Event] = []
    refused = None
    drained = False
    for i, packet in enumerate(packets):
        received = server.receive(packet)
        for event in received:
            if isinstance(event, Request) and event.has_channel and (event.depth or not server.is_draining):
                server.flow_control.grant(event.id, CONNECTION["credit"])
        events += received
        drained = drained or server.is_drained
        if server.error is not None:
            refused = i
            server.abort(str(server.error))
        if refused is not None or any(isinstance(event, Abort) for event in received):
            break
    sent, replies = server.take(0.0), []
    while sent:
        end = 4 + int.from_bytes(sent[:4], "big")
        replies.append(sent[:end].hex())
        sent = sent[end:]
    return {
        "refused": refused,
        "requests": with_fields(events, Request),
        "items": with_fields(events, Item),
        "answers": [str(event.id) for event in events if isinstance(event, Answer | Failure)],
        "replies": replies,
        "drained": drained,
    }


def with_fields(events: list[Event], kind: type[Request | Item]) -> list[dict[str, Any]]:
    found = [event for event in events if isinstance(event, kind)]
    return [{"id": str(event.id), "fields": [field.hex() for field in event.fields]} for event in found]


@pytest.mark.parametrize("seed", range(3))
async def test_both_judge_alike(process: NodeProcess, seed: int) -> None:
    choices = random.Random(seed)
    refusals = 0
    async with process.ready():
        for _ in range(SEQUENCES):
            packets, bye = Client(choices).sequence(), choices.random() < 0.4
            ours = judge(engine_of_a_sequence(bye), packets)
            theirs = await process(
                "judge",
                limit=CONNECTION["max_message_size"],
                maxRequests=CONNECTION["max_requests"],
                credit=CONNECTION["credit"],
                sent=[True, False],
                bye=bye,
                packets=[packet.hex() for packet in packets],
            )
            verdicts = ["refused", "requests", "items", "answers"]
            assert [ours[name] for name in verdicts] == [theirs[name] for name in verdicts], (bye, packets)
            replies = [reply["packet"] for reply in theirs["replies"]]
            if ours["drained"]:
                pass  # a whole connection has closed then, and the engine waits for it to do so
            elif theirs[
                "ended"
            ]:  # what was due before need not be sent, and the words of an `abort` are free
                assert aborts(ours["replies"]) == aborts(replies), (bye, packets)
            else:
                assert sorted(ours["replies"]) == sorted(replies), (bye, packets)
            refusals += ours["refused"] is not None
    assert SEQUENCES / 4 < refusals < SEQUENCES  # or the sequences would tell little


def aborts(replies: list[str]) -> int:
    return sum(bytes.fromhex(reply)[9:14] == b"abort" for reply in replies)
