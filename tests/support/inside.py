"""What tests reach of the package's inside. No other file of the tests may touch private names."""

from __future__ import annotations

import socket

import pytest

from bokbok_trio._stream.socket import _Borrowed


def take_few(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let sockets take only so many bytes of each send that does not wait."""

    def send(self: socket.socket, data: bytes, flags: int = 0) -> int:
        return socket.socket.send(self, data[:most], flags)

    monkeypatch.setattr(_Borrowed, "send", send)
