"""examples/prometheus.py: its counts, and its page, as Prometheus reads it."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, RemoteError, Settings, open_connection
from bokbok_trio.testing import open_connection_pair

from ..support.helpers import busy_handler, load_example

EXAMPLE = Path(__file__).parents[2] / "examples" / "prometheus.py"
prometheus = load_example("prometheus")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(page: str) -> Samples:
    """Return the samples of a page, by name and labels, as the parser of prometheus_client sees them."""
    parser = pytest.importorskip(
        "prometheus_client.parser", reason="prometheus_client is not installed: pip install '.[examples]'"
    )
    samples: Samples = {}
    for family in parser.text_string_to_metric_families(page):
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            key = sample.name.removeprefix("bokbok_"), frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def find(samples: Samples, sample: str, /, **labels: str) -> float:
    return samples[sample, frozenset(labels.items())]


async def test_the_page_counts_what_went_on(autojump_clock: MockClock) -> None:
    metrics = prometheus.Metrics()

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        async for item in channel:
            await channel.send(item)
        return []

    assert parse(metrics.render()) == {}
    async with open_connection_pair(
        server_handler=busy_handler,
        server_channel_handler=channel_handler,
        server_settings=Settings(instruments=[metrics]),
    ) as (client, _):
        await client.request(["ping", "x"])
        for seconds in ("0.02", "1"):
            await client.request(["sleep", seconds])
        for name in ("a", 'b"\n\\'):
            with pytest.raises(RemoteError):
                await client.request([name])
        async with client.open_channel(['c"\n\\']) as channel:
            for _ in range(2):
                await channel.send(["x"])
                await channel.receive()
            samples = parse(metrics.render())
            assert find(samples, "requests_in_flight", direction="in", kind="channel") == 1
            await channel.end()
        samples = parse(metrics.render())
    assert find(samples, "connections", side="server") == 1
    assert find(parse(metrics.render()), "connections", side="server") == 0
    assert find(samples, "handshakes_total", side="server", outcome="ok") == 1
    assert find(samples, "requests_in_flight", direction="in", kind="request") == 0
    assert find(samples, "requests_in_flight", direction="in", kind="channel") == 0

    def requests(name: str, outcome: str, kind: str = "request") -> float:
        return find(samples, "requests_total", direction="in", kind=kind, name=name, outcome=outcome)

    assert requests("ping", "ok") == 1
    assert requests("sleep", "ok") == 2
    assert requests("other", "error") == 2
    assert requests('c"\\n\\', "ok", "channel") == 1
    assert find(samples, "items_total", direction="in") == find(samples, "items_total", direction="out") == 2
    assert find(samples, "waited_seconds_total", direction="in") == 0

    def seconds_of(name: str, le: str) -> float:
        return find(samples, "request_seconds_bucket", direction="in", name=name, le=le)

    assert [seconds_of("sleep", le) for le in ("0.005", "0.025", "0.5", "2.5", "+Inf")] == [0, 1, 1, 2, 2]
    assert find(samples, "request_seconds_count", direction="in", name="sleep") == 2
    assert find(samples, "request_seconds_sum", direction="in", name="sleep") == pytest.approx(1.02)


async def test_there_are_only_so_many_names() -> None:
    metrics = prometheus.Metrics()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return []

    settings = Settings(instruments=[metrics])
    async with open_connection_pair(server_handler=handler, server_settings=settings) as (client, _):
        for number in range(prometheus.MAX_NAMES + 5):
            await client.request([f"name {number}"])
    samples = parse(metrics.render())
    assert len([name for name, _ in samples if name == "requests_total"]) == prometheus.MAX_NAMES + 1
    assert find(samples, "requests_total", direction="in", kind="request", name="other", outcome="ok") == 5


def test_the_example_serves_both() -> None:
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "127.0.0.1:0", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            *_, address, _, url = process.stdout.readline().split()

            async def ask() -> None:
                async with open_connection(address) as client:
                    assert await client.request(["a"]) == [b"a"]

            trio.run(ask)
            with urllib.request.urlopen(url, timeout=10) as response:
                assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
                samples = parse(response.read().decode())
            assert (
                find(samples, "requests_total", direction="in", kind="request", name="a", outcome="ok") == 1
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(url.replace("/metrics", "/other"), timeout=10)
            caught.value.close()
            assert caught.value.code == 404
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("data", "answer", "seconds"),
    [(b"GET /metrics HTTP/1.1\r\n", b"", prometheus.PATIENCE), (b"x" * 10_000, b"HTTP/1.1 404", 0)],
)
async def test_who_asks_for_nothing_is_let_go(
    data: bytes, answer: bytes, seconds: float, autojump_clock: MockClock
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prometheus.answer_http, prometheus.Metrics(), theirs)
        await ours.send_all(data)
        assert (await ours.receive_some())[:12] == answer
    assert trio.current_time() - began == seconds


async def test_who_leaves_without_a_word_or_an_answer_harms_nothing() -> None:
    for data in (b"", b"GET /metrics HTTP/1.1\r\n\r\n"):
        ours, theirs = trio.testing.memory_stream_pair()
        if data:
            await ours.send_all(data)
        await ours.aclose()
        await prometheus.answer_http(prometheus.Metrics(), theirs)
