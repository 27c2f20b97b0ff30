from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import trio

import bokbok_trio
from bokbok_trio import (
    AddressError,
    AuthenticationError,
    BokbokError,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    RequestError,
    _errors,
)
from bokbok_trio._errors import MAX_CODE_SIZE

# Class, its parent in the tree, and what else it is.
TREE: list[tuple[type[BokbokError], type[Exception], type[Exception] | None]] = [
    (BokbokError, Exception, None),
    (AddressError, BokbokError, ValueError),
    (HandshakeError, BokbokError, None),
    (AuthenticationError, HandshakeError, None),
    (ConnectionRefused, HandshakeError, None),
    (ConnectionClosed, BokbokError, trio.ClosedResourceError),
    (ConnectionLost, BokbokError, trio.BrokenResourceError),
    (ProtocolError, BokbokError, None),
    (MessageTooLarge, BokbokError, None),
    (RemoteError, BokbokError, None),
    (RequestError, BokbokError, None),
]


@pytest.mark.parametrize(("error", "parent", "also"), TREE)
def test_the_tree(error: type[BokbokError], parent: type[Exception], also: type[Exception] | None) -> None:
    assert error.__bases__ == ((parent,) if also is None else (parent, also))


def read_drawing(docstring: str) -> list[tuple[str, str, str | None]]:
    """The lines of a drawn tree: name, parent and what is in the parentheses."""
    lines = re.findall(r"^    ([ │├└─]*)(\w+)(?: +\(an? ([\w.]+)\))?$", docstring, re.MULTILINE)
    found: list[tuple[str, str, str | None]] = []
    above = {-1: "Exception"}
    for branches, name, also in lines:
        depth = len(branches) // 4
        above[depth] = name
        found.append((name, above[depth - 1], also or None))
    return found


@pytest.mark.parametrize("module", [bokbok_trio, _errors])
def test_the_drawing_shows_the_tree(module: Any) -> None:
    assert read_drawing(module.__doc__) == [
        (
            error.__name__,
            parent.__name__,
            None
            if also is None
            else f"trio.{also.__name__}"
            if also.__module__ != "builtins"
            else also.__name__,
        )
        for error, parent, also in TREE
    ]


def test_the_tree_is_all_there_is() -> None:
    defined = {value for value in vars(_errors).values() if isinstance(value, type)}
    assert defined == {error for error, _, _ in TREE}


@pytest.mark.parametrize("error", [error for error, _, _ in TREE])
def test_only_what_is_in_the_tree_may_be_subclassed(error: type[BokbokError]) -> None:
    assert getattr(error, "__final__", False) == (error not in {BokbokError, HandshakeError})


SAMPLES: list[tuple[BokbokError, str, dict[str, object]]] = [
    (BokbokError("why"), "why", {}),
    (AddressError("why"), "why", {}),
    (HandshakeError("why"), "why", {}),
    (AuthenticationError("why"), "why", {}),
    (ConnectionRefused("why", "busy"), "why [busy]", {"message": "why", "code": "busy"}),
    (ConnectionClosed("why"), "why", {}),
    (ConnectionLost("why"), "why", {"reason": "why", "may_have_run": True}),
    (ConnectionLost("why", may_have_run=False), "why", {"reason": "why", "may_have_run": False}),
    (ProtocolError("why"), "why", {}),
    (
        MessageTooLarge(11, 10),
        "the message takes 11 bytes, and this connection allows 10",
        {"size": 11, "limit": 10},
    ),
    (RemoteError("why", "timeout"), "why [timeout]", {"message": "why", "code": "timeout"}),
    (RequestError("why"), "why [request-error]", {"message": "why", "code": "request-error"}),
    (RequestError("", code="c"), " [c]", {"message": "", "code": "c"}),
]


def test_every_error_has_a_sample() -> None:
    assert {type(error) for error, _, _ in SAMPLES} == {error for error, _, _ in TREE}


@pytest.mark.parametrize(("error", "text", "attributes"), SAMPLES)
@pytest.mark.parametrize(
    "duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, lambda e: e]
)
def test_an_error_survives_pickling_and_copying(
    error: BokbokError, text: str, attributes: dict[str, object], duplicate: Any
) -> None:
    other = duplicate(error)
    assert type(other) is type(error)
    assert str(other) == text
    assert {name: getattr(other, name) for name in attributes} == attributes
    assert other.args == error.args


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((b"m",), TypeError, "a RequestError takes a message and a code, both str"),
        ((None,), TypeError, "a RequestError takes a message and a code, both str"),
        (("m", b"c"), TypeError, "a RequestError takes a message and a code, both str"),
        (("m", None), TypeError, "a RequestError takes a message and a code, both str"),
        (("m", ""), ValueError, "a code is 1 to 64 bytes of UTF-8, not ''"),
        (("m", "c" * 65), ValueError, "a code is 1 to 64 bytes of UTF-8, not 'ccc"),
        (("m", "\u00fc" * 33), ValueError, "a code is 1 to 64 bytes of UTF-8, not '\u00fc"),
        (("m", "\ud800"), ValueError, "surrogates not allowed"),
        (("m", "closing"), ValueError, "the code 'closing' is the connection's own"),
    ],
    ids=ascii,
)
def test_what_a_handler_gets_wrong(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RequestError(*arguments)


@pytest.mark.parametrize("code", ["c", "c" * MAX_CODE_SIZE, "\u00fc" * 32, "Closing", "closing "])
def test_a_code_that_will_do(code: str) -> None:
    assert RequestError("m", code).code == code
