from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from bokbok_trio import Settings
from bokbok_trio._settings import MAX_BUDGET, MAX_MESSAGE_SIZE, MAX_REQUESTS, MIN_MESSAGE_SIZE
from bokbok_trio.instruments import Instrument, LogInstrument, RequestEnded


def test_the_defaults() -> None:
    assert dataclasses.asdict(Settings()) == {
        "max_message_size": 4 * 1024 * 1024,
        "max_requests": 100,
        "budget": None,
        "least_rate": 16384,
        "connect_timeout": 10.0,
        "handshake_timeout": 10.0,
        "ping_after": 20.0,
        "ping_timeout": 20.0,
        "describe_error": None,
        "max_connections": 1000,
        "max_connections_per_user": None,
        "max_handshakes": 512,
        "max_lookups": 64,
        "instruments": (),
        "_instruments": None,
    }


def test_the_budget_follows_the_message_size() -> None:
    assert Settings().effective_budget == 64 * 2**20
    assert Settings(max_message_size=2**20).effective_budget == 16 * 2**20
    assert Settings(max_message_size=2**20, budget=2**25).effective_budget == 2**25


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().max_requests = 1  # type: ignore[misc]


def test_settings_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        Settings(4096)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "values",
    [
        {"max_message_size": MIN_MESSAGE_SIZE, "max_requests": 1, "max_connections": 1, "max_handshakes": 1},
        {"max_lookups": 1},
        {"max_connections_per_user": 1},
        {"budget": 2**26},
        {"budget": 2**16, "max_message_size": 2**12},
        {"budget": MAX_BUDGET, "least_rate": 0},
        {"least_rate": 0.5},
        {"max_message_size": MAX_MESSAGE_SIZE, "max_requests": MAX_REQUESTS, "max_connections": 10**9},
        {"handshake_timeout": 1e-9},
        {"handshake_timeout": 5},
        {"handshake_timeout": math.inf, "connect_timeout": math.inf},
        {"describe_error": repr},
    ],
)
def test_what_is_in_range(values: dict[str, Any]) -> None:
    settings = Settings(**values)
    assert {name: getattr(settings, name) for name in values} == values


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_message_size", 4095, "max_message_size must be at least 4096 and at most 4294967295, not 4095"),
        ("max_message_size", 2**32, "max_message_size must be at least 4096 and at most 4294967295"),
        ("max_requests", 0, "max_requests must be at least 1 and at most 1000000, not 0"),
        ("max_requests", 10**6 + 1, "max_requests must be at least 1 and at most 1000000, not 1000001"),
        ("max_connections", 0, "max_connections must be at least 1, not 0"),
        ("max_handshakes", -1, "max_handshakes must be at least 1, not -1"),
        ("max_lookups", 0, "max_lookups must be at least 1, not 0"),
        ("max_connections_per_user", 0, "max_connections_per_user must be at least 1, not 0"),
        ("budget", 2**26 - 1, "budget must be at least 67108864 and at most 72057594037927936, not 67108863"),
        ("budget", MAX_BUDGET + 1, "budget must be at least 67108864 and at most 72057594037927936"),
        ("least_rate", -1, "least_rate must be 0 or more bytes a second, not -1"),
        ("least_rate", math.inf, "least_rate must be 0 or more bytes a second, not inf"),
        ("least_rate", math.nan, "least_rate must be 0 or more bytes a second, not nan"),
        ("connect_timeout", 0, "connect_timeout must be more than 0 seconds"),
        ("handshake_timeout", 0, "handshake_timeout must be more than 0 seconds"),
        ("handshake_timeout", -1.0, "handshake_timeout must be more than 0 seconds"),
        ("handshake_timeout", -math.inf, "handshake_timeout must be more than 0 seconds"),
        ("handshake_timeout", math.nan, "handshake_timeout must be more than 0 seconds"),
    ],
)
def test_what_is_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            (name, value, f"{name} must be an int, not {type(value).__name__}")
            for name in (
                "max_message_size",
                "max_requests",
                "max_connections",
                "max_handshakes",
                "max_lookups",
            )
            for value in (4096.0, "4096", None)
        ),
        *(
            (name, value, f"{name} must be a number of seconds, not {type(value).__name__}")
            for name in ("connect_timeout", "handshake_timeout", "ping_after", "ping_timeout")
            for value in ("10", None)
        ),
        ("budget", "1", "budget must be an int, not str"),
        ("max_connections_per_user", 1.0, "max_connections_per_user must be an int, not float"),
        ("least_rate", "1", "least_rate must be a number, not str"),
        ("describe_error", "text", "describe_error must be a function from an exception to a str"),
    ],
)
def test_what_is_no_such_thing(name: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        Settings(**{name: value})


def test_an_instrument_that_waits_is_refused() -> None:
    class Waiting(Instrument):
        async def request_ended(self, event: RequestEnded) -> None:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(TypeError, match=r"Waiting\.request_ended must not be async: nothing awaits it"):
        Settings(instruments=[Waiting()])


def test_an_instrument_that_is_there_twice_is_refused() -> None:
    log = LogInstrument()
    with pytest.raises(ValueError, match=r"LogInstrument object .* is in instruments twice"):
        Settings(instruments=[log, LogInstrument(), log])
    assert len(Settings(instruments=[log, LogInstrument()]).instruments) == 2
