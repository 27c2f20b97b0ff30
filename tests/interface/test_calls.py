"""Calls without streams: arguments, results, errors, and who may be called."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import pytest
import trio

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    RequestError,
    Settings,
    current_request,
)
from bokbok_trio.interface import Exposed, consume, expose, raises, with_options
from bokbok_trio.testing import consume_local, open_connection_pair
from tests.support.helpers import echo, open_peer, settle

encode = msgspec.msgpack.encode

T = TypeVar("T")


@dataclass
class Job:
    name: str
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0
    steps: list[Job] = field(default_factory=list)


@dataclass
class NoSuchJob(Exception):
    name: str
    tried: int = 1


@dataclass(eq=False)
class QueueFull(Exception):
    limit: int
    retry_after: float | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        return f"{self.limit} jobs wait"


@dataclass
class Specific(NoSuchJob):
    more: bytes = b""


class Jobs(Protocol):
    """A queue."""

    async def add(self, job: Job, *, urgent: bool = False, note: str | None = None) -> int: ...
    async def total(self, a: int, b: int = 2, c: int = 3) -> int: ...
    @raises(NoSuchJob, QueueFull)
    async def find(self, name: str) -> Job: ...
    async def fail(self, how: str) -> int: ...
    async def wrong(self, value: Any) -> Job: ...
    async def anything(self, value: Any = None) -> Any: ...
    async def sleep(self) -> None: ...


class Queue(Jobs):
    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seen: list[object] = []
        self.ended = trio.Event()

    async def add(self, job: Job, *, urgent: bool = False, note: str | None = "the implementation's") -> int:
        self.seen += [job, urgent, note]
        self.jobs.append(job)
        return len(self.jobs)

    async def total(self, a: int, b: int = 20, c: int = 30) -> int:
        await trio.lowlevel.checkpoint()
        return a + b + c

    async def find(self, name: str) -> Job:
        match name:
            case "full":
                raise QueueFull(7, retry_after=0.5)
            case "specific":
                raise Specific(name, 3, b"not sent")
            case "group":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    nursery.start_soon(self.find, "full")
            case "late":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.end_late)
                    await trio.sleep_forever()
            case "groups":
                raise ExceptionGroup("both", [NoSuchJob("a"), QueueFull(1)])
            case "long":
                raise NoSuchJob("x" * 2**14)
            case "unencodable":
                raise NoSuchJob(name, 2**70)
            case "odd":
                raise NoSuchJob(name, "many")  # type: ignore[arg-type]
            case "bare":
                raise RequestError("not with fields", code="%NoSuchJob")
        raise NoSuchJob(name)

    async def end_late(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise QueueFull(3)

    async def fail(self, how: str) -> int:
        if how == "request":
            raise RequestError("not today", code="closed-today", details=b"more")
        raise NoSuchJob(how)

    async def wrong(self, value: Any) -> Job:
        return value  # type: ignore[no-any-return]

    async def anything(self, value: Any = None) -> Any:
        return value

    async def sleep(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def secret(self) -> int:
        raise AssertionError

    async def _private(self) -> int:
        raise AssertionError


@asynccontextmanager
async def open_jobs(**settings: Any) -> AsyncGenerator[tuple[Jobs, Queue, Connection]]:
    """A stand-in, what it stands for, and the connection."""
    queue = Queue()
    async with open_connection_pair(server_handler=expose(Jobs, queue), **settings) as (client, _):
        yield consume(client, Jobs), queue, client


async def code_of(connection: Connection, *fields: bytes) -> str:
    """The code that a request made by hand is answered with."""
    with pytest.raises(RemoteError) as caught:
        await connection.request(fields)
    return caught.value.code


# ---- arguments and results ----


async def test_arguments_and_results_are_what_they_were() -> None:
    async with open_jobs() as (jobs, queue, _):
        job = Job("a", 3, [Job("b")])
        assert await jobs.add(job, urgent=True, note=None) == 1
        assert queue.seen == [job, True, None]
        assert queue.seen[0] is not job


async def test_what_is_not_passed_is_the_implementations_default() -> None:
    async with open_jobs() as (jobs, queue, _):
        await jobs.add(Job("a"))
        assert queue.seen[1:] == [False, "the implementation's"]
        assert await jobs.total(1) == 51
        assert await jobs.total(1, c=2) == 23
        assert await jobs.total(1, 2, 3) == await jobs.total(c=3, b=2, a=1) == 6


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1, 2, 3, 4), {}),
        ((1,), {"d": 4}),
        ((1,), {"a": 1}),
        ((1, 2), {"c": 3, "d": 4}),
        ((), {"b": 2}),
        ((1, 2, 3, 4), {"a": 1}),
    ],
)
async def test_a_call_that_does_not_fit_is_a_type_error_here(
    args: tuple[int, ...], kwargs: dict[str, int]
) -> None:
    async with open_jobs() as (jobs, queue, _):
        total: Any = jobs.total
        add: Any = jobs.add
        with pytest.raises(TypeError, match="argument"):
            await total(*args, **kwargs)
        with pytest.raises(TypeError, match="too many positional arguments"):
            await add(Job("a"), True)
        assert not queue.seen


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Jobs.add: $: missing argument job"),
        ({"job": Job("a"), "user": "b"}, "Jobs.add: $: unknown argument user"),
        ({"job": Job("a"), "urgent": 1}, "Jobs.add: $.urgent: expected bool, got int"),
        ({"job": {"name": "a", "priority": "x"}}, "Jobs.add: $.job.priority: expected int, got str"),
        ({"job": {"name": "a", "priority": -1}}, "Jobs.add: $.job.priority: expected int >= 0"),
        (
            {"job": {"name": "a", "steps": [{"name": "b", "steps": [{}]}]}},
            "Jobs.add: $.job.steps[0].steps[0]: object missing required field name",
        ),
        ([Job("a")], "Jobs.add: $: expected object, got array"),
        (3, "Jobs.add: $: expected object, got int"),
    ],
)
async def test_wrong_arguments_are_told_with_their_path_and_nothing_runs(arguments: Any, text: str) -> None:
    async with open_jobs() as (_, queue, client):
        with pytest.raises(RemoteError) as caught:
            await client.request([b"%call", b"Jobs.add", encode(arguments)])
        assert (caught.value.code, caught.value.message) == ("bad-arguments", text)
        assert not queue.seen


async def test_a_wrong_type_is_told_by_the_other_side() -> None:
    async with open_jobs() as (jobs, queue, _):
        wrong: Any = "a"
        with pytest.raises(RemoteError) as caught:
            await jobs.add(wrong)
        assert caught.value.code == "bad-arguments"
        assert caught.value.message == "Jobs.add: $.job: expected object, got str"
        assert not queue.seen


async def test_too_deep_arguments_do_not_run() -> None:
    async with open_jobs() as (_, queue, client):
        deep = encode({"value": None})[:-1] + b"\x91" * 70 + b"\xc0"
        with pytest.raises(RemoteError) as caught:
            await client.request([b"%call", b"Jobs.anything", deep])
        assert caught.value.message == "Jobs.anything: $: nested deeper than 64"
        assert not queue.seen


@pytest.mark.parametrize(
    ("value", "error"), [(object(), TypeError), (2**64, ValueError), ("\ud800", ValueError)]
)
async def test_what_cannot_travel_is_told_here_and_nothing_is_sent(value: object, error: type) -> None:
    async with open_jobs() as (jobs, _, client):
        with pytest.raises(error) as caught:
            await jobs.anything(value)
        assert caught.value.__notes__ == ["in the argument value of Jobs.anything"]
        assert client.statistics().used_slots == 0
        assert await jobs.anything(1) == 1


async def test_too_large_arguments_are_told_here() -> None:
    async with open_jobs(client_settings=Settings(max_message_size=2**12)) as (jobs, _, _):
        with pytest.raises(MessageTooLarge):
            await jobs.anything("x" * 2**13)
        assert await jobs.anything(1) == 1


async def test_too_large_results_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Big(Queue):
        async def anything(self, value: Any = None) -> Any:
            return "x" * 2**13

    async with open_connection_pair(
        server_handler=expose(Jobs, Big()), client_settings=Settings(max_message_size=2**12)
    ) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).anything()
        assert caught.value.code == "too-large"
    assert "too large" in caplog.text


@pytest.mark.parametrize("value", ["a", {"name": 3}, Job(3), None, object(), Job("a", -1)])  # type: ignore[arg-type]
async def test_a_wrong_result_is_a_failure_of_the_implementation(
    value: object, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Queue):
        async def wrong(self, **_: Any) -> Job:  # type: ignore[override]
            return value  # type: ignore[return-value]

    wrong: Any = Wrong()
    async with consume_local(Jobs, wrong) as jobs:
        with pytest.raises(RemoteError) as caught:
            await jobs.wrong(0)
    text = "Jobs.wrong returned a value that its interface does not allow"
    assert caught.value.code == "handler-error"
    assert caught.value.message.startswith(f"TypeError: {text}: ")
    assert text in caplog.text


async def test_results_that_are_not_of_the_class_and_fit_are_taken() -> None:
    async with consume_local(Jobs, Queue()) as jobs:
        assert await jobs.wrong({"name": "a", "more": 1}) == Job("a")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([encode({"name": 3})], r"\$.name: expected str, got int"),
        ([b"\xc1"], "malformed"),
        ([], "not enough values"),
        ([b"\x90", b"\x90"], "too many values"),
    ],
)
async def test_a_result_that_cannot_be_one_is_a_protocol_error_and_the_connection_goes_on(
    answer: list[bytes], text: str
) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        return answer if request[1] == b"Jobs.find" else [b"\x07"]

    async with open_connection_pair(server_handler=lie) as (client, _):
        jobs = consume(client, Jobs)
        with pytest.raises(
            ProtocolError, match=f"Jobs.find returned a value that our interface does not allow: .*{text}"
        ):
            await jobs.find("a")
        assert await jobs.total(1) == 7


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("full", QueueFull(7, retry_after=0.5)),
        ("group", QueueFull(7, retry_after=0.5)),
        ("specific", NoSuchJob("specific", 3)),
        ("other", NoSuchJob("other")),
    ],
)
async def test_declared_errors_come_as_they_are(
    name: str, error: QueueFull | NoSuchJob, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(type(error)) as caught:
            await jobs.find(name)
        found = caught.value
        assert type(found) is type(error)
        assert vars(found) == vars(error)
        assert str(found) == str(error) or str(found) == str(found.args)
        assert isinstance(found.__cause__, RemoteError)
        assert found.__cause__.code == f"%{type(error).__name__}"
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


async def test_a_declared_error_has_the_text_of_its_arguments() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(NoSuchJob) as caught:
            await jobs.find("other")
        assert caught.value.args == ("other", 1)


async def test_errors_that_are_not_declared_are_failures(caplog: pytest.LogCaptureFixture) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.fail("x")
        assert caught.value.code == "handler-error"
        assert caught.value.message == "NoSuchJob: x"
        assert "NoSuchJob" in caplog.text
        with pytest.raises(RemoteError) as caught:
            await jobs.fail("request")
        assert (caught.value.code, caught.value.details) == ("closed-today", b"more")


async def test_a_declared_error_that_comes_with_the_deadline_is_told(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_peer(expose(Jobs, Queue())) as (_, peer):
        body = [b"%call", b"Jobs.find", encode({"name": "late"})]
        await peer.send(b"req", b"1", b"1000000", b"", b"", body=body)
        kind, _, code, _, details = await peer.receive()
        assert (kind, code, msgspec.msgpack.decode(details)) == (
            b"err",
            b"%QueueFull",
            {"limit": 3, "retry_after": None},
        )
        await peer.send(b"req", b"3", b"", b"", b"", body=[b"%call", b"Jobs.total", encode({"a": 1})])
        assert (await peer.receive())[0] == b"ok"


async def test_two_declared_errors_at_once_are_a_failure() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.find("groups")
        assert caught.value.code == "handler-error"
        assert caught.value.message.startswith("ExceptionGroup: both")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long", "the fields of NoSuchJob take 16[0-9]{3} bytes; the limit is 16384"),
        ("unencodable", "NoSuchJob has a value that its fields do not allow: can't serialize ints"),
        ("odd", r"NoSuchJob has a value that its fields do not allow: \$.tried: expected int, got str"),
    ],
)
async def test_fields_that_cannot_travel_are_a_failure_that_says_so(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError, match=text) as caught:
            await jobs.find(name)
        assert caught.value.code == "handler-error"
    assert "NoSuchJob" in caplog.text  # the one that was to be told


async def test_an_error_without_its_fields_is_a_remote_error() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.find("bare")
        assert caught.value.code == "%NoSuchJob"


@pytest.mark.parametrize("code", ["%Exception", "%os.system", "%", "%%NoSuchJob", "NoSuchJob", "%Specific"])
async def test_no_name_of_the_peers_chooses_a_class(code: str) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code=code, details=encode({"name": "a"}))

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).find("a")
        assert caught.value.code == code


@pytest.mark.parametrize("details", [b"", b"\xc1", encode({}), encode({"name": 3}), encode([])])
async def test_wrong_fields_of_an_error_are_a_remote_error(details: bytes) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%NoSuchJob", details=details)

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).find("a")
        assert caught.value.details == details


async def test_an_error_may_lack_what_has_a_default_and_have_more() -> None:
    async def newer(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%NoSuchJob", details=encode({"name": "a", "new": [1]}))

    async with open_connection_pair(server_handler=newer) as (client, _):
        with pytest.raises(NoSuchJob) as caught:
            await consume(client, Jobs).find("a")
        assert vars(caught.value) == {"name": "a", "tried": 1}


@dataclass
class Fussy(Exception):
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise KeyError(self.number)


class Fails(Protocol):
    @raises(Fussy)
    async def fail(self) -> None: ...


async def test_an_error_that_refuses_its_fields_is_a_remote_error() -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%Fussy", details=encode({"number": -1}))

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError):
            await consume(client, Fails).fail()


# ---- cancellation, deadlines, context ----


async def test_a_cancelled_call_cancels_its_method(autojump_clock: trio.testing.MockClock) -> None:
    async with open_jobs() as (jobs, queue, _):
        with trio.move_on_after(1) as scope:
            await jobs.sleep()
        assert scope.cancelled_caught
        await queue.ended.wait()
        assert await jobs.total(1) == 51


async def test_a_call_under_a_cancelled_scope_does_not_run() -> None:
    async with open_jobs() as (jobs, queue, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await jobs.add(Job("a"))
        assert scope.cancelled_caught
        await settle()
        assert not queue.seen


async def test_a_lost_connection_is_told() -> None:
    async with open_jobs() as (jobs, _, client):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def call() -> None:
                with pytest.raises(Exception, match="this side closed"):
                    await jobs.sleep()

            await settle()
            await client.aclose()


async def test_the_context_of_a_call_and_its_method_can_be_known() -> None:
    class Knowing(Queue):
        async def anything(self, value: Any = None) -> Any:
            current = current_request()
            return [current.method, current.user, dict(current.context), current.has_channel]

    async with consume_local(Jobs, Knowing()) as jobs:
        assert await jobs.anything() == ["Jobs.anything", "user", {}, False]
        traced = with_options(jobs, context={"trace": "7"})
        assert await traced.anything() == ["Jobs.anything", "user", {"trace": b"7"}, False]
        assert await jobs.anything() == ["Jobs.anything", "user", {}, False]
        twice = with_options(with_options(traced, idempotent=True), context={"a": b"b"})
        assert (await twice.anything())[2] == {"a": b"b"}


async def test_the_context_of_a_stand_in_does_not_change_with_the_callers() -> None:
    context: dict[str, str] = {"a": "1"}
    async with open_jobs() as (jobs, _, _):
        traced = with_options(jobs, context=context)
        context["not a name"] = "2"
        assert await traced.total(1) == 51
        with pytest.raises(ValueError, match="not a name"):
            await with_options(jobs, context=context).total(1)


@pytest.mark.parametrize("wrong", [Queue(), None, Jobs])
def test_options_are_of_stand_ins(wrong: object) -> None:
    with pytest.raises(TypeError, match="is not a stand-in; pass a result of consume"):
        with_options(wrong, idempotent=True)


# ---- what may be called ----


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"Jobs.secret", "no-method"),
        (b"Jobs._private", "no-method"),
        (b"Jobs.__init__", "no-method"),
        (b"Jobs.jobs", "no-method"),
        (b"Jobs.", "no-method"),
        (b"Jobs", "no-method"),
        (b"total", "no-method"),
        (b"jobs.total", "no-method"),
        (b"\xff", "no-method"),
        (b"", "no-method"),
        (b"Jobs.total", "bad-arguments"),
    ],
)
async def test_only_what_the_interface_names_can_be_called(name: bytes, code: str) -> None:
    async with open_jobs() as (_, _, client):
        assert await code_of(client, b"%call", name, b"\x80") == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ([b"%call"], "bad-arguments"),
        ([b"%call", b"Jobs.total"], "bad-arguments"),
        ([b"%call", b"Jobs.total", b"\x80", b""], "bad-arguments"),
        ([b"%other"], "no-method"),
        ([b"%"], "no-method"),
        ([b"%list"], "no-method"),
        ([b"%back", b"1", b"", b"\x90"], "no-reference"),
        ([b"plain"], "no-handler"),
        ([], "no-handler"),
    ],
)
async def test_other_requests_are_refused(fields: list[bytes], code: str) -> None:
    async with open_jobs() as (_, _, client):
        assert await code_of(client, *fields) == code
        with pytest.raises(RemoteError) as caught:
            async with client.open_channel(fields) as channel:
                await channel.answer()
        assert caught.value.code == code.replace("handler", "channel")


class Admin(Protocol):
    async def stop(self) -> str: ...


class Stopper(Admin):
    async def stop(self) -> str:
        return "stopped"


class Rest:
    async def handle_request(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        return [b"rest", *request]

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes]:
        return [b"channel", *request]


async def test_several_go_together_and_a_plain_handler_gets_the_rest() -> None:
    exposed = expose(Jobs, Queue()) | expose(Admin, Stopper()) | echo
    assert repr(exposed).startswith("<bokbok_trio.interface.Exposed Jobs | Admin | <function echo")
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await consume(client, Jobs).total(1) == 51
        assert await consume(client, Admin).stop() == "stopped"
        assert await client.request(["a", "b"]) == [b"a", b"b"]
        assert await client.request([]) == []
        for field in (b"%", b"%x", b"%call"):
            assert await code_of(client, field) in {"no-method", "bad-arguments"}
        with pytest.raises(RemoteError) as caught:
            async with client.open_channel(["a"]) as channel:
                await channel.answer()
        assert caught.value.code == "no-channel"


async def test_a_combined_handler_gets_the_rest_of_the_channels_too() -> None:
    exposed = expose(Jobs, Queue()) | Rest()
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await client.request(["a"]) == [b"rest", b"a"]
        async with client.open_channel(["b"]) as channel:
            assert await channel.answer() == [b"channel", b"b"]
        assert await consume(client, Jobs).total(1) == 51


def test_what_is_put_together_must_make_sense() -> None:
    jobs = expose(Jobs, Queue())
    for other in (expose(Jobs, Queue()), expose(Admin, Stopper(), name="Jobs")):
        with pytest.raises(ValueError, match="two interfaces are named Jobs; give one of them another name="):
            _ = jobs | other
    _ = jobs | expose(Jobs, Queue(), name="Others")
    with pytest.raises(TypeError, match="gets all other requests; put it last"):
        _ = jobs | echo | expose(Admin, Stopper())
    wrong: Any
    for wrong in (3, Admin):
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = jobs | wrong


async def test_a_name_of_its_own_is_used_by_both() -> None:
    exposed = expose(Jobs, Queue(), name="Jobs.v2") | expose(Admin, Stopper(), name="Admin")
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await consume(client, Jobs, name="Jobs.v2").total(1) == 51
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).total(1)
        assert (caught.value.code, caught.value.message) == ("no-method", "no such method: Jobs.total")


async def test_both_sides_serve_and_call_at_once() -> None:
    async with open_connection_pair(expose(Admin, Stopper()), expose(Jobs, Queue())) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(consume(client, Jobs).total, 1)
                nursery.start_soon(consume(server, Admin).stop)


class UnhashableHook:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, value: object) -> object:
        raise AssertionError


async def test_an_interface_is_prepared_once_for_all_connections() -> None:
    """A server may consume one anew in each call."""
    async with open_connection_pair(server_handler=expose(Jobs, Queue(), name="Others")) as (client, server):
        jobs = consume(client, Jobs)
        assert type(jobs) is type(consume(server, Jobs)) is type(consume(client, Jobs, middleware=[]))
        others = consume(client, Jobs, name="Others")
        assert type(others) is not type(jobs)
        hook = UnhashableHook()
        hooked = [consume(client, Jobs, name="Others", encode_hook=hook) for _ in range(2)]
        assert type(hooked[0]) is not type(hooked[1])
        for each in (others, *hooked):
            assert await each.total(1) == 51


@pytest.mark.parametrize("wrong", [None, "localhost:1", Jobs])
def test_consume_takes_a_connection_first(wrong: Any) -> None:
    with pytest.raises(TypeError, match="consume takes a connection first, not "):
        consume(wrong, Jobs)


async def test_consume_tells_what_is_wrong_with_an_interface() -> None:
    class Wrong(Protocol):
        def stat(self, path: str) -> int: ...

    async with open_connection_pair() as (client, _):
        with pytest.raises(TypeError, match="it is not async; write 'async def'"):
            consume(client, Wrong)


# ---- stand-ins ----


async def test_a_stand_in_shows_what_it_is() -> None:
    async with open_jobs() as (jobs, _, _):
        assert repr(jobs).startswith("<stand-in of Jobs over <bokbok_trio.Connection client")
        assert type(jobs).__doc__ == "A queue."
        assert jobs.total.__name__ == "total"
        assert jobs.total.__qualname__ == "Jobs.total"
        assert str(inspect.signature(jobs.total)) == "(a: 'int', b: 'int' = 2, c: 'int' = 3) -> 'int'"
        assert inspect.iscoroutinefunction(jobs.total)
        assert [name for name in dir(jobs) if not name.startswith("_")] == sorted(
            ["add", "total", "find", "fail", "wrong", "anything", "sleep"]
        )


async def test_a_stand_in_can_be_served_on() -> None:
    async with open_jobs() as (jobs, _, _):
        async with consume_local(Jobs, jobs) as passed_on:
            assert await passed_on.total(1, c=1) == 22
            with pytest.raises(RemoteError):
                await passed_on.fail("x")
            with pytest.raises(NoSuchJob):
                await passed_on.find("a")


class OldStyle(ABC):
    @abstractmethod
    async def double(self, number: int) -> int: ...

    async def triple(self, number: int) -> int:
        return 3 * number


class Doubler(OldStyle):
    async def double(self, number: int) -> int:
        return 2 * number


class Store(Protocol[T]):
    async def swap(self, value: T) -> T: ...


class JobStore:
    async def swap(self, value: Job) -> Job:
        assert isinstance(value, Job)
        return Job(value.name + "!")


async def test_other_classes_and_generic_ones_can_be_served_and_called() -> None:
    async with consume_local(OldStyle, Doubler()) as numbers:
        assert (await numbers.double(2), await numbers.triple(2)) == (4, 6)
    async with consume_local(Store[Job], JobStore()) as store:
        assert await store.swap(Job("a")) == Job("a!")


class Temperatures(Protocol):
    async def warmer(self, degrees: Celsius, by: float = 1) -> list[Celsius]: ...


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


class Weather:
    async def warmer(self, degrees: Celsius, by: float = 1) -> list[Celsius]:
        return [degrees, Celsius(degrees.degrees + by)]


async def test_hooks_let_other_types_travel() -> None:
    def encode_hook(value: Any) -> Any:
        return value.degrees

    def decode_hook(cls: type, value: Any) -> Any:
        return cls(value)

    async with consume_local(
        Temperatures, Weather(), encode_hook=encode_hook, decode_hook=decode_hook
    ) as weather:
        assert [each.degrees for each in await weather.warmer(Celsius(20), by=0.5)] == [20, 20.5]
    for hooks in ({}, {"encode_hook": encode_hook}, {"decode_hook": decode_hook}):
        with pytest.raises(TypeError, match="Celsius does not travel"):
            expose(Temperatures, Weather(), **hooks)


async def test_what_a_hook_raises_comes_out_of_the_call() -> None:
    def encode_hook(value: Any) -> Any:
        raise KeyError("unknown unit")

    async with consume_local(
        Temperatures, Weather(), encode_hook=encode_hook, decode_hook=lambda _cls, value: value
    ) as weather:
        with pytest.raises(KeyError, match="unknown unit") as caught:
            await weather.warmer(Celsius(1))
        assert caught.value.__notes__ == ["in the argument degrees of Temperatures.warmer"]


async def test_a_lying_peer_breaks_nothing() -> None:
    async with open_peer(expose(Jobs, Queue())) as (_, peer):
        for id, arguments in enumerate([b"\x91" * 10**4, b"\xdd\xff\xff\xff\xff", b"\xc1", b""]):
            body = [b"%call", b"Jobs.anything", arguments]
            await peer.send(b"req", b"%d" % (2 * id + 1), b"", b"", b"", body=body)
            kind, _, code, *_ = await peer.receive()
            assert (kind, code) == (b"err", b"bad-arguments")


def test_exposed_is_what_expose_returns() -> None:
    assert isinstance(expose(Jobs, Queue()), Exposed)


async def test_what_the_block_raises_comes_out_of_consume_local() -> None:
    with pytest.raises(ConnectionLost):
        async with consume_local(Jobs, Queue()):
            raise ConnectionLost("mine")


class This(Protocol):
    async def add(this, self: int, other: int = 1) -> int: ...  # noqa: N805


class Other:
    async def add(this, self: int, other: int = 1) -> int:  # noqa: N805
        return self + other


async def test_a_parameter_may_be_called_self() -> None:
    async with consume_local(This, Other()) as stand_in:
        assert await stand_in.add(1) == 2
        assert await stand_in.add(self=1, other=2) == 3
        assert str(inspect.signature(stand_in.add)) == "(self: 'int', other: 'int' = 1) -> 'int'"
