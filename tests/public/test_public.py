"""The public names of the package."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bokbok_trio

PUBLIC = {
    "bokbok_trio": {
        *("open_connection", "open_reconnecting", "open_server", "serve", "passphrase_to_key"),
        *("CombinedHandler", "add_handler", "find_handler"),
        *("Channel", "Connection", "ReconnectingConnection", "Server", "Settings", "Key", "Keyring"),
        *("ConnectionStatistics", "ServerStatistics"),
        *("Address", "TCPAddress", "UnixAddress", "PeerCredentials"),
        *("Context", "CurrentRequest", "Fields", "current_request"),
        *("Field", "RequestHandler", "ChannelHandler", "ConnectionHandler", "UserKey", "PeerUser"),
        *("BokbokError", "AddressError", "HandshakeError", "AuthenticationError", "ConnectionRefused"),
        *("ConnectionClosed", "ConnectionLost", "ProtocolError", "MessageTooLarge"),
        *("RemoteError", "RequestError"),
    },
    "bokbok_trio.testing": {
        *("open_connection_pair", "open_memory_server", "consume_local"),
        *("Faults", "FaultyStream", "MemoryListener", "MemoryServer"),
    },
    "bokbok_trio.blocking": {"Channel", "Connection", "Portal", "Stream", "connect"},
    "bokbok_trio.broadcast": {"Broadcast", "Subscription", "WhenFull"},
    "bokbok_trio.files": {"TransferError", "receive_file", "safe_name", "send_file"},
    "bokbok_trio.opentelemetry": {"TracingInstrument"},
    "bokbok_trio.pytest_plugin": {"OpenPair", "OpenServer", "bokbok_pair", "bokbok_server"},
    "bokbok_trio.instruments": {
        *("Instrument", "LogInstrument", "Direction", "HandshakeOutcome", "RequestOutcome"),
        *("HandshakeStarted", "HandshakeEnded", "ConnectionOpened", "ConnectionEnded"),
        *("RequestStarted", "RequestEnded", "ItemPassed"),
    },
    "bokbok_trio.interface": {
        *("expose", "Exposed", "consume", "with_options", "raises", "idempotent"),
        *("Call", "Middleware", "Proceed", "EncodeHook", "DecodeHook"),
        *("list_interfaces", "InterfaceInfo", "MethodInfo"),
    },
}

PACKAGE = Path(bokbok_trio.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def public_objects(module: str) -> Iterator[tuple[str, Any]]:
    """Return public classes and functions by name, and the public members of each class."""
    for name in sorted(PUBLIC[module]):
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield f"{module}.{name}", value
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                # A slot's descriptor is a field of a dataclass, which its class describes.
                if not member.startswith("_") and not inspect.ismemberdescriptor(attribute):
                    yield f"{module}.{name}.{member}", attribute


OBJECTS = {name: value for module in PUBLIC for name, value in public_objects(module)}


def test_the_public_names_are_complete() -> None:
    for name, public in PUBLIC.items():
        module = importlib.import_module(name)
        names = {
            each
            for each, value in vars(module).items()
            if not each.startswith("_") and not isinstance(value, ModuleType)
        }
        assert set(getattr(module, "__all__", names)) == public


def test_modules_that_look_public_are() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in folders.union(MODULES) if not name.startswith("_")} == {
        name.removeprefix("bokbok_trio.") for name in set(PUBLIC) - {"bokbok_trio"}
    }


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (name.rpartition(".")[0], value.__name__)
        for name, value in OBJECTS.items()
        if name.rpartition(".")[0] in PUBLIC
    ],
)
def test_what_is_public_looks_public(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    assert value.__module__ == module
    assert value.__qualname__ == name
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_public_has_a_docstring(name: str) -> None:
    value = OBJECTS[name]
    docstring = getattr(value, "__doc__", None)
    assert docstring
    # Not what a dataclass or a parent class would put there by itself.
    assert not docstring.startswith(f"{name.rpartition('.')[2]}(")
    if inspect.isclass(value):
        assert all(docstring != parent.__doc__ for parent in value.__mro__[1:])


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text()))


def test_every_file_of_interfaces_says_what_it_is_for_and_uses_only_what_is_public() -> None:
    for path in (PACKAGE / "interface").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "bokbok_trio":
                assert {alias.name for alias in node.names} <= PUBLIC["bokbok_trio"], path
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert getattr(node, "level", 0) < 2, path
                assert "bokbok_trio." not in ast.unparse(node), path


WITHOUT_MSGSPEC = """
import sys
sys.modules["msgspec"] = None
import bokbok_trio, bokbok_trio.blocking, bokbok_trio.testing
assert not [name for name in sys.modules if name.startswith("bokbok_trio.interface")]
try:
    import bokbok_trio.interface
except ImportError as exc:
    print(exc)
"""


def test_all_but_interfaces_works_without_msgspec() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_MSGSPEC], capture_output=True, text=True, check=True)
    assert run.stdout == "bokbok_trio.interface needs msgspec: install bokbok-trio[interface]\n"


WITHOUT_OPENTELEMETRY = """
import sys
sys.modules["opentelemetry"] = None
import bokbok_trio, bokbok_trio.instruments, bokbok_trio.testing
try:
    import bokbok_trio.opentelemetry
except ImportError as exc:
    print(exc)
"""


def test_all_but_traces_works_without_opentelemetry() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENTELEMETRY], capture_output=True, text=True, check=True
    )
    text = "bokbok_trio.opentelemetry needs opentelemetry-api: install bokbok-trio[opentelemetry]\n"
    assert run.stdout == text


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("bokbok_trio").joinpath("py.typed").is_file()
