"""Exceptions, nurseries and Ctrl-C: what comes out of a nursery of ours, and what must not.

Trio wraps what leaves a nursery in an exception group. A user who writes ``async with
open_connection(...)`` did not ask for a nursery, so what the body raises must come out as itself;
and no failure of a handler may come out at all.

State of ours moves in tasks of the user, where Ctrl-C may raise ``KeyboardInterrupt`` between any two
steps. So what moves state is marked by `trio.lowlevel.enable_ki_protection`, and calls the user's code by
`call_user` alone, which lets Ctrl-C in again.
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
"""How many causes of an exception `describe_error` follows; causes can be a circle."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_P = ParamSpec("_P")


@trio.lowlevel.disable_ki_protection
async def call_user(function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> _T:
    """Call an async function of the user's, in which Ctrl-C may raise ``KeyboardInterrupt`` at once."""
    return await function(*args)


@trio.lowlevel.disable_ki_protection
def call_user_sync(function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
    """Call a function of the user's, in which Ctrl-C may raise ``KeyboardInterrupt`` at once."""
    return function(*args)


def describe_error(error: BaseException) -> str:
    """Say what is wrong, for a log line or a message. Never empty.

    Some exceptions have no text, such as those of Trio's TLS streams, but a cause that has one.
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
    """Tell apart what a piece of user code raised, in the task that ran it.

    Returns:
        Its failure, to be logged; and what must be raised on, by itself: the first
        ``KeyboardInterrupt`` or ``SystemExit`` in it, else its ``Cancelled``, which belongs
        to a scope outside. Either may be None. A crash during a cancellation has both. A
        ``Cancelled`` where nothing is cancelled, kept from earlier and raised again, is a failure.
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
    """What of it is no cancellation, and what is."""
    if isinstance(exc, BaseExceptionGroup):
        cancelled, error = cast("_Group", exc).split(trio.Cancelled)
        return error, cancelled
    return (None, exc) if isinstance(exc, trio.Cancelled) else (exc, None)


def find_single(exc: BaseException) -> BaseException:
    """The only error in a group, besides cancellations and at whatever depth; else the error itself."""
    leaves = [leaf for leaf in _find_leaves(exc) if not isinstance(leaf, trio.Cancelled)]
    return leaves[0] if len(leaves) == 1 else exc


def _find_leaves(exc: BaseException) -> Generator[BaseException]:
    members = _members(exc)
    if not members:
        yield exc
    for member in members:
        yield from _find_leaves(member)


def forget_traceback(exc: BaseException) -> None:
    """Drop the frames that an error refers to, as nobody needs them any more.

    An error that was made once and is raised again and again would gather them, with all that their
    local variables hold.
    """
    exc.__traceback__ = None
    for member in _members(exc):
        forget_traceback(member)


@contextmanager
def isolate_failures(log: Callable[[BaseException], object]) -> Generator[None]:
    """Give the failure of a block to `log`, in place of raising it.

    `split_exception` says what is raised nevertheless.
    """
    try:
        yield
    except BaseException as exc:  # noqa: BLE001  (what is not logged is raised on)
        log_or_reraise(exc, log)


def log_or_reraise(exc: BaseException, log: Callable[[BaseException], object]) -> None:
    """Give a failure to `log`, and raise what must go further, as `split_exception` tells."""
    error, rest = split_exception(exc)
    if error is not None:
        log(error)
        forget_traceback(exc if rest is None else error)  # a group was split into a new one
    if rest is not None:
        try:
            raise rest from rest.__cause__
        finally:
            # Or this frame and the traceback would keep each other alive.
            del exc, error, rest


def innermost_scope(task: trio.lowlevel.Task) -> object:
    """Return what stands for the innermost cancel scope that a task is in, to be compared by ``is``.

    Trio has no public way to ask, and to find out by leaving a scope costs a small request a fifth more.
    Where the attribute is missing, a scope that was left open shows later, when the one around it is left.
    """
    return getattr(task, "_cancel_status", None)


@final
class _Block(AbstractAsyncContextManager[_T]):
    """A context manager that Ctrl-C leaves whole: it is entered or it is not, left or not."""

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
    """As `contextlib.asynccontextmanager`, but protected from Ctrl-C outside of the body."""
    make = asynccontextmanager(function)

    @wraps(function)
    def start(*args: _P.args, **kwargs: _P.kwargs) -> AbstractAsyncContextManager[_T]:
        return _Block(make(*args, **kwargs))

    return start


@final
class bare_nursery:  # noqa: N801  (as `trio.open_nursery`)
    """Open a nursery that adds no exception group of its own; the body must see that the children end.

    Of what is raised, this comes out, as itself: what a child raised that ends the program; else
    what the body raised; else what a child raised; else, if the whole was cancelled, that.

    Raises:
        RuntimeError: on leaving: another task than the one that entered it leaves it, or before a
            nursery or block that was entered after it. Trio would wait for ever, or crash.
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
                "this block is left in another task than it was entered in, or not in turn; "
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
                del error  # or this frame and its traceback would keep each other alive
        return False


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    """What is in a group; nothing, where it is none."""
    return cast("_Group", exc).exceptions if isinstance(exc, BaseExceptionGroup) else ()


def check_run(home: trio.lowlevel.TrioToken, what: object) -> None:
    """Refuse a call that does not come from the Trio run, and so the thread, that something belongs to.

    Its state and its tasks are that run's: a change from another one corrupts both.

    Raises:
        RuntimeError: it comes from another run or thread, or from no Trio task.
    """
    try:
        if trio.lowlevel.current_trio_token() is home:
            return
    except RuntimeError:
        pass  # no Trio run in this thread
    raise RuntimeError(f"{what!r} belongs to another Trio run; call it there, with trio.from_thread.run")


async def check_cancelled() -> None:
    """Raise the cancellation in force here, if there is one; else go on at once.

    Other than `trio.lowlevel.checkpoint_if_cancelled` it sees a deadline that passed while the task computed,
    and that Trio has not noticed.
    """
    deadline = trio.current_effective_deadline()
    if deadline < math.inf and deadline <= trio.current_time():
        await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint_if_cancelled()


@final
class LazyEvent:
    """Something that happens once. A `trio.Event` is made only where a task waits for it.

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
    """Whether the current task is that one, or was started by it, at any remove."""
    task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
    while task is not None and task is not ancestor:
        task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    return task is not None
