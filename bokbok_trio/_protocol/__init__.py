"""The protocol without I/O: bytes and calls in, bytes and events out. Nothing here imports Trio."""
