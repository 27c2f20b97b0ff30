"""Metrics for Prometheus: an instrument that counts, and the page that Prometheus reads.

python examples/prometheus.py localhost:12345 localhost:9464    serve an echo, and http://localhost:9464/metrics

Copy `Metrics` and `serve_metrics` into your program. The page is in the text format of
https://prometheus.io/docs/instrumenting/exposition_formats/, and needs no package.
"""

import bisect
import math
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

import trio

from bokbok_trio import BokbokError, Connection, Server, Settings, open_server
from bokbok_trio.instruments import (
    ConnectionEnded,
    ConnectionOpened,
    HandshakeEnded,
    Instrument,
    ItemPassed,
    RequestEnded,
    RequestStarted,
)

MAX_NAMES = 100
"""Names of requests that get a label of their own: Prometheus keeps a time series for each."""

BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, math.inf)
"""Seconds of requests: the upper bounds of the buckets of their histogram."""

MAX_HEAD = 8192
"""Bytes of the head of an HTTP request."""

PATIENCE = 5.0
"""Seconds that a client of the page may take."""

Labels = tuple[str, ...]


class Metrics(Instrument):
    """Counts events, on any number of connections.

    A peer can invent names for its requests. So a name gets a label of its own only after a request with that
    name succeeded, and only up to a limit; all others are ``other``.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._handshakes = Counter[Labels]()
        self._connections = Counter[Labels]()
        self._in_flight = Counter[Labels]()
        self._requests = Counter[Labels]()
        self._waited = defaultdict[Labels, float](float)
        self._bytes = Counter[Labels]()
        self._items = Counter[Labels]()
        self._seconds = defaultdict[Labels, float](float)
        self._buckets: dict[Labels, list[int]] = {}

    def handshake_ended(self, event: HandshakeEnded) -> None:
        """Count a handshake by its outcome."""
        self._handshakes[event.handshake.side, event.outcome] += 1

    def connection_opened(self, event: ConnectionOpened) -> None:
        """Count a connection."""
        self._connections[(event.connection.side,)] += 1

    def connection_ended(self, event: ConnectionEnded) -> None:
        """Count one connection less."""
        self._connections[(event.connection.side,)] -= 1

    def request_started(self, event: RequestStarted) -> None:
        """Count one more request in flight."""
        self._in_flight[event.direction, _kind(event)] += 1

    def request_ended(self, event: RequestEnded) -> None:
        """Count a request's outcome, bytes, items and times."""
        request = event.request
        if event.outcome == "ok" and len(self._names) < MAX_NAMES:
            self._names.add(request.name)
        name = request.name if request.name in self._names else "other"
        kind = _kind(request)
        self._in_flight[request.direction, kind] -= 1
        self._requests[request.direction, kind, name, event.outcome] += 1
        self._waited[(request.direction,)] += event.waited
        self._bytes[("in",)] += event.bytes_in
        self._bytes[("out",)] += event.bytes_out
        if not request.has_channel:  # a channel may last for any time
            labels = request.direction, name
            buckets = self._buckets.setdefault(labels, [0] * len(BUCKETS))
            buckets[bisect.bisect_left(BUCKETS, event.seconds)] += 1
            self._seconds[labels] += event.seconds

    def item_passed(self, event: ItemPassed) -> None:
        """Count an item."""
        self._items[(event.direction,)] += 1

    def render(self) -> str:
        """Return the page."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _family("handshakes_total", "counter", self._handshakes, "side", "outcome")
        yield from _family("connections", "gauge", self._connections, "side")
        yield from _family("requests_in_flight", "gauge", self._in_flight, "direction", "kind")
        yield from _family(
            "requests_total", "counter", self._requests, "direction", "kind", "name", "outcome"
        )
        yield from _family("waited_seconds_total", "counter", self._waited, "direction")
        yield from _family("bytes_total", "counter", self._bytes, "direction")
        yield from _family("items_total", "counter", self._items, "direction")
        yield "# TYPE bokbok_request_seconds histogram"
        for labels, buckets in self._buckets.items():
            shown = _labels(("direction", "name"), labels)
            count = 0
            for bound, number in zip(BUCKETS, buckets, strict=True):
                count += number
                le = "+Inf" if bound == math.inf else str(bound)
                yield f'bokbok_request_seconds_bucket{{{shown},le="{le}"}} {count}'
            yield f"bokbok_request_seconds_sum{{{shown}}} {self._seconds[labels]}"
            yield f"bokbok_request_seconds_count{{{shown}}} {count}"


def _kind(request: RequestStarted) -> str:
    return "channel" if request.has_channel else "request"


def _family(name: str, kind: str, values: Mapping[Labels, float], *labels: str) -> Iterator[str]:
    yield f"# TYPE bokbok_{name} {kind}"
    for key, value in values.items():
        yield f"bokbok_{name}{{{_labels(labels, key)}}} {value}"


def _labels(names: tuple[str, ...], values: Labels) -> str:
    escaped = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(names, escaped, strict=True))


async def answer_http(metrics: Metrics, stream: trio.abc.Stream) -> None:
    """Answer one request over HTTP/1, and close."""
    head = b""
    with trio.move_on_after(PATIENCE):
        async with stream:
            try:
                while b"\r\n\r\n" not in head and len(head) < MAX_HEAD:
                    received = await stream.receive_some(MAX_HEAD)
                    if not received:
                        return
                    head += received
                if head.startswith((b"GET /metrics HTTP/1.", b"GET /metrics?")):
                    status, page = "200 OK", metrics.render().encode()
                else:
                    status, page = "404 Not Found", b"the metrics are at /metrics\n"
                await stream.send_all(
                    (
                        f"HTTP/1.1 {status}\r\n"
                        "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                        f"Content-Length: {len(page)}\r\n"
                        "Connection: close\r\n\r\n"
                    ).encode()
                    + page
                )
            except trio.BrokenResourceError:
                pass  # the client has left


async def serve_metrics(
    metrics: Metrics,
    host: str,
    port: int,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the page until cancelled."""
    await trio.serve_tcp(partial(answer_http, metrics), port, host=host, task_status=task_status)


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    """Echo the request."""
    return request


async def stop_on_signals(server: Server, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and Ctrl-C give requests in flight ten seconds; a second signal ends them at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            server.stop(grace)


async def serve(address: str, page: str) -> None:
    """Serve the echo and the page until a signal comes."""
    metrics = Metrics()
    host, _, port = page.rpartition(":")
    async with (
        trio.open_nursery() as nursery,
        open_server(address, echo, settings=Settings(instruments=[metrics])) as server,
    ):
        await nursery.start(stop_on_signals, server)
        listeners = await nursery.start(serve_metrics, metrics, host, int(port))
        number = listeners[0].socket.getsockname()[1]
        print("serving on", *server.addresses, f"and http://{host}:{number}/metrics", flush=True)
        await server.wait_stopped()
        nursery.cancel_scope.cancel()
    print("stopped")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [address, page]:
            main = partial(serve, address, page)
        case _:
            sys.exit(__doc__)
    try:
        trio.run(main)
    except* KeyboardInterrupt:
        print("bye")
    except* (BokbokError, OSError, ValueError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"prometheus: {error}")
