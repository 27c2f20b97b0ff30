"""Shared Hypothesis strategies: fields, packets, options, and bytes cut into chunks."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from bokbok_trio._protocol.options import MAX_OWN_OPTIONS_SIZE, ROOM

fields = st.binary(max_size=40)
"""A field as it arrives."""

user_fields = st.one_of(
    fields,
    fields.map(bytearray),
    fields.map(lambda field: memoryview(field)),  # noqa: PLW0108  (mypy cannot infer the class)
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
"""A field as a user may give it."""

packets = st.lists(fields, max_size=8) | st.lists(st.binary(max_size=2), max_size=255)
"""Packets as lists of fields, mostly small ones."""


option_names = st.text("abcdefghijklmnopqrstuvwxyz0123456789./-", min_size=1, max_size=32)
"""All names that an option may have, names of grease included."""


def options() -> st.SearchStrategy[dict[str, bytes]]:
    """Options without a meaning that a side may declare. They leave room for the grease."""
    names = option_names.filter(lambda name: not name.startswith("grease.") and name != ROOM)
    each = st.dictionaries(names, st.binary(max_size=20), max_size=7)
    return each.filter(
        lambda them: sum(8 + len(name) + len(value) for name, value in them.items()) < MAX_OWN_OPTIONS_SIZE
    )


def chunked(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """Some bytes cut into chunks, of which some may be empty."""
    cuts = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)
    return cuts.map(lambda at: [data[i:j] for i, j in itertools.pairwise([0, *at, len(data)])])


def packet_bytes(packet: list[bytes]) -> bytes:
    """Encode a packet a second way, so that tests can compare the two."""
    body = bytes([len(packet)]) + b"".join(len(field).to_bytes(4, "big") + field for field in packet)
    return len(body).to_bytes(4, "big") + body
