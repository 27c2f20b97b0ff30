"""What went wrong, in words: reasons are never empty, and name their causes."""

from __future__ import annotations

import pytest
import trio

from bokbok_trio._trio_util import MAX_CAUSES, describe_error


def caused(error: BaseException, cause: BaseException | None, *, hidden: bool = False) -> BaseException:
    if hidden:
        error.__context__, error.__suppress_context__ = cause, True
    else:
        error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad"), "bad"),
        (ValueError(), "ValueError"),
        (caused(ValueError("bad"), KeyError("worse")), "bad"),
        (
            caused(trio.BrokenResourceError(), OSError("certificate verify failed")),
            "BrokenResourceError: certificate verify failed",
        ),
        (
            caused(trio.BrokenResourceError(), caused(ValueError(), KeyError())),
            "BrokenResourceError: ValueError: KeyError",
        ),
        (caused(ValueError(), OSError("elsewhere"), hidden=True), "ValueError"),
    ],
)
def test_an_error_is_never_described_by_nothing(error: BaseException, text: str) -> None:
    assert describe_error(error) == text


def test_causes_in_a_circle_and_contexts_are_described_too() -> None:
    error = ValueError()
    error.__cause__ = error
    assert describe_error(error) == ": ".join(["ValueError"] * MAX_CAUSES)
    with pytest.raises(trio.BrokenResourceError) as caught:
        try:
            raise OSError("reset")
        finally:
            raise trio.BrokenResourceError
    assert describe_error(caught.value) == "BrokenResourceError: reset"
