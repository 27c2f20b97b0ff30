"""Runs the code of docs/watching.rst as it stands."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bokbok_trio import Connection, Settings, current_request
from bokbok_trio.instruments import HandshakeOutcome, Instrument, RequestOutcome
from bokbok_trio.testing import open_connection_pair

from ..support.helpers import documented_code, run_documented

TEXT = (Path(__file__).parents[2] / "docs" / "watching.rst").read_text()


async def test_the_instruments_do_what_the_text_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.NOTSET, "bokbok_trio.requests")  # and it is set back at the end
    names: dict[str, Any] = {}
    slowest, tenants, log = [code for code in documented_code("watching.rst") if "opentelemetry" not in code]

    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        seen = names["TENANT"].get(), current_request().context.get("tenant", b"").decode()
        if request == [b"chain"]:
            [answer] = await connection.request(["back"])
            return [*seen, answer.decode()]
        return [seen[0]]

    await run_documented(slowest, names)
    await run_documented(tenants, names)
    settings = Settings(instruments=[names["slowest"], names["CarryTenant"]()])
    async with open_connection_pair(handler, handler, client_settings=settings, server_settings=settings) as (
        client,
        _,
    ):
        assert await client.request(["chain"]) == [b"nobody", b"nobody", b"nobody"]
        names["TENANT"].set("acme")
        assert await client.request(["chain"]) == [b"acme", b"acme", b"acme"]
        assert await client.request(["chain"], context={"tenant": "b"}) == [b"b", b"b", b"b"]
    assert names["slowest"].name == "chain"

    await run_documented(log, names)
    async with open_connection_pair(server_handler=handler, client_settings=names["settings"]) as (client, _):
        await client.request(["greet"])
    [line] = [record.message for record in caplog.records if "request 0" in record.message]
    assert re.sub(r"[\d.]+", "N", line) in re.sub(r"[\d.]+", "N", TEXT)
    assert logging.getLogger("bokbok_trio.requests").level == logging.DEBUG


async def test_the_traces_are_made() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return request

    [code] = documented_code("watching.rst", "opentelemetry")
    names: dict[str, Any] = {"Settings": Settings}
    await run_documented(code, names)
    exporter = InMemorySpanExporter()
    names["provider"].add_span_processor(SimpleSpanProcessor(exporter))
    async with open_connection_pair(
        server_handler=handler, client_settings=names["settings"], server_settings=names["settings"]
    ) as (client, _):
        await client.request(["greet"])
    names["provider"].shutdown()  # which prints them
    assert [span.name for span in exporter.get_finished_spans()] == ["greet", "greet"]


def test_the_table_has_all_methods_and_the_text_all_outcomes() -> None:
    methods = [name for name in vars(Instrument) if not name.startswith("_")]
    assert re.findall(r"(?m)^``(\w+)``  ", TEXT) == methods
    for outcome in (*get_args(HandshakeOutcome), *get_args(RequestOutcome)):
        assert f"``{outcome}``" in TEXT
