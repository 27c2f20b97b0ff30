"""Traces by OpenTelemetry: a span for each request on both sides, where the asker's span is the parent of the
other.

::

    settings = Settings(instruments=[TracingInstrument()])

It needs the extra ``opentelemetry``, which has only the API. To see spans, install the SDK and an exporter as
``docs/watching.rst`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, final

try:
    from opentelemetry import context as contexts, propagate, trace
    from opentelemetry.propagators.textmap import Getter, Setter
except ImportError as exc:
    raise ImportError(
        "bokbok_trio.opentelemetry needs opentelemetry-api: install bokbok-trio[opentelemetry]"
    ) from exc

from ._addresses import TCPAddress
from ._errors import escape
from .instruments import Instrument, RequestEnded, RequestStarted

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator

    from ._addresses import Address

__all__ = ["TracingInstrument"]

SYSTEM: Final = "bokbok"
"""The name of bokbok among systems of remote procedure calls."""


@final
class _ContextGetter(Getter[Mapping[str, "bytes | str"]]):
    """Reads the context of a request. Its names are in lower case, and its values are bytes."""

    def get(self, carrier: Mapping[str, bytes | str], key: str) -> list[str] | None:
        value = carrier.get(key.lower())
        if value is None:
            return None
        text = value if isinstance(value, str) else value.decode(errors="replace")
        # One line, as a header of HTTP is: a propagator logs the values that it cannot parse.
        return [escape(text.replace("\t", " "))]

    def keys(self, carrier: Mapping[str, bytes | str]) -> list[str]:
        return list(carrier)


@final
class _ContextSetter(Setter[dict[str, "bytes | str"]]):
    """Writes the context of a request."""

    def set(self, carrier: dict[str, bytes | str], key: str, value: str) -> None:
        carrier[key.lower()] = value


_GETTER: Final = _ContextGetter()
_SETTER: Final = _ContextSetter()


@final
class TracingInstrument(Instrument):
    """Makes a span for each request and each channel, from its start to its end.

    A request of this side gets a client span, whose parent is the current span. It is sent in the context of
    the request, as ``traceparent`` and the other names of the propagator. A request of the peer gets a server
    span, whose parent is the span in the context, if there is one. It is the current span in the handler and
    in the tasks that the handler starts, so their own requests, and callbacks too, belong to it.

    The attributes are those of the semantic conventions for remote procedure calls: ``rpc.system.name``,
    ``rpc.method`` (the request's name), ``rpc.response.status_code`` and ``error.type`` of a request that
    failed, ``server.address`` and ``server.port`` on the side that dialled, ``network.peer.address`` and
    ``network.peer.port``. There are also ``bokbok.request.id``, ``bokbok.waited`` (seconds),
    ``bokbok.bytes_in``, ``bokbok.bytes_out``, ``bokbok.items_in`` and ``bokbok.items_out``.

    The span processors of the SDK run inside this instrument, and so must not block: use
    ``BatchSpanProcessor``.

    Arguments:
        tracer_provider: gets the spans; None for the global provider of the program.
        propagator: writes and reads the context; None for the global propagator of the program. Its names are
            sent in lower case.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("bokbok_trio", tracer_provider=tracer_provider)
        self._propagator = propagator
        self._spans: dict[RequestStarted, trace.Span] = {}

    def request_started(self, event: RequestStarted) -> None:
        """Begin the span. For a request of the peer, make it the current span of the handler."""
        is_local = event.direction == "out"
        parent = None  # the current span
        if not is_local:
            # The current span is that of the task that opened the connection, and not related to the request.
            propagator = self._propagator or propagate.get_global_textmap()
            parent = propagator.extract(event.context, contexts.Context(), _GETTER)
        span = self._spans[event] = self._tracer.start_span(
            event.name or "request",
            parent,
            trace.SpanKind.CLIENT if is_local else trace.SpanKind.SERVER,
            {
                "rpc.system.name": SYSTEM,
                "rpc.method": event.name,
                "bokbok.request.id": event.id,
                **_describe("network.peer", event.connection.address),
                **_describe("server", event.connection.address if _is_to_server(event) else None),
            },
        )
        if not is_local:
            contexts.attach(trace.set_span_in_context(span, parent))

    def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:
        """Return the span, to be sent with the request."""
        carrier: dict[str, bytes | str] = {}
        propagator = self._propagator or propagate.get_global_textmap()
        propagator.inject(carrier, trace.set_span_in_context(self._spans[event]), _SETTER)
        return carrier

    def request_ended(self, event: RequestEnded) -> None:
        """End the span."""
        span = self._spans.pop(event.request)
        span.set_attribute("bokbok.waited", event.waited)
        span.set_attribute("bokbok.bytes_in", event.bytes_in)
        span.set_attribute("bokbok.bytes_out", event.bytes_out)
        if event.request.has_channel:
            span.set_attribute("bokbok.items_in", event.items_in)
            span.set_attribute("bokbok.items_out", event.items_out)
        if event.outcome != "ok":
            span.set_attribute("error.type", event.code or event.outcome)
            if event.code:
                span.set_attribute("rpc.response.status_code", event.code)
            if event.outcome != "cancelled":  # the asker did not want the answer any more: not an error
                span.set_status(trace.StatusCode.ERROR)
        span.end()


def _is_to_server(event: RequestStarted) -> bool:
    return event.direction == "out" and event.connection.side == "client"


def _describe(prefix: str, address: Address | None) -> dict[str, str | int]:
    """Return the attributes of an address."""
    if address is None:
        return {}
    if isinstance(address, TCPAddress):
        return {f"{prefix}.address": address.host, f"{prefix}.port": address.port}
    return {f"{prefix}.address": str(address)}
