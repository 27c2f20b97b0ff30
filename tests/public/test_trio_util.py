from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from bokbok_trio._trio_util import bare_nursery, current_task_is_under, isolate_failures, split_exception

# ---- split_exception ----


async def cancelled() -> trio.Cancelled:
    """Return a Cancelled, which only Trio can make."""
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as exc:
            return exc
    raise AssertionError


def shape(exc: BaseException | None) -> object:
    """Return an exception as its type, and a group as the list of its members."""
    if isinstance(exc, BaseExceptionGroup):
        return [shape(inner) for inner in exc.exceptions]
    return None if exc is None else type(exc)


def group(*exceptions: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("", exceptions)


# What user code raised, made with a Cancelled; what is to be logged; what is to be raised on.
Split = tuple[Callable[[trio.Cancelled], BaseException], object, object]
SPLITS: dict[str, Split] = {
    "error": (lambda _: ValueError(), ValueError, None),
    "errors": (lambda _: group(ValueError(), KeyError()), [ValueError, KeyError], None),
    "nested errors": (lambda _: group(group(ValueError())), [[ValueError]], None),
    "cancelled": (lambda c: c, None, trio.Cancelled),
    "group of cancelled": (lambda c: group(c, c), None, [trio.Cancelled, trio.Cancelled]),
    "nested cancelled": (lambda c: group(group(c)), None, [[trio.Cancelled]]),
    "error and cancelled": (lambda c: group(ValueError(), c), [ValueError], [trio.Cancelled]),
    "all over the place": (
        lambda c: group(group(c, ValueError()), KeyError(), c),
        [[ValueError], KeyError],
        [[trio.Cancelled], trio.Cancelled],
    ),
    "fatal": (lambda _: KeyboardInterrupt(), None, KeyboardInterrupt),
    "exit": (lambda _: SystemExit(3), None, SystemExit),
    "generator exit": (lambda _: GeneratorExit(), GeneratorExit, None),
    "fatal in a group": (lambda _: group(KeyboardInterrupt()), None, KeyboardInterrupt),
    "fatal deep in": (
        lambda c: group(ValueError(), group(c, group(KeyError(), SystemExit()))),
        None,
        SystemExit,
    ),
    "the first fatal": (lambda _: group(group(KeyboardInterrupt()), SystemExit()), None, KeyboardInterrupt),
    "fatal and cancelled": (lambda c: group(c, KeyboardInterrupt()), None, KeyboardInterrupt),
}


@pytest.mark.parametrize("name", SPLITS)
async def test_splitting(name: str) -> None:
    make, error, rest = SPLITS[name]
    exc = make(await cancelled())
    with trio.CancelScope() as scope:  # noqa: ASYNC100  (it only has to be cancelled)
        scope.cancel()
        assert tuple(map(shape, split_exception(exc))) == (error, rest)


@pytest.mark.parametrize("name", SPLITS)
async def test_a_cancelled_where_nothing_is_cancelled_is_a_failure(name: str) -> None:
    make, error, rest = SPLITS[name]
    exc = make(await cancelled())
    is_stale = "Cancelled" in str(rest)
    assert tuple(map(shape, split_exception(exc))) == ((shape(exc), None) if is_stale else (error, rest))


async def test_a_single_exception_is_not_copied() -> None:
    error, interrupt, cancel = ValueError(), KeyboardInterrupt(), await cancelled()
    with trio.CancelScope() as scope:  # noqa: ASYNC100  (it only has to be cancelled)
        scope.cancel()
        assert split_exception(error)[0] is error
        assert split_exception(group(interrupt))[1] is interrupt
        assert split_exception(cancel)[1] is cancel
        for part, inner in zip(split_exception(group(error, cancel)), (error, cancel), strict=True):
            assert isinstance(part, BaseExceptionGroup)
            assert part.exceptions[0] is inner


# ---- isolate_failures ----


def test_a_failure_is_contained_and_logged() -> None:
    error = ValueError()
    logged: list[BaseException] = []
    with isolate_failures(logged.append):
        raise error
    assert logged == [error]


def test_what_ends_the_program_goes_on_with_its_cause() -> None:
    cause = KeyError()
    logged: list[BaseException] = []
    with pytest.raises(SystemExit) as caught, isolate_failures(logged.append):
        try:
            raise SystemExit(3) from cause
        except SystemExit as exc:
            raise group(exc, ValueError()) from None
    assert caught.value.__cause__ is cause
    assert logged == []


async def test_a_crash_during_a_cancellation_is_logged_and_the_cancellation_goes_on() -> None:
    logged: list[BaseException] = []
    with trio.CancelScope() as scope:
        with isolate_failures(logged.append):
            scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise ValueError
        raise AssertionError
    assert scope.cancelled_caught
    assert list(map(shape, logged)) == [[ValueError]]


# ---- bare_nursery ----

BODY_EXCEPTIONS = [
    ValueError("mine"),
    StopIteration("mine"),
    StopAsyncIteration("mine"),
    GeneratorExit("mine"),
    KeyboardInterrupt("mine"),
    SystemExit(3),
    RuntimeError("mine"),
    ExceptionGroup("mine", [ValueError()]),
    BaseExceptionGroup("mine", [KeyboardInterrupt()]),
]


async def sleep_and_note(ended: list[str]) -> None:
    try:
        await trio.sleep_forever()
    finally:
        ended.append("child")


@pytest.mark.parametrize("error", BODY_EXCEPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("with_child", [False, True])
async def test_what_the_body_raises_comes_out_as_itself(error: BaseException, with_child: bool) -> None:
    ended: list[str] = []
    caught: BaseException | None = None
    try:
        async with bare_nursery() as nursery:
            if with_child:
                nursery.start_soon(sleep_and_note, ended)
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            raise error
    except BaseException as exc:
        caught = exc
    assert caught is error
    assert caught.__cause__ is None
    assert not caught.__suppress_context__
    assert ended == ["child"] * with_child


async def test_a_body_that_returns_waits_for_its_children() -> None:
    ended = []

    async def child() -> None:
        await trio.testing.wait_all_tasks_blocked()
        ended.append("child")

    async with bare_nursery() as nursery:
        nursery.start_soon(child)
    assert ended == ["child"]


@pytest.mark.parametrize("with_child", [False, True])
async def test_the_bodys_exception_beats_a_cancellation_from_outside(with_child: bool) -> None:
    error = ValueError()
    ended: list[str] = []
    with trio.CancelScope() as scope:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (compared by identity)
            async with bare_nursery() as nursery:
                if with_child:
                    nursery.start_soon(sleep_and_note, ended)
                    await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                raise error
        assert caught.value is error
    assert not scope.cancelled_caught
    assert ended == ["child"] * with_child


@pytest.mark.parametrize("children", [0, 1, 2])
@pytest.mark.parametrize("body_waits", [False, True])
async def test_a_cancellation_passes_out_to_its_own_scope(children: int, body_waits: bool) -> None:
    ended: list[str] = []
    after = False
    with trio.CancelScope() as outer:
        with trio.CancelScope() as inner:
            async with bare_nursery() as nursery:
                for _ in range(children):
                    nursery.start_soon(sleep_and_note, ended)
                await trio.testing.wait_all_tasks_blocked()
                outer.cancel()
                if body_waits:
                    await trio.sleep_forever()
            if children or body_waits:
                after = True  # not reached
        assert not inner.cancelled_caught
    assert outer.cancelled_caught == bool(children or body_waits)
    assert not after
    assert ended == ["child"] * children


async def test_its_own_cancellation_stays_inside() -> None:
    reached = False
    async with bare_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        nursery.cancel_scope.cancel()
        reached = True
    assert reached
    assert nursery.cancel_scope.cancelled_caught


@pytest.mark.parametrize("fatal", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("body", ["waits", "raises", "returns"])
async def test_what_is_fatal_in_a_child_comes_out_bare(fatal: BaseException, body: str) -> None:
    raising = trio.Event()
    body_was_cancelled = False

    async def child() -> None:
        await raising.wait()
        raise fatal

    caught: BaseException | None = None
    try:
        async with bare_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(trio.sleep_forever)
            raising.set()
            match body:
                case "waits":
                    try:
                        await trio.sleep_forever()
                    except trio.Cancelled:
                        body_was_cancelled = True
                        raise
                case "raises":
                    raise ValueError
    except BaseException as exc:
        caught = exc
    assert caught is fatal
    assert caught.__suppress_context__
    assert body_was_cancelled == (body == "waits")


@pytest.mark.parametrize(
    ("errors", "from_body", "comes_out"),
    [
        ([ValueError], None, ValueError),
        ([ValueError, KeyError], None, [ValueError, KeyError]),
        ([ValueError], OSError, OSError),
    ],
)
async def test_a_childs_error_comes_out_unless_the_body_has_its_own(
    errors: list[type[Exception]], from_body: type[Exception] | None, comes_out: object
) -> None:
    async def child(error: type[Exception]) -> None:
        raise error

    async def body() -> None:
        async with trio.open_nursery() as inner:  # its Cancelled comes in a group
            inner.start_soon(trio.sleep_forever)
            await trio.sleep_forever()

    caught: BaseException | None = None
    try:
        async with bare_nursery() as nursery:
            for error in errors:
                nursery.start_soon(child, error)
            try:
                await body()
            except BaseException:
                if from_body is None:
                    raise
                raise from_body from None
    except BaseException as exc:
        caught = exc
    found = shape(caught)
    if isinstance(found, list):
        found = sorted(found, key=str, reverse=True)  # the children run in any order
    assert found == comes_out


# ---- current_task_is_under ----


async def test_a_task_is_within_itself_and_those_that_started_it() -> None:
    me = trio.lowlevel.current_task()
    seen: dict[str, trio.lowlevel.Task] = {}

    async def child(name: str, depth: int) -> None:
        seen[name] = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:
            if depth:
                nursery.start_soon(child, name + "'", depth - 1)
        assert current_task_is_under(me)
        assert current_task_is_under(seen[name])
        assert [other for other in seen if current_task_is_under(seen[other])] == sorted(
            other for other in seen if name.startswith(other)
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child, "a", 2)
        nursery.start_soon(child, "b", 2)
    assert len(seen) == 6
    assert current_task_is_under(me)
    assert not current_task_is_under(seen["a"])
    assert not current_task_is_under(None)
