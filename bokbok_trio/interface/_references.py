"""References: callbacks, and objects with an interface, that one side lends to the other during a call.

The calling side keeps each lent object under a number until the call has ended. The other side calls the
object with a request the other way. An added handler answers these requests (see `add_handler`).
When the call has ended on a side, that side revokes the references and cancels the calls of them that are
under way. Revoking sends nothing; a peer that calls a reference later gets an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, final

import trio

from bokbok_trio import RequestError

from ._coding import InterfaceCoder, MethodCoder
from ._fit import check_fit

NO_REFERENCE: Final = "no-reference"

REVOKE_PATIENCE: Final = 1.0
"""Seconds for which a finished call waits for cancelled calls of the objects that it lent."""


@final
class Lender:
    """All objects that one side of a connection lends, by number."""

    def __init__(self) -> None:
        self._lent: dict[bytes, Lent] = {}
        self._count = 0

    def lend(self, method: MethodCoder, arguments: dict[Any, Any] | list[Any]) -> Loan:
        """Lend some arguments of a call, and put their numbers in their place. An optional None stays.

        Arguments:
            method: the codecs of the method that is called.
            arguments: the arguments, by name or in a list.

        Raises:
            TypeError: an argument cannot be called, or does not have its interface. Nothing is lent then.
        """
        passed = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
        given = {
            key: passed[key]
            for key in method.references
            if key in passed and (passed[key] is not None or key not in method.optional)
        }
        for key, value in given.items():  # check all of them before any is lent
            _check(method.references[key], value)
        loan = Loan(self._lent)
        for key, value in given.items():
            self._count += 1
            arguments[key] = self._count
            loan.add(b"%d" % self._count, Lent(method.references[key], value, loan))
        return loan

    def find(self, number: bytes) -> Lent:
        """Find a lent object by its number.

        Raises:
            RequestError: no object has that number.
        """
        try:
            return self._lent[number]
        except KeyError:
            raise RequestError(
                "no lent object has this number, or its call has ended", NO_REFERENCE
            ) from None


def _check(coder: InterfaceCoder, value: object) -> None:
    """Check that an object can be lent. Remember its class if all its objects can."""
    cls = type(value)
    if cls not in coder.fitting:
        check_fit(coder.interface, value)
        names = (each.method.name for each in coder.methods.values())
        if "" not in coder.methods and all(hasattr(cls, each) for each in names):
            coder.fitting.add(cls)


@final
class Lent:
    """A lent object or function."""

    __slots__ = ("_coder", "_value", "loan")

    def __init__(self, coder: InterfaceCoder, value: Any, loan: Loan) -> None:
        self._coder = coder
        self._value = value
        self.loan = loan

    def find(self, name: bytes) -> tuple[MethodCoder, Any]:
        """Find a method: its codecs, and the function to call.

        Raises:
            RequestError: the interface has no method of that name.
        """
        coder = self._coder.methods.get(name.decode(errors="replace"))
        if coder is None:
            raise RequestError(f"{self._coder.interface.name} has no such method", "no-method")
        return coder, getattr(self._value, coder.method.name)


@final
class Loan:
    """The objects that one call lends, until the call ends.

    Arguments:
        lent: the dict of all lent objects, by number.
    """

    __slots__ = ("_idle", "_lent", "_numbers", "_scopes")

    def __init__(self, lent: dict[bytes, Lent]) -> None:
        self._lent = lent
        self._numbers: list[bytes] = []
        self._scopes: set[trio.CancelScope] = set()
        self._idle: trio.Event | None = None

    def add(self, number: bytes, lent: Lent) -> None:
        """Lend one more object."""
        self._numbers.append(number)
        self._lent[number] = lent

    @contextmanager
    def use(self) -> Generator[None]:
        """Use a lent object in a block that is cancelled when the call has ended.

        Raises:
            RequestError: the call has ended.
        """
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
                return
            finally:
                self._scopes.remove(scope)
                if self._idle is not None and not self._scopes:
                    self._idle.set()
        raise RequestError("the call that this was lent to has ended", NO_REFERENCE)

    async def end(self) -> None:
        """Revoke the objects, cancel the calls of them that are under way, and wait for these."""
        for number in self._numbers:
            del self._lent[number]
        if self._scopes:
            self._idle = trio.Event()
            for scope in self._scopes:
                scope.cancel()
            # Shielded, because the call may have been cancelled, and must not end before its callbacks do.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + REVOKE_PATIENCE):
                await self._idle.wait()


@final
class Lease:
    """Tells, on the side that has the method, whether the objects lent to it may still be called."""

    __slots__ = ("_is_over", "_scopes")

    def __init__(self) -> None:
        self._is_over = False
        self._scopes: set[trio.CancelScope] = set()

    def end(self) -> None:
        """Note that the method has ended, and cancel the calls that are under way."""
        self._is_over = True
        for scope in self._scopes:
            scope.cancel()

    def as_closed(self) -> trio.ClosedResourceError:
        """Return the error of a call that is too late."""
        return trio.ClosedResourceError("the call that this was lent to has ended")

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[None]:
        """Call a lent object in a block that is cancelled when the method has ended.

        Raises:
            trio.ClosedResourceError: the method has ended.
        """
        if not self._is_over:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    yield
                    return
                finally:
                    self._scopes.remove(scope)
        await trio.lowlevel.checkpoint()
        raise self.as_closed()
