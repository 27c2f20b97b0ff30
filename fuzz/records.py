"""The target `records`: what is done to records on their way."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio
import trio.testing

from bokbok_trio._stream.secretbox import SecretboxStream
from tests.support import second_implementation as second

from .scripts import (
    MAX_RECEIVES,
    Fault,
    Script,
    refuses,
    same,
)

KEYS: Final = (bytes(range(32)), bytes(range(32, 64)))
"""Of the two directions."""

RECORD_LIMITS: Final = (65_535, 64, 4112)
MAX_RECORDS: Final = 20


class Bytes(trio.abc.Stream):
    """A transport of some bytes, of which so many are received at once, and then the end."""

    def __init__(self, data: bytes, most: int) -> None:
        self._script = Script(data)
        self._most = most

    async def send_all(self, data: object) -> None:
        raise NotImplementedError

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._script.take(min(self._most, max_bytes or self._most))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def write_records(script: Script, limit: int) -> bytes:  # noqa: C901  (one case for each trick)
    """What somebody sends who seals records right, and then changes them."""
    sealer, reflected = second.Records(KEYS[0]), second.Records(KEYS[1])
    records: list[bytes] = []
    while script and len(records) < MAX_RECORDS:
        operation = script.byte()
        match operation % 10:
            case 0 | 1:
                records.append(sealer.seal(script.take(script.byte())))
            case 2:
                records.append(sealer.seal(bytes(min(limit - 17 + script.byte() % 3, 65_519))))
            case 3:
                records.append(script.take(script.byte()))
            case 4:
                reflected.counter = sealer.counter
                records.append(reflected.seal(script.take(script.byte())))
            case 5 if records:
                records.append(records[script.byte() % len(records)])
            case 6 if records:
                del records[script.byte() % len(records)]
            case 7 if records:
                at = script.byte() % len(records)
                records[at], records[-1] = records[-1], records[at]
            case 8 if records:
                changed = bytearray(records[-1] or b"\0")
                changed[script.short() % len(changed)] ^= 1 << script.byte() % 8
                records[-1] = bytes(changed)
            case 9 if records:
                records[-1] = records[-1][: script.short()]
            case _:
                pass
    return b"".join(records)


def open_records(stream: bytes, limit: int) -> tuple[bytes, bool]:
    """What is received of a stream of records, and whether it ends by the end record."""
    opener = second.Records(KEYS[0])
    plaintext = b""
    while len(stream) >= 2:
        size = int.from_bytes(stream[:2], "big")
        if size > limit or len(stream) < 2 + size:
            break
        _, opened = refuses(lambda: opener.open(stream[: 2 + size]))  # noqa: B023
        if not opened:
            return plaintext, opened is not None
        plaintext += opened
        stream = stream[2 + size :]
    return plaintext, False


def records(data: bytes) -> None:
    """Whatever is done to records on their way, what is received is what was sent, up to there."""
    script = Script(data)
    limit = RECORD_LIMITS[script.byte() % len(RECORD_LIMITS)]
    at_once = script.byte() or 2**16
    most = script.byte()
    sent = write_records(script, limit)
    at_once = max(at_once, len(sent) // MAX_RECEIVES)
    most = most and max(most, len(sent) // MAX_RECEIVES)
    due = open_records(sent, limit)
    received = b""
    at_end = False

    async def receive() -> None:
        nonlocal received, at_end
        transport = Bytes(sent, at_once)
        stream = SecretboxStream(transport, send_key=KEYS[1], receive_key=KEYS[0], max_record_size=limit)
        try:
            while not at_end:
                some = await (stream.receive_some(most) if most else stream.receive_view())
                received += some
                at_end = not some
        except trio.BrokenResourceError:
            with suppress(trio.BrokenResourceError):
                if await stream.receive_some():
                    raise Fault("receiving went on after it broke") from None

    trio.run(receive)
    same((received, at_end), due)
