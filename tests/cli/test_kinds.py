"""Arguments that JSON has no kind for: maps with integers as keys."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from bokbok_trio.interface import expose
from tests.support.cli import Run, run, serving

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


class KeyedInMemory:
    async def echo(self, **values: Any) -> dict[str, str]:
        return {name: repr(value) for name, value in values.items()}

    async def back(self, names: dict[int, str]) -> dict[int, str]:
        return names


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    served = expose(Keyed, KeyedInMemory(), listed=True)
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
