"""Calls without streams: arguments, results, cancellation, context."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from bokbok_trio import Connection, MessageTooLarge, ProtocolError, RemoteError, Settings, current_request
from bokbok_trio.interface import consume, expose, with_options
from bokbok_trio.testing import consume_local, open_connection_pair

from ..support.helpers import settle
from ..support.job_queue import Job, Jobs, Queue, encode, open_jobs

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
