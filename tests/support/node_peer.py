"""Runs the second implementation in ``interop/node`` as a process that tests command, and connects to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import trio

from bokbok_trio import (
    Channel,
    Connection,
    Key,
    RequestError,
    Settings,
    TCPAddress,
    current_request,
    open_connection,
    open_server,
)

HOME: Final = Path(__file__).parents[2] / "interop" / "node"
USER: Final = "zoë"
KEY: Final = "d2" * 32

SMALL_PIECES: Final[dict[str, Any]] = {"wholeUpTo": 300, "pieceSize": 101, "recordSize": 37}
"""Settings for Node: packets in many pieces, and pieces in many records."""

Role = Literal["node dials", "node listens"]


def why_not() -> str | None:
    """Return why the Node peer cannot run here, or None. If `NODE_PEER` is set it must run, or tests fail."""
    if "NODE_PEER" in os.environ:
        return None
    if shutil.which("node") is None:
        return "there is no Node.js: install version 20 or later"
    if not (HOME / "node_modules").is_dir():
        return "the packages of interop/node are missing: run `npm ci` there"
    version = subprocess.run(["node", "--version"], capture_output=True, check=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        return f"Node.js {version} is too old: install version 20 or later"
    return None


class NodeError(Exception):
    """The error of a call of the Node peer."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["name"], error["message"])
        self.name: str = error["name"]
        self.message: str = error["message"]
        self.code: str | None = error["code"]
        self.details = error["details"].encode("latin-1")
        self.may_have_run: bool | None = error["mayHaveRun"]


class NodeProcess:
    """A Node peer that outlives tests."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._numbers = count()
        self._unread = b""
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}

    @asynccontextmanager
    async def ready(self) -> AsyncGenerator[None]:
        """Receive its answers in this Trio run during a block."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        async with (
            trio.lowlevel.FdStream(os.dup(self._process.stdin.fileno())) as self._stdin,
            trio.lowlevel.FdStream(os.dup(self._process.stdout.fileno())) as stdout,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._read, stdout)
            self._lock = trio.Lock()
            yield
            nursery.cancel_scope.cancel()

    async def _read(self, stdout: trio.lowlevel.FdStream) -> None:
        while True:
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if answer["call"] in self._waiting:  # or the test that made the call has ended
                    done, box = self._waiting.pop(answer["call"])
                    box.append(answer)
                    done.set()
            received = await stdout.receive_some()
            assert received, "the Node peer has ended"
            self._unread += received

    async def __call__(self, do: str, /, **arguments: Any) -> Any:
        """Make the peer call a function, and wait for its end. A cancellation here cancels it there too."""
        call, done = next(self._numbers), trio.Event()
        box: list[Any] = []
        self._waiting[call] = done, box
        await self._tell(call=call, do=do, **arguments)
        try:
            await done.wait()
        except trio.Cancelled:
            await self._tell(call=next(self._numbers), do="cancel", other=call)
            raise
        if "error" in box[0]:
            raise NodeError(box[0]["error"])
        return box[0]["result"]

    async def _tell(self, **call: Any) -> None:
        line = json.dumps(call).encode() + b"\n"
        # A cancellation must not leave half a line, which would spoil the next one.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            async with self._lock:
                await self._stdin.send_all(line)


@contextmanager
def node_process() -> Generator[NodeProcess]:
    """Start a Node peer. Its errors go to the standard error of the tests."""
    with subprocess.Popen(
        ["node", HOME / "peer.mjs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield NodeProcess(process)
        finally:
            process.kill()


# ---- connections between the Node peer and this package ----


@dataclass
class Link:
    """A connection between the Node peer and this package."""

    node: NodeProcess
    ours: Connection
    theirs: dict[str, Any]
    """Node's description of the connection: ``connection`` (its number), ``user``, ``limit``, our limits."""
    dialled: dict[str, Any]
    """The arguments with which Node connects or listens."""

    async def we_ask(self, *fields: str | bytes) -> list[bytes]:
        return await self.ours.request(fields)

    async def node_does(self, do: str, **arguments: Any) -> Any:
        return await self.node(do, connection=self.theirs["connection"], **arguments)

    async def node_asks(self, *fields: str, **options: Any) -> list[bytes]:
        answer = await self.node_does("ask", fields=fields, **options)
        return [field.encode("latin-1") for field in answer]


def pattern(size: int) -> bytes:
    """Return so many bytes, in which no two pieces are equal."""
    return b"".join(i.to_bytes(4, "big") for i in range(-(-size // 4)))[:size]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def handler(  # noqa: PLR0911  (one for each kind)
    connection: Connection, request: list[bytes]
) -> list[bytes | str]:
    """The handlers of the Node peer, in Python."""
    match request:
        case [b"ping", *rest]:
            return ["pong", *rest]
        case [b"pattern", size]:
            return [pattern(int(size))]
        case [b"digest", field]:
            return [digest(field)]
        case [b"sleep", milliseconds]:
            try:
                await trio.sleep(int(milliseconds) / 1000)
            except trio.Cancelled:
                interrupted.append("cancelled")
                raise
            return ["slept"]
        case [b"stubborn", milliseconds, *_]:
            with trio.CancelScope(shield=True):
                await trio.sleep(int(milliseconds) / 1000)
            return ["done all the same"]
        case [b"fail", code, message, details]:
            raise RequestError(message.decode(), code=code.decode(), details=details)
        case [b"details", size]:
            raise RequestError("of a size", code="details", details=pattern(int(size)))
        case [b"crash"]:
            raise TypeError("this handler is broken")
        case [b"about"]:
            asked = current_request()
            left = None if asked.deadline == float("inf") else asked.deadline - trio.current_time()
            context = {name: value.decode("latin-1") for name, value in asked.context.items()}
            return [json.dumps({"depth": asked.depth, "left": left, "context": context})]
        case [b"back", *rest]:
            return list(await connection.request(rest))
        case _:
            raise RequestError("unknown request", code="unknown-request")


interrupted: list[str] = []


async def channel_handler(
    connection: Connection, request: list[bytes], channel: Channel
) -> list[bytes | str]:
    """The channel handlers of the Node peer, in Python."""
    match request:
        case [b"shout"]:
            items = 0
            async for fields in channel:
                await channel.send([field.upper() for field in fields])
                items += 1
            return [str(items)]
        case [b"pour", items, size]:
            for i in range(int(items)):
                await channel.send([bytes([i % 256]) * int(size)])
            await channel.end()
            return ["poured"]
        case [b"swallow"]:
            sizes = [sum(map(len, fields)) async for fields in channel]
            return [str(len(sizes)), str(sum(sizes))]
        case _:
            try:
                await trio.sleep_forever()
            finally:
                interrupted.append("cancelled")


@asynccontextmanager
async def open_link(
    node: NodeProcess,
    role: Role,
    *,
    sealed: bool = True,
    path: str | None = None,
    settings: Settings = Settings(),  # noqa: B008
    service: str = "",
    **node_settings: Any,
) -> AsyncGenerator[Link]:
    """Open a connection over TCP, or over the UNIX socket at `path`. Node gets `node_settings`."""
    theirs: dict[str, Any] = {"mode": "sealed" if sealed else "plain", "service": service, **node_settings}
    if role == "node dials":
        opened, get_opened = trio.open_memory_channel[Connection](1)
        async with open_server(
            path or "127.0.0.1:0",
            handler,
            channel_handler=channel_handler,
            open_handler=opened.send,
            user_key={USER: Key(bytes.fromhex(KEY))} if sealed else None,
            service=service,
            settings=settings,
        ) as server:
            theirs |= where(path or server.addresses[0])
            theirs |= {"user": USER, "key": KEY} if sealed else {}
            described = await node("connect", **theirs)
            yield Link(node, await get_opened.receive(), described, theirs)
            server.stop(0)
    else:
        theirs |= {"path": path} if path else {"host": "127.0.0.1", "port": 0}
        listening = await node("listen", users={USER: [KEY]}, **theirs)
        try:
            async with open_connection(
                path or f"127.0.0.1:{listening['port']}",
                user=USER if sealed else None,
                key=Key(bytes.fromhex(KEY)) if sealed else None,
                service=service,
                request_handler=handler,
                channel_handler=channel_handler,
                settings=settings,
            ) as ours:
                yield Link(node, ours, await node("accept", listener=listening["listener"]), theirs)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await node("unlisten", listener=listening["listener"])


def where(address: Any) -> dict[str, Any]:
    """Return an address in the form that Node takes."""
    return (
        {"host": address.host, "port": address.port}
        if isinstance(address, TCPAddress)
        else {"path": str(address)}
    )


async def until(condition: Any) -> None:
    """Wait for a change in another process, which no clock of ours can know."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.002)


async def nothing_in_flight(link: Link) -> None:
    """Check that no request remains on either side."""
    with trio.fail_after(5):
        while True:
            counts = await link.node_does("counts")
            ours = link.ours.statistics()
            if ours.used_slots == ours.handlers_running == counts["asked"] == counts["theirs"] == 0:
                assert counts["handling"] == 0
                return
