"""Streams: what `trio.abc.Stream` can do, and what can be done without waiting; encryption; the handshake."""
