"""The yardstick over `trio.SSLStream`; both sides show a certificate and check the other's."""

import ssl
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache

import trio
import trustme

from .bare import Bare, BareConnection, answer
from .base import HOST, Announce, Connection


class BareTLS(Bare):
    """Its address is a port, and a directory with what the client needs."""

    async def serve(self, announce: Announce) -> None:
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
        authority.issue_cert(HOST).configure_cert(context)
        directory = tempfile.mkdtemp()
        authority.cert_pem.write_to_path(f"{directory}/authority.pem")
        certificate = authority.issue_cert("client.example")
        certificate.private_key_and_cert_chain_pem.write_to_path(f"{directory}/client.pem")

        [listener] = await trio.open_ssl_over_tcp_listeners(0, context, host=HOST)
        announce(f"{listener.transport_listener.socket.getsockname()[1]} {directory}")
        await trio.serve_listeners(answer, [listener])

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        port, directory = address.split()
        context = client_context(directory)
        async with await trio.open_ssl_over_tcp_stream(HOST, int(port), ssl_context=context) as stream:
            yield BareConnection(stream)


@cache
def client_context(directory: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=f"{directory}/authority.pem")
    context.load_cert_chain(f"{directory}/client.pem")
    return context
