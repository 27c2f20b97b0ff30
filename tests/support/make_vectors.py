"""Makes ``tests/support/vectors.json``, the test vectors of ``docs/protocol.rst``.

``python -m tests.support.make_vectors`` writes the same bytes each time: all random values are fixed here.
The package makes the handshakes, records and keys; what a server replies to packets of an open connection
comes from the second implementation, so ``test_engine_vectors.py`` compares the engine with both.
"""

from __future__ import annotations

import json
from pathlib import Path

import trio

from bokbok_trio._keys import ARGON2ID_MEMORY, ARGON2ID_PASSES, encode_user, passphrase_to_key
from bokbok_trio._protocol.handshake import MAGIC
from bokbok_trio._protocol.key_schedule import keyed_hash
from bokbok_trio._protocol.packets import encode_number, encode_packet

from . import second_implementation as second
from .connection_vectors import connection_packets, sequences
from .handshake_vectors import (
    bad_hellos,
    bad_opens,
    bad_replies,
    plain_handshakes,
    refusals,
    sealed_handshakes,
)
from .vector_parts import BAD_OPTIONS, USER, Vectors, flip, sealed_records

PATH = Path(__file__).with_name("vectors.json")


# ---- packets, numbers, user names ----


def _packets() -> Vectors:
    good = {
        "no fields": [],
        "one empty field": [b""],
        "two fields": [b"ping", b"12345"],
        "bytes of any value": [bytes((0, 255, 10)), b"", "ë".encode()],
        "255 fields": [b""] * 255,
    }
    bad = {
        "no count": "00000000",
        "a count and no field": "0000000101",
        "a field's size cut short": "0000000401000000",
        "a field larger than the packet": "000000060100000002" + "61",
        "a field of 4 GiB - 1": "0000000501ffffffff",
        "a byte after the last field": "00000007010000000161" + "62",
        "fewer fields than counted": "0000000602" + "0000000161",
        "a length over the limit, nothing else": "00001001",
    }
    return {
        "good": [
            {
                "name": name,
                "fields": [field.hex() for field in fields],
                "packet": encode_packet(*fields).hex(),
            }
            for name, fields in good.items()
        ],
        "bad": [{"name": name, "limit": 4096, "packet": packet} for name, packet in bad.items()],
    }


def _numbers() -> Vectors:
    bad = [b"", b"00", b"01", b"+7", b"-1", b"1_0", b" 7", b"7 ", b"7\n", b"1.0", b"1e3", b"0x7", b"7\0"]
    bad += [b"1000000000000000000", "\u0667".encode()]
    return {
        "good": [
            {"number": number, "field": encode_number(number).hex()}
            for number in (0, 7, 10, 4194304, 10**18 - 1)
        ],
        "bad": [field.hex() for field in bad],
    }


def _users() -> Vectors:
    bad = {
        "empty": b"",
        "256 bytes": b"a" * 256,
        "not in normal form C": "zoe\u0308".encode(),
        "a zero": b"a\0b",
        "a line feed": b"a\n",
        "a control character over U+007F": "a\u0085".encode(),
        "not UTF-8": b"zo\xeb",
        "a surrogate": b"\xed\xa0\x80",
        "an overlong form": b"\xc0\xaf",
    }
    return {
        "good": [
            {"user": user, "field": encode_user(user).hex()}
            for user in ("a", USER, "two words", "\u65e5\u672c", "\u00e9" * 127 + "x")
        ],
        "bad": [{"name": name, "field": field.hex()} for name, field in bad.items()],
    }


def _options() -> Vectors:
    good = {
        "none": {},
        "one": {b"grease.c0de": b"\0\377"},
        "an empty value": {b"a": b""},
        "names of every kind of character": {b"bokbok/0.9-z": b"1", b"/": b"", b"-.": b""},
        "a name of 32 bytes": {b"a" * 32: b"1"},
        "96 bytes": {b"a": bytes(86)},
    }
    return {
        "good": [
            {
                "name": name,
                "options": {each.decode(): value.hex() for each, value in options.items()},
                "body": second.flat(options).hex(),
            }
            for name, options in good.items()
        ],
        "bad": [{"name": name, "body": body.hex()} for name, body in BAD_OPTIONS.items()],
    }


# ---- records ----


def _record_vectors() -> Vectors:
    first, second = keyed_hash(32, b"", b"first", b""), keyed_hash(32, b"", b"second", b"")
    texts: list[tuple[bytes, list[bytes]]] = [(first, [b"a", b"bcd" * 20]), (second, [b"e", b"f", b""])]
    a = sealed_records((first, [b"a", b"b", b""]))
    return {
        "stream": [
            {"key": key.hex(), "plaintexts": [text.hex() for text in plaintexts]} for key, plaintexts in texts
        ],
        "records": sealed_records(*texts),
        "bad": [
            {"name": name, "key": first.hex(), "record": record}
            for name, record in {
                "a bit changed": flip(bytes.fromhex(a[0])).hex(),
                "the second record, as the first": a[1],
                "the end record of another place": a[2],
                "under another key": sealed_records((second, [b"a"]))[0],
                "a length of 15": "000f" + "00" * 15,
                "a length of 0": "0000",
            }.items()
        ],
    }


# ---- passphrases ----


def _passphrases() -> list[Vectors]:
    passphrase = "correct horse battery zoe\u0308"
    salt = keyed_hash(16, b"", b"bokbok1 argon2id", encode_user(USER))
    return [
        {
            "passphrase": passphrase,
            "user": USER,
            "passes": ARGON2ID_PASSES,
            "memory": ARGON2ID_MEMORY,
            "salt": salt.hex(),
            "key": trio.run(passphrase_to_key, passphrase, USER).raw.hex(),
        }
    ]


def make() -> Vectors:
    sealed = sealed_handshakes()
    return {
        "about": "Test vectors of docs/protocol.rst, made by tests.support.make_vectors. Bytes are in hex.",
        "magic": MAGIC.hex(),
        "packets": _packets(),
        "numbers": _numbers(),
        "users": _users(),
        "options": _options(),
        "sealed": sealed,
        "plain": plain_handshakes(),
        "refused": refusals(sealed),
        "bad_hellos": bad_hellos(),
        "bad_opens": bad_opens(),
        "bad_replies": bad_replies(sealed),
        "records": _record_vectors(),
        "connection": connection_packets(),
        "sequences": sequences(),
        "passphrases": _passphrases(),
    }


def dump(value: object, indent: str = "") -> str:
    """Encode JSON with each vector on one line or a few."""
    if isinstance(value, dict) and (not indent or len(json.dumps(value)) > 1000):
        items = [f"{json.dumps(key)}: {dump(item, indent + ' ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [dump(item, indent + " ") for item in value]
        return "[\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}]"
    return json.dumps(value)


if __name__ == "__main__":
    PATH.write_text(dump(make()) + "\n", encoding="ascii")
