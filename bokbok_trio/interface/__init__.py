"""Typed calls: one side serves the methods of a Python Protocol, and the other side calls them.

An interface is a class with annotated methods that have no code::

    class Files(Protocol):
        '''A file store.'''

        @idempotent
        @raises(NoSuchFile)
        async def stat(self, path: str, *, follow: bool = True) -> Stat: ...

        async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int: ...

        def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...

        async def copy(self, source: str, target: str, *,
                       progress: Callable[[float], Awaitable[None]]) -> None: ...

One side serves the interface with an object that has the same methods. The other side calls it through a
stand-in. Type checkers know every argument, result and item on both sides::

    async with open_server("localhost:12345", expose(Files, FilesOnDisk()), user_key=KEYS) as server: ...

    async with open_connection("localhost:12345", user="alice", key=key) as connection:
        files = consume(connection, Files)
        print((await files.stat("/etc/hosts")).size)
        async with files.follow("/var/log/syslog") as lines:
            async for line in lines: ...

Either side of a connection can serve interfaces, call them, or both. If a call is cancelled, its method is
cancelled too, and the method has the deadline of its caller. This package needs the extra ``interface``,
which installs msgspec.

What an interface may have
--------------------------

*Values*: numbers, str, bytes, bool, None, datetime, date, time, timedelta, UUID, Decimal, enums, Literal,
list, tuple, set, dict, dataclasses, attrs, ``msgspec.Struct``, NamedTuple, TypedDict, Any, unions whose
members differ on the wire, and ``Annotated`` with bounds by ``msgspec.Meta``. Two hooks convert values of
other types; see `expose`. Arguments are checked before a method runs, and results before they are sent.

*Streams*: a parameter of the type ``AsyncIterable`` is a stream of arguments. The caller's side sends its
items while the method runs, and closes the stream when the method has ended. A method that is not async and
returns ``AbstractAsyncContextManager[ReceiveChannel[...]]`` streams its results. Leaving the block cancels
the method, a slow reader slows it, and an exception of the method follows the items before it. A method can
have one stream of each direction.

*Callbacks and objects*: if the type of a parameter is an async ``Callable``, or another Protocol, the caller
lends its argument to the method for as long as the method runs. When the method has ended, both sides cancel
the calls of it that are under way, and later ones raise `trio.ClosedResourceError`.

*Errors*: the call raises the exceptions that the method declares with `raises`. It raises `RemoteError` for
all others.

`expose` and `consume` check an interface. They raise one ``TypeError`` with all problems, and say how to mend
each of them.

Around the calls
----------------

- `Middleware`, ``async def middleware(call, proceed)``, runs around every call, on either side.
- `with_options` sends a context with each call of a stand-in, or makes all its calls repeatable.
- `idempotent` marks one method as repeatable: a `ReconnectingConnection` then repeats its calls.
- `current_request` tells a method which connection and user a call comes from.
- `list_interfaces` asks the other side which interfaces it serves.
- `bokbok_trio.testing.consume_local` connects both sides in memory, for tests.

``docs/interfaces.rst`` has the rules, the format on the wire, and the changes that older peers can bear.
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
