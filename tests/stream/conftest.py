from __future__ import annotations

from collections.abc import Iterator

import pytest

from bokbok_trio._protocol import options


@pytest.fixture(scope="module")
def fixed_grease() -> Iterator[None]:
    """Give every handshake messages of the same lengths, as cuts and changed bits are counted in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "make_grease", lambda randomness: ("grease.0000", b"1234"))
        yield
