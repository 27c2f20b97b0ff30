"""What is fuzzed: each target takes any bytes, and raises where the package is at fault.

An oracle tells what is right: `tests.support.second_implementation`, which is written from
``docs/protocol.rst`` alone. The bytes of an input are a script, which says what the peer sends and what our
own side does meanwhile. Nothing is random: an input does the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .handshake import handshake
from .packets import packets
from .records import records
from .session import session

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "packets": packets,
    "records": records,
    "handshake": handshake,
    "session": session,
}
