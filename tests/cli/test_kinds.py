"""Arguments that JSON cannot express: maps with integers as keys, and callbacks."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio import RequestError, current_request
from bokbok_trio._cli._callbacks import Callbacks
from bokbok_trio._cli._listing import Listed
from bokbok_trio._cli._output import Output
from bokbok_trio._cli._schemas import Schemas
from bokbok_trio.interface import MethodInfo, expose
from tests.support.cli import Run, replaced, run, serving

__all__ = ["run"]


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Shelf:
    boxes: dict[int, list[dict[int, str]]]


class Keyed(Protocol):
    async def echo(
        self,
        *,
        names: dict[int, str] | None = None,
        shelf: Shelf | None = None,
        shelves: dict[int, Shelf] | None = None,
        levels: dict[Level, int] | None = None,
        texts: dict[str, int] | None = None,
    ) -> dict[str, str]: ...

    async def back(self, names: dict[int, str]) -> dict[int, str]: ...


class Reporting(Protocol):
    async def copy(
        self, count: int, report: Callable[[int, bytes], Awaitable[None]], done: Callable[[], Awaitable[None]]
    ) -> bool: ...
    async def may(self, report: Callable[[int], Awaitable[None]] | None = None) -> int: ...
    async def ask(self, question: Callable[[str], Awaitable[list[int]]]) -> int: ...
    def steps(
        self, report: Callable[[int, str], Awaitable[None]]
    ) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...


class ReportingInMemory:
    async def copy(self, count: int, report: Any, done: Any) -> bool:
        for n in range(count):
            await report(n, b"\xff")
        await done()
        return current_request().deadline == math.inf

    async def may(self, report: Any = None) -> int:
        return 3 if report is None else 4

    async def ask(self, question: Any) -> int:
        raise AssertionError

    async def steps(self, report: Any) -> Any:
        for n in range(2):
            await report(n, str(n))
            yield n


class KeyedInMemory:
    async def echo(self, **values: Any) -> dict[str, str]:
        return {name: repr(value) for name, value in values.items()}

    async def back(self, names: dict[int, str]) -> dict[int, str]:
        return names


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    served = expose(Keyed, KeyedInMemory(), listed=True) | expose(Reporting, ReportingInMemory(), listed=True)
    with serving(str(tmp_path_factory.mktemp("cli") / "sock"), served, peer_user=lambda _: "tester") as found:
        yield found


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ('names:={"1": "a", "-20": "b", "0": "c"}', "{1: 'a', -20: 'b', 0: 'c'}"),
        ('{"names": {"18446744073709551615": ""}}', "{18446744073709551615: ''}"),
        ('shelf:={"boxes": {"7": [{"1": "a"}]}}', "Shelf(boxes={7: [{1: 'a'}]})"),
        ('shelves:={"3": {"boxes": {}}}', "{3: Shelf(boxes={})}"),
        ('levels:={"2": 5}', "{<Level.HIGH: 2>: 5}"),
        ('texts:={"2": 5}', "{'2': 5}"),
    ],
)
def test_names_become_integers_where_the_keys_are(run: Run, address: str, argument: str, value: str) -> None:
    ran = run("call", "--json", address, "Keyed.echo", argument)
    assert (ran.code, ran.err) == (0, "")
    assert list(ran.json.values()) == [value]


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ('names:={"x": "a"}', "names: $: expected an integer as a name, and got 'x'"),
        ('names:={"01": "a"}', "names: $: expected an integer as a name, and got '01'"),
        (
            'shelf:={"boxes": {"7": [{"": "a"}]}}',
            "shelf: $.boxes.7[0]: expected an integer as a name, and got ''",
        ),
        ('names:={"99999999999999999999": ""}', "names: can't serialize ints < -2**63"),
    ],
)
def test_a_name_that_is_no_integer_is_a_wrong_argument(
    run: Run, address: str, argument: str, error: str
) -> None:
    ran = run("call", address, "Keyed.echo", argument)
    assert (ran.code, ran.out) == (6, "")
    assert ran.error.startswith(error)


def test_what_comes_back_can_be_sent_again(run: Run, address: str) -> None:
    ran = run("call", "--json", address, "Keyed.back", 'names:={"1": "a"}')
    assert ran.json == {"1": "a"}
    assert run("call", "--json", address, "Keyed.back", f"names:={ran.out}").json == ran.json
    assert "names: an object with integers as names\n" in run("describe", address, "Keyed.back").out


# ---- callbacks ----


def test_what_is_called_back_is_a_line_each(run: Run, address: str) -> None:
    ran = run("call", address, "Reporting.copy", "count=2")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == '{"report": [0, "/w=="]}\n{"report": [1, "/w=="]}\n{"done": []}\ntrue\n'
    ran = run("call", "--seq", address, "Reporting.copy", "count=0")
    assert ran.out == '\x1e{"done": []}\n\x1etrue\n'


def test_a_method_may_stream_and_call_back(run: Run, address: str) -> None:
    ran = run("follow", address, "Reporting.steps")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert [each for each in lines if each.isdigit()] == ["0", "1"]
    assert [each for each in lines if not each.isdigit()] == ['{"report": [0, "0"]}', '{"report": [1, "1"]}']


def test_a_callback_that_may_be_left_out_is(run: Run, address: str) -> None:
    assert run("call", address, "Reporting.may").out == "3\n"


def test_a_callback_that_must_answer_cannot_be_given(run: Run, address: str) -> None:
    ran = run("call", address, "Reporting.ask")
    assert (ran.code, ran.out) == (6, "")
    assert ran.error == (
        "question: Reporting.ask takes a callback that returns list[int], and a command line cannot answer it"
    )


def test_callbacks_are_described(run: Run, address: str) -> None:
    described = run("describe", address, "Reporting.copy").out
    assert "    count: integer\n" in described
    assert (
        "    report: a callback that returns None: its calls are written as JSON, a line each\n" in described
    )
    assert described.endswith(f"""bokbok call {address} Reporting.copy '{{"count": 0}}'\n""")
    described = run("describe", address, "Reporting.ask").out
    assert "question: a callback that returns list[int]: a command line cannot answer it\n" in described


def test_output_that_cannot_be_written_ends_a_call_with_callbacks(run: Run, address: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with replaced(1, writer):
        os.close(writer)
        ran = run("call", address, "Reporting.copy", "count=100000")
    assert (ran.code, ran.err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_ends_a_call_with_callbacks(run: Run, address: str) -> None:
    with open("/dev/full", "wb") as full, replaced(1, full.fileno()):
        ran = run("call", address, "Reporting.copy", "count=100000")
    assert (ran.code, ran.error) == (1, "cannot write the output: No space left on device")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ([b"%back", b"2", b"", b"\x90"], "no-reference"),
        ([b"%back", b"1", b"method", b"\x90"], "no-reference"),
        ([b"%back"], "no-reference"),
        ([b"%back", b"1", b"", b"\x80"], "bad-arguments"),
        ([b"%back", b"1", b"", b"\xc1"], "bad-arguments"),
    ],
)
def test_calls_back_that_are_none(request_: list[bytes], code: str) -> None:
    connection: Any = None
    callbacks = Callbacks(["report"], Output())
    with pytest.raises(RequestError) as caught:
        trio.run(callbacks.handle_request, connection, request_)
    assert caught.value.code == code
    channel: Any = None
    with pytest.raises(RequestError, match="streams nothing"):
        trio.run(callbacks.handle_channel, connection, request_, channel)


@pytest.mark.parametrize("signature", ["f(x: <what>) -> None", "f(", "f(x: int): ...\nasync def g()", "\0"])
def test_a_signature_that_is_none_has_no_callbacks(signature: str) -> None:
    info = MethodInfo("f", "", signature, False, {}, {}, None, None, {})
    assert Listed("F.f", info, Schemas({})).callbacks == {}
