"""Streams that can also do without waiting; the encrypted stream; the handshake over a stream; pacing."""
