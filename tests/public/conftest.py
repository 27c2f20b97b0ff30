"""Fixtures of several files."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest

from bokbok_trio import Server, open_server
from bokbok_trio.blocking import Portal

from ..support.blocking_server import KEY, STORY, channel_handler, handler
from ..support.network import Network
from ..support.node_peer import Link, NodeProcess, Role, interrupted, node_process, open_link
from ..support.threads import no_thread_but


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr("bokbok_trio._client.dial", network.dial)
    # The longest waits there are, so that times can be told.
    monkeypatch.setattr(random, "uniform", lambda _least, longest: longest)
    return network


@pytest.fixture
def leaves_no_thread() -> Generator[None]:
    STORY.forget()
    before = set(threading.enumerate())
    yield
    # Of Trio's, some wait a while for more to do.
    no_thread_but({thread for thread in threading.enumerate() if "Trio thread" in thread.name} | before)


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    """A server for blocking clients, which a portal runs."""
    with (
        Portal() as portal,
        portal.enter(
            open_server(f"{tmp_path}/s", handler, channel_handler=channel_handler, user_key={"alice": KEY})
        ) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def process() -> Generator[NodeProcess]:
    with node_process() as process:
        yield process


@pytest.fixture
async def node(process: NodeProcess) -> AsyncGenerator[NodeProcess]:
    async with process.ready():
        await process("ended")
        interrupted.clear()
        yield process


@pytest.fixture(params=["node dials", "node listens"])
def role(request: pytest.FixtureRequest) -> Role:
    role: Role = request.param
    return role


@pytest.fixture
async def link(node: NodeProcess, role: Role, sealed: bool) -> AsyncGenerator[Link]:
    async with open_link(node, role, sealed=sealed) as link:
        yield link
