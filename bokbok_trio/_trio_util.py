"""Exceptions, nurseries, cancellation and Ctrl-C, where the library and the user's code meet.

Trio wraps the exceptions that leave a nursery in an exception group. A user who writes ``async with
open_connection(...)`` did not ask for a nursery. So an exception of the body must leave the block as itself,
and no error of a handler may leave it at all.

The state of the library changes in tasks of the user too, where Ctrl-C may raise ``KeyboardInterrupt``
between any two steps. So functions that change state are marked by `trio.lowlevel.enable_ki_protection`, and
they call the user's code through `call_user`, which allows Ctrl-C again.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, ParamSpec, TypeVar, TypeVarTuple, cast, final

import trio

from ._errors import escape

if TYPE_CHECKING:
    _Group = BaseExceptionGroup[BaseException]

MAX_CAUSES: Final = 4
"""How many causes of an exception `describe_error` follows; causes can form a circle."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_P = ParamSpec("_P")


@trio.lowlevel.disable_ki_protection
async def call_user(function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> _T:
    """Call an async function of the user. Ctrl-C may raise ``KeyboardInterrupt`` in it at once."""
    return await function(*args)


@trio.lowlevel.disable_ki_protection
def call_user_sync(function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
    """Call a function of the user. Ctrl-C may raise ``KeyboardInterrupt`` in it at once."""
    return function(*args)


def describe_error(error: BaseException) -> str:
    """Return an error as text for a log line or a message. The text is never empty.

    Some exceptions, such as those of Trio's TLS streams, have no text, but a cause that has one.
    """
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(names) < MAX_CAUSES:
        if text := escape(str(cause)):
            return ": ".join([*names, text])
        names.append(type(cause).__name__)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ": ".join(names)


def split_exception(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Split an exception of the user's code, in the task that ran the code.

    Returns:
        The error, which the caller logs; and the exception that the caller must raise on: the first
        ``KeyboardInterrupt`` or ``SystemExit`` in it, else its ``Cancelled``, which belongs to a scope
        outside. Either may be None. A crash during a cancellation has both. A ``Cancelled`` that code kept
        from earlier and raised again, where nothing is cancelled, is an error.
    """
    fatal = _find_fatal(exc)
    if fatal is not None:
        return None, fatal
    error, cancelled = _split_cancelled(exc)
    if cancelled is not None and trio.current_effective_deadline() > -math.inf:
        return exc, None
    return error, cancelled


def _find_fatal(exc: BaseException) -> BaseException | None:
    if members := _members(exc):
        return next(filter(None, map(_find_fatal, members)), None)
    return exc if isinstance(exc, KeyboardInterrupt | SystemExit) else None


def _split_cancelled(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Return the part of an exception that is not a cancellation, and the part that is."""
    if isinstance(exc, BaseExceptionGroup):
        cancelled, error = cast("_Group", exc).split(trio.Cancelled)
        return error, cancelled
    return (None, exc) if isinstance(exc, trio.Cancelled) else (exc, None)


def find_single(exc: BaseException) -> BaseException:
    """Return the only error in a group, at any depth, besides cancellations; else the exception itself."""
    leaves = [leaf for leaf in _find_leaves(exc) if not isinstance(leaf, trio.Cancelled)]
    return leaves[0] if len(leaves) == 1 else exc


def _find_leaves(exc: BaseException) -> Generator[BaseException]:
    members = _members(exc)
    if not members:
        yield exc
    for member in members:
        yield from _find_leaves(member)


def forget_traceback(exc: BaseException) -> None:
    """Drop the frames that an error refers to.

    An error that is made once and raised many times would collect frames, and keep all their variables alive.
    """
    exc.__traceback__ = None
    for member in _members(exc):
        forget_traceback(member)


def forget_tracebacks(exc: BaseException) -> None:
    """Drop the frames that an error refers to, and those of the errors that led to it."""
    found = [exc]
    for error in found:
        error.__traceback__ = None
        for behind in (error.__cause__, error.__context__, *_members(error)):
            if behind is not None and all(behind is not each for each in found):  # causes can be a circle
                found.append(behind)


@contextmanager
def isolate_failures(log: Callable[[BaseException], object]) -> Generator[None]:
    """Pass the error of a block to `log`, and raise only what `split_exception` says must be raised on."""
    try:
        yield
    except BaseException as exc:  # noqa: BLE001  (`log_or_reraise` raises it on, if it must)
        log_or_reraise(exc, log)


def log_or_reraise(exc: BaseException, log: Callable[[BaseException], object]) -> None:
    """Pass an error to `log`, and raise what `split_exception` says must be raised on."""
    error, rest = split_exception(exc)
    if error is not None:
        log(error)
        forget_traceback(exc if rest is None else error)  # splitting a group made a new one
    if rest is not None:
        try:
            raise rest from rest.__cause__
        finally:
            # The traceback refers to this frame, and both would keep each other alive.
            del exc, error, rest


def innermost_scope(task: trio.lowlevel.Task) -> object:
    """Return an object that stands for the innermost cancel scope of a task. Compare it by ``is``.

    Trio has no public function for this. If the attribute is missing, this returns None for all tasks. Then a
    scope that was left open is noticed later, when the scope around it is left.
    """
    return getattr(task, "_cancel_status", None)


@final
class _Block(AbstractAsyncContextManager[_T]):
    """A context manager that Ctrl-C cannot leave half entered or half left."""

    __slots__ = ("_inner",)

    def __init__(self, inner: AbstractAsyncContextManager[_T]) -> None:
        self._inner = inner

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> _T:
        return await self._inner.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(type, exc, traceback)
        finally:
            del exc, traceback  # as in `log_or_reraise`


def block(function: Callable[_P, AsyncGenerator[_T]]) -> Callable[_P, AbstractAsyncContextManager[_T]]:
    """Do as `contextlib.asynccontextmanager`, but protect all but the body from Ctrl-C."""
    make = asynccontextmanager(function)

    @wraps(function)
    def start(*args: _P.args, **kwargs: _P.kwargs) -> AbstractAsyncContextManager[_T]:
        return _Block(make(*args, **kwargs))

    return start


@final
class bare_nursery:  # noqa: N801  (as `trio.open_nursery`)
    """Open a nursery that adds no exception group of its own. The body must make sure that the children end.

    It raises one exception as itself: a ``KeyboardInterrupt`` or ``SystemExit`` of a child; else the
    exception of the body; else that of a child; else the ``Cancelled``.

    Raises:
        RuntimeError: on leaving: the task is not the one that entered the nursery, or a nursery or block that
            was entered later has not been left. Trio would wait for ever, or crash.
    """

    __slots__ = ("_manager", "_nursery")

    def __init__(self) -> None:
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> trio.Nursery:
        self._nursery = await self._manager.__aenter__()
        return self._nursery

    async def __aexit__(
        self, _type: object, from_body: BaseException | None, _traceback: object
    ) -> Literal[False]:
        error: BaseException | None = None
        task = trio.lowlevel.current_task()
        if not task.child_nurseries or task.child_nurseries[-1] is not self._nursery:
            raise RuntimeError(
                "this block was left in another task than it was entered in, or before a later block; "
                "close a generator that has it open by `contextlib.aclosing`"
            )
        try:
            await self._manager.__aexit__(None, None, None)
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            fatal = _find_fatal(exc)
            if fatal is not None:
                raise fatal from fatal.__cause__
            if from_body is None or _split_cancelled(from_body)[0] is None:
                error = find_single(_split_cancelled(exc)[0] or exc)
        if error is not None:
            try:
                raise error
            finally:
                del error  # the traceback refers to this frame, and both would keep each other alive
        return False


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    """Return the members of a group; none for an exception that is not a group."""
    return cast("_Group", exc).exceptions if isinstance(exc, BaseExceptionGroup) else ()


def check_run(home: trio.lowlevel.TrioToken, what: object) -> None:
    """Refuse a call from another Trio run, or from another thread, than the one that an object belongs to.

    A change from outside would corrupt its state and its tasks.

    Raises:
        RuntimeError: the call comes from another run or thread, or from no Trio task.
    """
    try:
        if trio.lowlevel.current_trio_token() is home:
            return
    except RuntimeError:
        pass  # no Trio run in this thread
    raise RuntimeError(f"{what!r} belongs to another Trio run; call it there, with trio.from_thread.run")


async def check_cancelled() -> None:
    """Raise ``Cancelled`` if the task is cancelled; otherwise return at once.

    Unlike `trio.lowlevel.checkpoint_if_cancelled` it sees a deadline that passed while the task computed,
    before Trio has noticed.
    """
    deadline = trio.current_effective_deadline()
    if deadline < math.inf and deadline <= trio.current_time():
        await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint_if_cancelled()


@final
class LazyEvent:
    """An event that happens once. A `trio.Event` is made only if a task waits for it.

    Attributes:
        has_happened: whether `set` was called.
    """

    __slots__ = ("_event", "has_happened")

    def __init__(self) -> None:
        self.has_happened = False
        self._event: trio.Event | None = None

    def set(self) -> None:
        """Note that it happens now."""
        self.has_happened = True
        if self._event is not None:
            self._event.set()

    @property
    def event(self) -> trio.Event:
        """The event to wait for."""
        if self._event is None:
            self._event = trio.Event()
            if self.has_happened:
                self._event.set()
        return self._event

    async def wait(self) -> None:
        """Wait until it has happened."""
        await self.event.wait()


def current_task_is_under(ancestor: trio.lowlevel.Task | None) -> bool:
    """Return whether the current task is `ancestor`, or was started by it, directly or not."""
    task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
    while task is not None and task is not ancestor:
        task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    return task is not None
