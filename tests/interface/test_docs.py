"""Runs the code of docs/interfaces.rst and docs/tutorial.rst as it stands."""

from __future__ import annotations

from typing import Any, Protocol

import pytest

from bokbok_trio.interface import consume, expose
from bokbok_trio.testing import consume_local, open_connection_pair
from tests.support.helpers import documented_code, needs_safe_channel, run_documented

USES_PYDANTIC = "pydantic"


@needs_safe_channel
async def test_the_blocks_of_the_reference_do_what_they_assert() -> None:
    names: dict[str, Any] = {}
    definitions, implementation, sides, *rest = documented_code("interfaces.rst")
    for code in (definitions, implementation, sides):
        await run_documented(code, names)
    # That connection is closed now; the rest of the text goes on over another one.
    files = names["FilesInMemory"]()
    files.files["/notes"] = b"first line\n"
    async with open_connection_pair(server_handler=expose(names["Files"], files)) as (client, _):
        names.update(connection=client, files=consume(client, names["Files"]))
        for code in rest:
            if USES_PYDANTIC not in code:
                await run_documented(code, names)
    assert len(rest) == 7


@needs_safe_channel
async def test_the_blocks_of_the_tutorial_do_what_they_assert() -> None:
    names: dict[str, Any] = {}
    for code in documented_code("tutorial.rst"):
        await run_documented(code, names)
    assert "NewNotesInMemory" in names


async def test_the_hooks_for_pydantic_do_what_they_assert() -> None:
    pytest.importorskip("pydantic", reason="pydantic is not installed: pip install '.[examples]'")
    [code] = documented_code("interfaces.rst", USES_PYDANTIC)
    await run_documented(code, {"Protocol": Protocol, "consume_local": consume_local})
