"""`Call` and middleware, and the running of a call in a context of its own.

Middleware of a caller runs in the caller's task, where a context variable that it sets would stay set. So
each step of a call with middleware runs in a copy of the caller's context. A stream is a block in the middle
of its call: the call runs until it hands its items over, stops while the caller's block runs, and goes on
when the caller leaves the block, as a generator of `contextlib.asynccontextmanager` does. `_advance` does
both.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import trio

if TYPE_CHECKING:
    from bokbok_trio import Connection, ReconnectingConnection


@final
@dataclass(frozen=True, kw_only=True)
class Call:
    """A call, as middleware sees it.

    Middleware may proceed with a changed copy, made by `dataclasses.replace`. Changed arguments take effect
    on both sides, and a changed context on the caller's side. The other attributes are information only.

    Attributes:
        interface: the name of the interface.
        method: the name of the method, without the name of the interface.
        arguments: the arguments that the caller gave, by name. A stream is an async iterable; callbacks and
            objects that are lent can be called.
        context: names and values sent with the call; see `Connection.request`.
        connection: the connection that carries the call.
    """

    interface: str
    method: str
    arguments: Mapping[str, Any]
    context: Mapping[str, bytes | str]
    connection: Connection | ReconnectingConnection


Proceed: TypeAlias = Callable[[Call], Awaitable[Any]]
"""``await proceed(call)`` goes on with a call and returns its result. For a stream of results it
returns None, when the stream has ended."""

Middleware: TypeAlias = Callable[[Call, Proceed], Awaitable[Any]]
"""``async def middleware(call, proceed)`` runs around every call, on either side, and returns its result.

::

    async def only_admins(call, proceed):
        if call.connection.user != "admin":
            raise RequestError("not for you", code="forbidden")
        return await proceed(call)

A call lasts as long as its streams, so ``proceed`` returns when they have ended. If middleware sets a context
variable before it calls ``proceed``, this call sees the value, and no other call does.
"""


def run_middleware(middleware: tuple[Middleware, ...], call: Call, proceed: Proceed) -> Awaitable[Any]:
    """Run a call through the middleware, the first one outermost, and then through `proceed`."""
    if not middleware:
        return proceed(call)
    first, *rest = middleware
    return first(call, lambda call: run_middleware(tuple(rest), call, proceed))


def check_middleware(middleware: Iterable[Middleware]) -> tuple[Middleware, ...]:
    """Check that middleware is a sequence of functions, before any call."""
    if callable(middleware):
        raise TypeError(f"middleware is a list: write middleware=[{getattr(middleware, '__name__', '...')}]")
    found = tuple(middleware)
    for each in found:
        if not callable(each):
            raise TypeError(f"middleware must be async functions of (call, proceed), and {each!r} is not one")
    return found


HandOver: TypeAlias = Callable[[Any], Awaitable[None]]
"""Hands a value over to the block around a call, and returns when the caller leaves the block."""


class _Step(NamedTuple):
    """The value that a coroutine handed over to a block, or returned."""

    value: Any
    is_handed: bool


@types.coroutine
def _hand_over(value: Any) -> Generator[Any, Any, None]:
    """Stop the coroutine, hand a value over to the block around it, and go on when the caller leaves that."""
    yield _Step(value, is_handed=True)


@types.coroutine
def _advance(
    context: Context, work: Coroutine[Any, Any, Any], error: BaseException | None = None
) -> Generator[Any, Any, _Step]:
    """Run a coroutine in a context, in the current task, until it hands a value over or returns."""
    resume: Callable[[Any], Any] = work.send if error is None else work.throw
    value: Any = error
    try:
        while True:
            try:
                message = context.run(resume, value)
            except StopIteration as done:
                return _Step(done.value, is_handed=False)
            if isinstance(message, _Step):
                return message
            try:
                value, resume = (yield message), work.send
            except BaseException as exc:  # noqa: BLE001  (the coroutine gets it)
                value, resume = exc, work.throw
    finally:
        del error, value, resume  # or this frame and the error would keep each other alive


async def run_apart(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a copy of the context, in the current task."""
    return (await _advance(copy_context(), work)).value


@final
class _BlockClosed(BaseException):
    """Raised in a call whose block is left by a `GeneratorExit`."""


@final
class Block(AbstractAsyncContextManager[Any]):
    """The block of a stream. Entering it runs a coroutine until that hands its items over, and leaving it
    runs the rest of the coroutine.

    Arguments:
        run: an async function. Its argument is the function that hands the items over.
        path: the method, for errors.
    """

    def __init__(self, run: Callable[[HandOver], Coroutine[Any, Any, Any]], path: str) -> None:
        self._run = run
        self._path = path
        self._work: Coroutine[Any, Any, Any] | None = None
        self._context = copy_context()
        self._was_handed = False
        self._task: trio.lowlevel.Task | None = None

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Any:
        if self._work is not None:
            raise RuntimeError(f"a stream of {self._path} can be entered once; call the method again")
        self._task = trio.lowlevel.current_task()
        self._work = self._run(self._hand_over)
        step = await _advance(self._context, self._work)
        if not step.is_handed:
            raise RuntimeError(
                f"middleware did not proceed with a stream of {self._path}; raise an error instead"
            )
        return step.value

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._work is not None
        # `GeneratorExit` comes here if a generator is closed while the block is open in it. Throwing it into
        # a coroutine closes the coroutines that this one awaits. They could not await again, and so not end
        # their streams and loans.
        thrown = _BlockClosed() if isinstance(exc, GeneratorExit) else exc
        try:
            await _advance(self._context, self._work, thrown)
        except BaseException as raised:
            # An exception that is thrown into a coroutine comes out unchanged, except a StopIteration: see
            # PEP 479.
            is_own = raised is thrown or (isinstance(exc, StopIteration) and raised.__cause__ is exc)
            if exc is None or not is_own:
                raise
            exc.__traceback__ = traceback  # without the frames of this module
            return False
        else:
            return exc is not None
        finally:
            del exc, thrown, traceback  # or this frame and the error would keep each other alive

    async def _hand_over(self, value: Any) -> None:
        # These errors are raised inside the call, so that it leaves its nurseries in order. Closing the
        # coroutine from outside would not do that.
        if self._was_handed:
            raise RuntimeError(f"middleware proceeded twice with a stream of {self._path}")
        if trio.lowlevel.current_task() is not self._task:
            raise RuntimeError(
                f"middleware proceeded with a stream of {self._path} in a task of a nursery; await proceed "
                "itself"
            )
        self._was_handed = True
        await _hand_over(value)
