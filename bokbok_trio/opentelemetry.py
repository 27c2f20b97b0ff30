"""Traces by OpenTelemetry: a span for each request on both sides, and the one is the other's parent.

::

    settings = Settings(instruments=[TracingInstrument()])

It needs the extra ``opentelemetry``, which is the API alone. Who wants to see the spans also installs the SDK
and an exporter; ``docs/watching.rst`` shows it.
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
from .instruments import Instrument, RequestEnded, RequestStarted

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator

    from ._addresses import Address

__all__ = ["TracingInstrument"]

SYSTEM: Final = "bokbok"
"""Our name among systems of remote procedure calls."""


@final
class _ContextGetter(Getter[Mapping[str, "bytes | str"]]):
    """Reads the context of a request, whose names are lower-case and whose values are bytes."""

    def get(self, carrier: Mapping[str, bytes | str], key: str) -> list[str] | None:
        value = carrier.get(key.lower())
        if value is None:
            return None
        return [value if isinstance(value, str) else value.decode(errors="replace")]

    def keys(self, carrier: Mapping[str, bytes | str]) -> list[str]:
        return list(carrier)


@final
class _ContextSetter(Setter[dict[str, "bytes | str"]]):
    """Writes it."""

    def set(self, carrier: dict[str, bytes | str], key: str, value: str) -> None:
        carrier[key.lower()] = value


_GETTER: Final = _ContextGetter()
_SETTER: Final = _ContextSetter()


@final
class TracingInstrument(Instrument):
    """Makes a span for each request and each channel, from its start to its end.

    Of a request of this side it is a client's span, in the span that is current where the request is made. It
    travels in the request's context, as ``traceparent`` and what else the propagator has. Of a request of the
    peer's it is a server's span, whose parent is the span that came, if one did; and it is current in the
    handler and the tasks it starts, so what these ask in turn, callbacks too, belongs to it.

    The attributes are those of the semantic conventions for remote procedure calls: ``rpc.system.name``,
    ``rpc.method`` (the request's name), ``rpc.response.status_code`` and ``error.type`` of a request that
    failed, ``server.address`` and ``server.port`` where this side dialled, ``network.peer.address`` and
    ``network.peer.port``. And of our own: ``bokbok.request.id``, ``bokbok.waited`` (seconds),
    ``bokbok.bytes_in``, ``bokbok.bytes_out``, ``bokbok.items_in``, ``bokbok.items_out``.

    The SDK's span processors run in it, and so must not block: use the ``BatchSpanProcessor``.

    Arguments:
        tracer_provider: where spans go; None for the program's own.
        propagator: how they travel; None for the program's own. Its names travel in lower case.
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
        """Begin a span; for a handler, make it current."""
        is_local = event.direction == "out"
        parent = None  # what is current here
        if not is_local:
            # Nothing is, but what was where the connection was opened, which has nothing to do with it.
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
        """Return the span, to travel beside the request."""
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
            if event.outcome != "cancelled":  # which is no failure: somebody wanted it no more
                span.set_status(trace.StatusCode.ERROR)
        span.end()


def _is_to_server(event: RequestStarted) -> bool:
    return event.direction == "out" and event.connection.side == "client"


def _describe(prefix: str, address: Address | None) -> dict[str, str | int]:
    """The attributes of an address."""
    if address is None:
        return {}
    if isinstance(address, TCPAddress):
        return {f"{prefix}.address": address.host, f"{prefix}.port": address.port}
    return {f"{prefix}.address": str(address)}
