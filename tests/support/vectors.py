"""The vectors of the protocol, and tests that run for each of them."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from bokbok_trio._protocol.session import Session

from ..support import second_implementation as second
from ..support.connection_vectors import SENT_BEFORE
from ..support.make_vectors import PATH

VECTORS: dict[str, Any] = json.loads(PATH.read_text(encoding="ascii"))


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Run a test for each vector, with its name."""
    ids = [
        " ".join(str(vector[key]) for key in ("to", "mode", "name") if key in vector) for vector in vectors
    ]
    return pytest.mark.parametrize("vector", vectors, ids=ids)


both_modes = pytest.mark.parametrize("mode", ["sealed", "plain"])

CONNECTION = VECTORS["connection"]
OPEN_LIMITS = (CONNECTION["max_message_size"], CONNECTION["max_requests"])


def packet_before(kind: bytes) -> bytes:
    """Return the packets that must come before a good packet of a kind."""
    names = {b"cancel": "req", b"drop": "part"}
    found = [vector["packet"] for vector in CONNECTION["good"] if vector["name"] == names.get(kind)]
    return bytes.fromhex("".join(found))


def package_session(side: Literal["client", "server"] = "server") -> Session:
    size, count = OPEN_LIMITS
    return Session(side, max_message_size=size, max_requests=count, slots=count)


def engine_of_a_sequence(has_bye: bool) -> Session:
    """Make the server that gets a sequence."""
    server = package_session()
    server.open_channel([])
    server.request([])
    if has_bye:
        server.drain()
    sent = second.Open(1, *OPEN_LIMITS)
    assert server.take(0.0) == b"".join(
        packet for fields in SENT_BEFORE[has_bye] for packet in sent.put(fields)
    )
    return server
