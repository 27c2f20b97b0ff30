"""Listen on and dial a link-local IPv6 address, in a network of this process's own.

The addresses of the machine's own interfaces come and go while tests run. Run by `unshare
--map-root-user --net`, where the loopback interface is down and may be given such an address.
"""

from __future__ import annotations

import fcntl
import socket
import struct

import pytest
import trio

from bokbok_trio import AddressError, TCPAddress
from bokbok_trio._sockets import stream_address
from tests.support.sockets import dial_to, listen_on, tcp_address

SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
IFF_UP = 1

HOST = "fe80::1%lo"


def add_link_local() -> None:
    """Set the loopback interface up, with the address `HOST`."""
    number = socket.if_nametoindex("lo")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        address = socket.inet_pton(socket.AF_INET6, HOST.partition("%")[0])
        fcntl.ioctl(sock, SIOCSIFADDR, struct.pack("=16sIi", address, 64, number))


async def main() -> None:
    add_link_local()
    [listener] = await listen_on(TCPAddress(HOST, 0), insecure=True)
    async with listener:
        address = tcp_address(listener)
        assert address.host == HOST
        async with await dial_to(address, insecure=True) as stream, await listener.accept() as accepted:
            assert stream_address(stream) == address
            peer = stream_address(accepted)
            assert isinstance(peer, TCPAddress)
            assert peer.host == HOST
        with pytest.raises(AddressError, match=f"^plain TCP with {HOST}, which is not loopback"):
            await dial_to(address)


if __name__ == "__main__":
    trio.run(main)
