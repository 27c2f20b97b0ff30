"""What the targets share: scripts, what is at fault, and how to see that two implementations agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from bokbok_trio import HandshakeError, ProtocolError
from bokbok_trio._protocol.packets import PacketDecoder
from tests.support import second_implementation as second

MAX_RECEIVES: Final = 64
"""Receives that a long stream comes in, so that one byte at a time is for short ones."""

T = TypeVar("T")


class Fault(Exception):  # noqa: N818  (what was found)
    """The package does other than the text says."""


class Script:
    """An input, read from its beginning; when it is used up there are only zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def byte(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def short(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def rest(self) -> bytes:
        return self.take(len(self._data))


def check(*, right: bool, what: object) -> None:
    if not right:
        raise Fault(what)


def same(ours: object, due: object) -> None:
    if ours != due:
        raise Fault(f"is {ours!r}, and {due!r} is due")


def refuses(call: Callable[[], T]) -> tuple[str, T | None]:
    """What came of a call, of either implementation: what it returned, or that it refused."""
    try:
        return "takes", call()
    except (ProtocolError, HandshakeError, second.Bad):
        return "refuses", None


def agree(ours: Callable[[], object], due: Callable[[], object]) -> None:
    same(refuses(ours), refuses(due))


def make_field(script: Script) -> bytes:
    """A field: any bytes, or something that means more to who decodes it."""
    kind, size = script.byte() % 8, script.byte()
    match kind:
        case 0:
            return b"1" * (size % 24)
        case 1:
            return b"%d" % (10 ** (size % 20) + size // 20 - 1)
        case 2:
            return second.body([script.take(script.byte() % 4) for _ in range(size % 16)])
        case 3:
            return second.body([b"a", bytes(size % 100)])
        case _:
            return script.take(size)


def decode_all(decoder: PacketDecoder, data: bytes) -> Iterator[list[bytes]]:
    """The packets that some bytes complete, copied."""
    for fields in decoder.decode(data):
        yield list(map(bytes, fields))
    while decoder.has_rest:
        for fields in decoder.decode(b""):
            yield list(map(bytes, fields))


def names_of(pairs: Any) -> dict[bytes, bytes]:
    return {name.encode(): value for name, value in pairs.items()}
