"""Runs the programs of the documentation for blocking calls."""

from __future__ import annotations

import re

import pytest
import trio

from bokbok_trio import Channel, Connection, Key, RequestError, open_server
from bokbok_trio.blocking import Portal

from ..support.helpers import documented_code

pytestmark = pytest.mark.usefixtures("leaves_no_thread")


def programs() -> dict[str, str]:
    """The programs of the documentation without typed calls, by their names."""
    return {code.split()[1]: code for code in documented_code("blocking.rst") if "consume" not in code}


@pytest.mark.parametrize("name", programs())
def test_the_programs_of_the_documentation_print_what_they_say(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        match request:
            case [b"ping", text]:
                return ["pong", text]
            case [b"greet"]:
                [who] = await connection.request(["your name?"])
                return [b"hello, " + who]
            case [b"sleep"]:
                await trio.sleep_forever()
        raise RequestError("unknown request", code="unknown-request")

    async def shout(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
        async for [chunk] in channel:
            await channel.send([chunk.upper()])
        return ["done"]

    keys = {"alice": Key(bytes.fromhex("d2" * 32))}
    with (
        Portal() as portal,
        portal.enter(open_server("127.0.0.1:0", handler, channel_handler=shout, user_key=keys)) as server,
    ):
        program = programs()[name]
        expected = re.findall(r"print\(.*\)  +# (.*)", program)
        assert expected
        exec(program.replace("localhost:12345", str(server.addresses[0])), {})
    assert capsys.readouterr() == ("".join(f"{line}\n" for line in expected), "")
