"""What is lent for as long as a call: callbacks, and objects that have an interface.

The side that calls keeps what it lends under a number, until the call has ended. The other side calls it by a
request the other way, and these are answered whatever else the connection has for a handler. Each side
revokes by itself when the call has ended there, and cancels what is under way: nothing needs to be sent for
it, and a peer that goes on to call gets an error.
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
"""Seconds that what was lent may take to end, once it was cancelled with its call."""


@final
class Lender:
    """All that is lent over a connection, by number."""

    def __init__(self) -> None:
        self._lent: dict[bytes, Lent] = {}
        self._count = 0

    def lend(self, method: MethodCoder, arguments: dict[Any, Any] | list[Any]) -> Loan:
        """Put numbers in the place of the arguments that are lent; None stays where it may be.

        Arguments:
            method: what is called.
            arguments: of the call, by name or in a list.

        Raises:
            TypeError: one cannot be called, or does not have its interface.
        """
        passed = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
        given = {
            key: passed[key]
            for key in method.references
            if key in passed and (passed[key] is not None or key not in method.optional)
        }
        for key, value in given.items():  # all of them, before any is lent
            _check(method.references[key], value)
        loan = Loan(self._lent)
        for key, value in given.items():
            self._count += 1
            arguments[key] = self._count
            loan.add(b"%d" % self._count, Lent(method.references[key], value, loan))
        return loan

    def find(self, number: bytes) -> Lent:
        """Find what is lent.

        Raises:
            RequestError: nothing is.
        """
        try:
            return self._lent[number]
        except KeyError:
            raise RequestError("nothing is lent by this number, or no longer", NO_REFERENCE) from None


def _check(coder: InterfaceCoder, value: object) -> None:
    """Check that something can be lent, and remember a class whose objects all can."""
    cls = type(value)
    if cls not in coder.fitting:
        check_fit(coder.interface, value)
        names = (each.method.name for each in coder.methods.values())
        if "" not in coder.methods and all(hasattr(cls, each) for each in names):
            coder.fitting.add(cls)


@final
class Lent:
    """An object or a function that is lent."""

    __slots__ = ("_coder", "_value", "loan")

    def __init__(self, coder: InterfaceCoder, value: Any, loan: Loan) -> None:
        self._coder = coder
        self._value = value
        self.loan = loan

    def find(self, name: bytes) -> tuple[MethodCoder, Any]:
        """Find a method: its codecs, and what to call.

        Raises:
            RequestError: the interface has none of that name.
        """
        coder = self._coder.methods.get(name.decode(errors="replace"))
        if coder is None:
            raise RequestError(f"{self._coder.interface.name} has no such method", "no-method")
        return coder, getattr(self._value, coder.method.name)


@final
class Loan:
    """What one call lends, until that ends.

    Arguments:
        lent: where it is kept, by number.
    """

    __slots__ = ("_idle", "_lent", "_numbers", "_scopes")

    def __init__(self, lent: dict[bytes, Lent]) -> None:
        self._lent = lent
        self._numbers: list[bytes] = []
        self._scopes: set[trio.CancelScope] = set()
        self._idle: trio.Event | None = None

    def add(self, number: bytes, lent: Lent) -> None:
        """Keep something."""
        self._numbers.append(number)
        self._lent[number] = lent

    @contextmanager
    def use(self) -> Generator[None]:
        """Use some of it, in a block that is cancelled when the call has ended.

        Raises:
            RequestError: it has.
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
        """Revoke it, and wait for what is under way, whether the call was cancelled or not."""
        for number in self._numbers:
            del self._lent[number]
        if self._scopes:
            self._idle = trio.Event()
            for scope in self._scopes:
                scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + REVOKE_PATIENCE):
                await self._idle.wait()


@final
class Lease:
    """On the side that has the method: whether what was lent to it may still be called."""

    __slots__ = ("_is_over", "_scopes")

    def __init__(self) -> None:
        self._is_over = False
        self._scopes: set[trio.CancelScope] = set()

    def end(self) -> None:
        """The method has ended."""
        self._is_over = True
        for scope in self._scopes:
            scope.cancel()

    def as_closed(self) -> trio.ClosedResourceError:
        """The error of a call that came too late."""
        return trio.ClosedResourceError("the call that this was lent to has ended")

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[None]:
        """Call something of it, in a block that is cancelled when the method has ended.

        Raises:
            trio.ClosedResourceError: it has.
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
