"""Traces: linked spans of both sides, as the SDK's exporter in memory sees them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import pytest
import trio
from opentelemetry import baggage, context as contexts, trace
from opentelemetry.propagators.textmap import (
    Getter,
    Setter,
    TextMapPropagator,
    default_getter,
    default_setter,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionLost,
    RemoteError,
    RequestError,
    Settings,
    current_request,
    open_connection,
    open_server,
)
from bokbok_trio.interface import consume, expose
from bokbok_trio.opentelemetry import TracingInstrument
from bokbok_trio.testing import open_connection_pair

from ..support.helpers import settle

CLIENT, SERVER = trace.SpanKind.CLIENT, trace.SpanKind.SERVER


class Traces:
    """A tracer provider that keeps its spans."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def instrument(self, **more: Any) -> TracingInstrument:
        return TracingInstrument(tracer_provider=self.provider, **more)

    def settings(self, **more: Any) -> Settings:
        return Settings(instruments=[self.instrument(**more)])

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def find(self, name: str, kind: trace.SpanKind = trace.SpanKind.INTERNAL) -> ReadableSpan:
        [span] = [each for each in self.spans if (each.name, each.kind) == (name, kind)]
        return span

    def path(self, span: ReadableSpan | None) -> list[tuple[str, trace.SpanKind]]:
        """Return a span and its parents, from the inside out."""
        found: list[tuple[str, trace.SpanKind]] = []
        by_id = {each.context.span_id: each for each in self.spans}
        while span is not None:
            found.append((span.name, span.kind))
            span = None if span.parent is None else by_id[span.parent.span_id]
        return found


@pytest.fixture
def traces() -> Generator[Traces]:
    found = Traces()
    yield found
    assert not trace.get_current_span().get_span_context().is_valid, "a span has leaked"
    found.provider.shutdown()


@asynccontextmanager
async def traced_pair(traces: Traces, **more: Any) -> AsyncGenerator[Connection]:
    settings = traces.settings()
    async with open_connection_pair(client_settings=settings, server_settings=settings, **more) as pair:
        yield pair[0]


def current_id() -> int:
    return trace.get_current_span().get_span_context().span_id


def test_without_the_api_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "bokbok_trio.opentelemetry")
    with pytest.raises(ImportError, match=r"install bokbok-trio\[opentelemetry\]$"):
        importlib.import_module("bokbok_trio.opentelemetry")


# ---- linked ----


@pytest.mark.parametrize("waits", [False, True])
async def test_the_server_s_span_is_in_the_client_s_and_is_current_in_the_handler(
    waits: bool, traces: Traces
) -> None:
    seen: list[int] = []

    async def task() -> None:
        seen.append(current_id())

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        seen.append(current_id())
        if waits:
            await trio.testing.wait_all_tasks_blocked()
            seen.append(current_id())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)
        with traces.tracer.start_as_current_span("inner"):
            return request

    async with traced_pair(traces, server_handler=handler) as client:
        with traces.tracer.start_as_current_span("outer") as outer:
            await client.request(["a"])
            assert trace.get_current_span() is outer
    inner, server, client_span = traces.find("inner"), traces.find("a", SERVER), traces.find("a", CLIENT)
    assert traces.path(inner) == [
        ("inner", trace.SpanKind.INTERNAL),
        ("a", SERVER),
        ("a", CLIENT),
        ("outer", trace.SpanKind.INTERNAL),
    ]
    assert len({span.context.trace_id for span in traces.spans}) == 1
    assert set(seen) == {server.context.span_id}
    assert len(seen) == (3 if waits else 1)
    assert client_span.status.status_code is server.status.status_code is trace.StatusCode.UNSET


async def test_requests_at_the_same_time_have_spans_of_their_own(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        if int(request[0]) % 2:
            await trio.lowlevel.checkpoint()
        return [str(current_id())]

    answers: dict[str, int] = {}
    async with traced_pair(traces, server_handler=handler) as client, trio.open_nursery() as nursery:

        async def ask(name: str) -> None:
            with traces.tracer.start_as_current_span(f"outer {name}"):
                [answer] = await client.request([name])
            answers[name] = int(answer)

        for number in range(30):
            nursery.start_soon(ask, str(number))
    for name, id in answers.items():
        assert traces.find(name, SERVER).context.span_id == id
        assert traces.path(traces.find(name, SERVER))[2][0] == f"outer {name}"


async def test_callbacks_belong_to_the_handler_that_makes_them(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request(request[1:]) if request[1:] else request

    async with traced_pair(traces, client_handler=handler, server_handler=handler) as client:
        await client.request(["a", "b", "c"])
    assert traces.path(traces.find("c", SERVER)) == [
        ("c", SERVER),
        ("c", CLIENT),
        ("b", SERVER),
        ("b", CLIENT),
        ("a", SERVER),
        ("a", CLIENT),
    ]


class Jobs(Protocol):
    async def run(self, name: str, progress: Callable[[int], Awaitable[None]]) -> str: ...

    def follow(self, name: str) -> AbstractAsyncContextManager[trio.abc.ReceiveChannel[int]]: ...


class OurJobs:
    def __init__(self) -> None:
        self.seen: list[int] = []

    async def run(self, name: str, progress: Callable[[int], Awaitable[None]]) -> str:
        await progress(50)
        return name

    async def follow(self, name: str) -> AsyncIterator[int]:
        for number in range(3):
            self.seen.append(current_id())
            yield number
            await trio.lowlevel.checkpoint()


async def test_typed_calls_with_callbacks_and_streams(traces: Traces) -> None:
    implementation = OurJobs()
    seen: list[int] = []

    async def progress(done: int) -> None:
        seen.append(current_id())

    async with traced_pair(traces, server_handler=expose(Jobs, implementation)) as client:
        jobs = consume(client, Jobs)
        assert await jobs.run("x", progress) == "x"
        with traces.tracer.start_as_current_span("outer"):
            async with jobs.follow("x") as numbers:
                assert [number async for number in numbers] == [0, 1, 2]
    back = traces.find("%back", SERVER)
    assert seen == [back.context.span_id]
    assert [name for name, _ in traces.path(back)] == ["%back", "%back", "Jobs.run", "Jobs.run"]
    follow = traces.find("Jobs.follow", SERVER)
    assert set(implementation.seen) == {follow.context.span_id}
    assert [name for name, _ in traces.path(follow)] == ["Jobs.follow", "Jobs.follow", "outer"]
    assert follow.attributes is not None
    assert follow.attributes["bokbok.items_out"] == 3


async def test_what_was_current_when_the_connection_was_opened_is_no_parent(traces: Traces) -> None:
    """It has long ended, mostly; and a peer that does not trace begins a trace."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request(["back"])

    async def back(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        return [str(current_id())]

    with traces.tracer.start_as_current_span("opening"):
        async with open_connection_pair(back, handler, client_settings=traces.settings()) as (client, _):
            [id] = await client.request(["a"])
    span = traces.find("back", SERVER)
    assert span.context.span_id == int(id)
    assert span.parent is None
    assert span.context.trace_id != traces.find("a", CLIENT).context.trace_id


async def test_a_peer_that_does_not_trace_sees_the_trace_in_its_context(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return [current_request().context["traceparent"]]

    async with open_connection_pair(server_handler=handler, client_settings=traces.settings()) as (client, _):
        [traceparent] = await client.request(["a"])
        mine = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert await client.request(["b"], context={"traceparent": mine}) == [mine.encode()]
    span = traces.find("a", CLIENT).context
    assert traceparent.decode() == f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


@pytest.mark.parametrize("traceparent", [b"", b"\xff\xfe", b"00-" + bytes(40), "00-zz-1-01", "x" * 4000])
async def test_a_nonsensical_trace_begins_a_new_one(traceparent: bytes | str, traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        return [str(current_id())]

    async with open_connection_pair(server_handler=handler, server_settings=traces.settings()) as (client, _):
        await client.request(["a"], context={"traceparent": traceparent})
    assert traces.find("a", SERVER).parent is None


async def test_what_a_peer_sends_forges_no_lines_in_the_log(
    traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        return [str(baggage.get_all(contexts.get_current()))]

    sent: dict[str, bytes | str] = {
        "traceparent": "\n",
        "tracestate": "x\nERROR forged",
        "baggage": b"a=1,\tb=2,x\nERROR forged\x1b[1m",
    }
    async with open_connection_pair(server_handler=handler, server_settings=traces.settings()) as (client, _):
        [answer] = await client.request(["a"], context=sent)
        assert b"'a': '1'" in answer
        assert b"'b': '2'" in answer
        sent["traceparent"] = f"00-{7:032x}-{7:016x}-01"
        await client.request(["b"], context=sent)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("opentelemetry")]
    assert len(logged) == 3
    assert all("ERROR forged" in message and message.isprintable() for message in logged)


async def test_baggage_travels_and_what_is_too_long_is_left_out(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        return [f"{name}={value}" for name, value in baggage.get_all().items()]

    async with traced_pair(traces, server_handler=handler) as client:
        for value, answer in (("1", [b"k=1"]), ("x" * 8100, [])):
            token = contexts.attach(baggage.set_baggage("k", value))
            try:
                assert await client.request(["a"]) == answer
            finally:
                contexts.detach(token)
    assert [span.parent is None for span in traces.spans if span.kind is SERVER] == [False, False]


class Shouting(TextMapPropagator):
    """A propagator whose names are in mixed case, as those of some vendors are."""

    def extract(
        self,
        carrier: Any,
        context: contexts.Context | None = None,
        getter: Getter[Any] = default_getter,
    ) -> contexts.Context:
        assert getter.keys(carrier) == ["x-trace-id"]
        assert getter.get(carrier, "X-None") is None
        found = getter.get(carrier, "X-Trace-Id")
        assert found is not None
        trace_id, span_id = (int(part, 16) for part in found[0].split("/"))
        parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(1))
        return trace.set_span_in_context(trace.NonRecordingSpan(parent), context)

    def inject(
        self,
        carrier: Any,
        context: contexts.Context | None = None,
        setter: Setter[Any] = default_setter,
    ) -> None:
        span = trace.get_current_span(context).get_span_context()
        setter.set(carrier, "X-Trace-Id", f"{span.trace_id:x}/{span.span_id:x}")

    @property
    def fields(self) -> set[str]:
        return {"X-Trace-Id"}


async def test_a_propagator_of_ones_own(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return request

    settings = traces.settings(propagator=Shouting())
    async with open_connection_pair(
        server_handler=handler, client_settings=settings, server_settings=settings
    ) as (client, _):
        await client.request(["a"])
    assert traces.path(traces.find("a", SERVER)) == [("a", SERVER), ("a", CLIENT)]


async def test_a_trace_that_is_not_sampled_goes_on_as_such() -> None:
    ours, theirs = Traces(sampler=ALWAYS_OFF), Traces()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return [current_request().context["traceparent"]]

    async with open_connection_pair(
        server_handler=handler, client_settings=ours.settings(), server_settings=theirs.settings()
    ) as (client, _):
        [traceparent] = await client.request(["a"])
    assert int(traceparent[-2:], 16) & trace.TraceFlags.SAMPLED == 0
    assert not ours.spans
    assert not theirs.spans


async def test_without_an_sdk_all_of_it_does_nothing() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        assert not trace.get_current_span().is_recording()
        return list(map(str.encode, current_request().context))

    settings = Settings(instruments=[TracingInstrument(tracer_provider=trace.NoOpTracerProvider())])
    async with open_connection_pair(
        server_handler=handler, client_settings=settings, server_settings=settings
    ) as (client, _):
        assert await client.request(["a"]) == []


# ---- what a span says ----


async def test_the_attributes_over_tcp(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request([]) if request else []

    settings = traces.settings()
    async with (
        open_server("127.0.0.1:0", handler, settings=settings) as server,
        open_connection(server.addresses[0], request_handler=handler, settings=settings) as client,
    ):
        await client.request(["ask", "xyz"])
        [connection] = server.connections
        address: Any = server.addresses[0]
        peer: Any = connection.address
        of_ours = {"network.peer.address": "127.0.0.1", "network.peer.port": address.port}
        of_theirs = {"network.peer.address": "127.0.0.1", "network.peer.port": peer.port}
        ask = {
            "rpc.system.name": "bokbok",
            "rpc.method": "ask",
            "bokbok.request.id": 0,
            "bokbok.waited": 0.0,
        }
        there, back = {"bokbok.bytes_out": 15, "bokbok.bytes_in": 1}, {"bokbok.bytes_in": 15}
    assert traces.find("ask", CLIENT).attributes == {
        **ask,
        **of_ours,
        **there,
        "server.address": "127.0.0.1",
        "server.port": address.port,
    }
    assert traces.find("ask", SERVER).attributes == {**ask, **of_theirs, **back, "bokbok.bytes_out": 1}
    callback = traces.find("request", CLIENT).attributes
    assert callback is not None
    assert "server.address" not in callback
    assert callback["network.peer.port"] == peer.port
    assert callback["rpc.method"] == ""


async def test_the_address_of_a_unix_socket(traces: Traces, tmp_path: Any) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return request

    path = str(tmp_path / "socket")
    async with open_server(path, handler), open_connection(path, settings=traces.settings()) as client:
        await client.request(["a"])
    attributes = traces.find("a", CLIENT).attributes
    assert attributes is not None
    assert attributes["server.address"] == attributes["network.peer.address"] == path
    assert "server.port" not in attributes


async def fail(connection: Connection, request: list[bytes]) -> list[bytes]:
    match request:
        case [b"code"]:
            raise RequestError("no", code="mine")
        case [b"oops"]:
            raise ValueError("no")
        case _:
            await trio.sleep_forever()
            raise AssertionError


@pytest.mark.parametrize(
    ("request_name", "error_type", "code"),
    [("code", "mine", "mine"), ("oops", "handler-error", "handler-error"), ("sleep", "timeout", None)],
)
async def test_what_went_wrong(
    request_name: str, error_type: str, code: str | None, traces: Traces, autojump_clock: MockClock
) -> None:
    async with traced_pair(traces, server_handler=fail) as client:
        with suppress(RemoteError), trio.move_on_after(5):
            await client.request([request_name])
        await settle()
    for span in traces.spans:
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == error_type
        assert span.attributes.get("rpc.response.status_code") == code
    assert len(traces.spans) == 2


@pytest.mark.parametrize("outcome", ["cancelled", "lost"])
async def test_what_was_cancelled_and_what_was_lost(outcome: str, traces: Traces) -> None:
    async with traced_pair(traces, server_handler=fail) as client, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            with suppress(ConnectionLost, trio.ClosedResourceError):
                await client.request(["sleep"])

        await settle()
        if outcome == "lost":
            await client.aclose()
        else:
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await settle()
    assert len(traces.spans) == 2
    for span in traces.spans:
        assert span.attributes is not None
        assert span.attributes["error.type"] == outcome
        is_error = outcome == "lost"
        assert (span.status.status_code is trace.StatusCode.ERROR) == is_error


async def test_a_channel_has_one_span_that_lasts_as_long(traces: Traces) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        async for item in channel:
            await channel.send(item)

    async with traced_pair(traces, server_channel_handler=handler) as client:
        async with client.open_channel(["a"]) as channel:
            await channel.send(["item"])
            await channel.receive()
            assert not traces.spans
            await channel.end()
    for kind, there, back in ((CLIENT, "out", "in"), (SERVER, "in", "out")):
        span = traces.find("a", kind)
        assert span.attributes is not None
        assert span.attributes[f"bokbok.bytes_{there}"] == 6 + 9
        assert span.attributes[f"bokbok.bytes_{back}"] == 1 + 9
        assert span.attributes["bokbok.items_in"] == span.attributes["bokbok.items_out"] == 1
    assert traces.path(traces.find("a", SERVER)) == [("a", SERVER), ("a", CLIENT)]
