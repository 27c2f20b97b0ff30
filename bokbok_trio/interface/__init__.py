"""Typed calls: a Python Protocol is the interface, one side serves it, and the other calls it.

An interface is a class with annotated methods and nothing in them::

    class Files(Protocol):
        '''A file store.'''

        @idempotent
        @raises(NoSuchFile)
        async def stat(self, path: str, *, follow: bool = True) -> Stat: ...

        async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int: ...

        def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...

        async def copy(self, source: str, target: str, *,
                       progress: Callable[[float], Awaitable[None]]) -> None: ...

One side serves it by an object with the same methods, the other calls it by a stand-in, and type checkers
know every argument, result and item on both sides::

    async with open_server("localhost:12345", expose(Files, FilesOnDisk()), user_key=KEYS) as server: ...

    async with open_connection("localhost:12345", user="alice", key=key) as connection:
        files = consume(connection, Files)
        print((await files.stat("/etc/hosts")).size)
        async with files.follow("/var/log/syslog") as lines:
            async for line in lines: ...

Either side of a connection may do either, or both. A cancelled call cancels its method, and the deadline
here is the deadline there. It needs the extra ``interface``, which is msgspec.

What an interface may have
--------------------------

Values: numbers, str, bytes, bool, None, datetime, date, time, timedelta, UUID, Decimal, enums, Literal,
list, tuple, set, dict, dataclasses, attrs, ``msgspec.Struct``, NamedTuple, TypedDict, Any, unions as far as
their members can be told apart, and ``Annotated`` with bounds by ``msgspec.Meta``. Others travel by two
hooks; see `expose`. Arguments are checked before a method runs, and results before they are sent.

Streams: a parameter that is an ``AsyncIterable`` is pulled while the method runs, and closed when it has
ended. A method that is not async and returns ``AbstractAsyncContextManager[ReceiveChannel[...]]`` streams
its results: leaving the block cancels it, a slow reader slows it, and what it raises comes after the items
before. A method may have one of each.

Callbacks and objects: a parameter that is an async ``Callable``, or another Protocol, is lent to the method
for as long as it runs. Then a call of it raises `trio.ClosedResourceError`, and calls under way are
cancelled, on both sides.

Errors: what a method declares by `raises` comes out of the call as it is. All else is a `RemoteError`.

All that is wrong with an interface is told in one ``TypeError`` by `expose` and `consume`, with what to
write instead.

What goes around calls
----------------------

`Middleware` is around every call of an `expose` or a `consume`. `with_options` gives a stand-in a context,
or lets it repeat its calls over a `ReconnectingConnection`, as the mark `idempotent` does for a method. In
a method, `current_request` tells whose call it is. `list_interfaces` asks what the other side serves. And
for tests, `bokbok_trio.testing.consume_local` is both ends in memory.

``docs/interfaces.rst`` has the rules, the wire, and what may change without breaking older peers.
"""

from ._calls import Call as Call, Middleware as Middleware, Proceed as Proceed
from ._codec import DecodeHook as DecodeHook, EncodeHook as EncodeHook
from ._consuming import consume as consume, with_options as with_options
from ._exposing import Exposed as Exposed, expose as expose
from ._listing import (
    InterfaceInfo as InterfaceInfo,
    MethodInfo as MethodInfo,
    list_interfaces as list_interfaces,
)
from ._marks import idempotent as idempotent, raises as raises

# Tracebacks, reprs and pickles show the public name, not the file.
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("bokbok_trio.interface."):
        _public.__module__ = "bokbok_trio.interface"
