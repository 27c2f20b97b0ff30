"""Bugs that fuzzing must find, each in a copy of its own: else it proves little where it finds none."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

PACKAGE: Final = Path(__file__).parent.parent / "bokbok_trio"


class Planted(NamedTuple):
    """A bug.

    Arguments:
        target: which finds it.
        what: in words.
        file: of the package.
        old, new: a text that is there exactly once, and what it is replaced by.
    """

    target: str
    what: str
    file: str
    old: str
    new: str


PLANTED: Final = [
    Planted(
        "packets",
        "a length of the limit and one byte passes",
        "_protocol/packets.py",
        "if length > self._limit:",
        "if length > self._limit + 1:",
    ),
    Planted(
        "packets",
        "bytes after the last field pass",
        "_protocol/packets.py",
        "if position != end:",
        "if position > end or position < 0:",
    ),
    Planted(
        "packets",
        "a number with a leading zero passes",
        "_protocol/packets.py",
        "and (field[0] != _ZERO or len(field) == 1):",
        "and (field[0] != _ZERO or len(field) < 3):",
    ),
    Planted(
        "packets",
        "a number of 19 digits passes",
        "_protocol/packets.py",
        "if 0 < len(field) <= _MAX_DIGITS and",
        "if 0 < len(field) <= _MAX_DIGITS + 1 and",
    ),
    Planted(
        "packets",
        "a name of a context may come twice",
        "_protocol/context.py",
        "if _NAME.fullmatch(name) is None or name in context:",
        "if _NAME.fullmatch(name) is None:",
    ),
    Planted(
        "packets",
        "the rest of a length that came in two receives is cut wrong",
        "_protocol/packets.py",
        "position = max(0, LENGTH_SIZE - len(buffer))",
        "position = LENGTH_SIZE - len(buffer) if len(buffer) < 3 else 0",
    ),
    Planted(
        "packets",
        "packets over those that are decoded at once are lost",
        "_protocol/packets.py",
        "self._rest = memoryview(bytes(data[position:]))",
        "self._rest = memoryview(bytes(data[end:]))",
    ),
    Planted(
        "packets",
        "options over their limit pass",
        "_protocol/options.py",
        "if len(encoded) > MAX_OPTIONS_SIZE:",
        "if len(encoded) > 2 * MAX_OPTIONS_SIZE:",
    ),
    Planted(
        "records",
        "a record of the limit and one byte passes",
        "_stream/records.py",
        "if size < MAC_SIZE or size > self.max_record_size:",
        "if size < MAC_SIZE or size > self.max_record_size + 1:",
    ),
    Planted(
        "records",
        "the end record needs no seal",
        "_stream/records.py",
        "            plaintext = None\n",
        '            plaintext = b"" if size == MAC_SIZE else None\n',
    ),
    Planted(
        "records",
        "a record may be repeated",
        "_stream/records.py",
        "        return crypto_secretbox_open(box, self._nonce(), self._key)",
        "        try:\n"
        "            return crypto_secretbox_open(bytes(box), self._nonce(), self._key)\n"
        "        except CryptoError:\n"
        "            self._counter = max(1, self._counter - 1)\n"
        '        before = (self._counter - 1).to_bytes(_NONCE_SIZE, "big")\n'
        "        return crypto_secretbox_open(bytes(box), before, self._key)",
    ),
    Planted(
        "records",
        "the end of the transport counts as the end",
        "_stream/records.py",
        '            raise self._broken("the stream was cut short: it ended without an end record")',
        "            self.has_ended = True",
    ),
    Planted(
        "records",
        "receiving goes on after a record that does not open",
        "_stream/records.py",
        "        self.failure = reason\n        self._ciphertext = bytearray()\n",
        "        self._ciphertext = bytearray()\n",
    ),
    Planted(
        "records",
        "the records before one that does not open are lost",
        "_stream/records.py",
        "                if not plaintexts:\n                    raise\n",
        "                raise\n",
    ),
    Planted(
        "handshake",
        "a pad that is not zeros passes",
        "_protocol/handshake.py",
        'if len(packet) != OPEN_SIZE or len(box) != BOX_SIZE or pad.strip(b"\\0"):',
        "if len(packet) != OPEN_SIZE or len(box) != BOX_SIZE:",
    ),
    Planted(
        "handshake",
        "the hash in the box is not compared",
        "_protocol/handshake.py",
        "if hmac.compare_digest(opened[KEY_SIZE:], self._h1) and at < len(own):",
        "if at < len(own):",
    ),
    Planted(
        "handshake",
        "half of the proof is compared",
        "_protocol/handshake.py",
        "if not hmac.compare_digest(proof, make_proof(self.key, h2)):",
        "if not hmac.compare_digest(proof[:16], make_proof(self.key, h2)[:16]):",
    ),
    Planted(
        "handshake",
        "a wrong mode or side passes",
        "_protocol/handshake.py",
        "if start[: len(expected)] != expected[: len(start)]:",
        "if start[:20] != expected[: len(start)][:20]:",
    ),
    Planted(
        "handshake",
        "an option may come twice",
        "_protocol/options.py",
        "        if name in options:\n",
        "        if name in options and len(name) > 32:\n",
    ),
    Planted(
        "handshake",
        "1,000,001 requests at once pass",
        "_protocol/limits.py",
        "if not 1 <= limits.max_requests <= MAX_REQUESTS:",
        "if not 1 <= limits.max_requests <= 10 * MAX_REQUESTS:",
    ),
    Planted(
        "handshake",
        "options are believed before the box",
        "_protocol/handshake.py",
        "        self._claimed_options = decode_options(options)\n",
        "        self._claimed_options = self.peer_options = decode_options(options)\n",
    ),
    Planted(
        "session",
        "an id of the wrong parity passes",
        "_protocol/interpreter.py",
        "if id % 2 != self._parity:",
        "if id % 2 != self._parity and id != 7:",
    ),
    Planted(
        "session",
        "a request may be one too many",
        "_protocol/remote_requests.py",
        "if self._used[slot_class] >= self._max_requests:",
        "if self._used[slot_class] > self._max_requests:",
    ),
    Planted(
        "session",
        "a request of an id in flight passes",
        "_protocol/remote_requests.py",
        "        if id in self.answer_sizes:\n",
        "        if id in self.answer_sizes and id > 4:\n",
    ),
    Planted(
        "session",
        "an answer to a request that has not left passes",
        "_protocol/local_requests.py",
        "if state is None or state is State.QUEUED:",
        "if state is None:",
    ),
    Planted(
        "session",
        "the answer to a cancelled request is told",
        "_protocol/local_requests.py",
        "        return state is State.SENT\n",
        "        return True\n",
    ),
    Planted(
        "session",
        "an item without credit passes",
        "_protocol/flow_control.py",
        "if self.receive_credit <= 0:",
        "if self.receive_credit < 0:",
    ),
    Planted(
        "session",
        "an item does not cost its 64 bytes",
        "_protocol/flow_control.py",
        "        self.receive_credit -= size + ITEM_COST\n",
        "        self.receive_credit -= size\n",
    ),
    Planted(
        "session",
        "credit over its limit passes",
        "_protocol/flow_control.py",
        "if self.send_credit > MAX_CREDIT:",
        "if self.send_credit > 2 * MAX_CREDIT:",
    ),
    Planted(
        "session",
        "a piece need not go on where the last one ended",
        "_protocol/pieces.py",
        "if remaining != expected - len(piece):",
        "if remaining > expected - len(piece):",
    ),
    Planted(
        "session",
        "a fifth packet in pieces passes",
        "_protocol/pieces.py",
        "            if len(self._in_pieces) >= MAX_IN_PIECES:\n",
        "            if len(self._in_pieces) > MAX_IN_PIECES:\n",
    ),
    Planted(
        "session",
        "any packet may come in pieces",
        "_protocol/interpreter.py",
        "if not fields or fields[0] not in PIECED_KINDS:",
        "if not fields:",
    ),
    Planted(
        "session",
        "`bye-ok` passes without `bye`",
        "_protocol/draining.py",
        "if not self.awaits_bye_ok:",
        "if self.peer_is_done:",
    ),
    Planted(
        "session",
        "an item is sent after the credit is used up",
        "_protocol/flow_control.py",
        "return self.send_credit > 0 and self.queued < MAX_QUEUED",
        "return self.send_credit > -100 and self.queued < MAX_QUEUED",
    ),
]


def plant(planted: Planted) -> str:
    """The file of a bug, with the bug in it.

    Raises:
        ValueError: the text is not in it exactly once.
    """
    text = (PACKAGE / planted.file).read_text(encoding="utf-8")
    if text.count(planted.old) != 1:
        raise ValueError(
            f"{planted.what}: {planted.file} has {planted.old!r} {text.count(planted.old)} times"
        )
    return text.replace(planted.old, planted.new)
