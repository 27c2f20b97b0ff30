"""The target `handshake`: each message of it, to either side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from nacl.bindings import crypto_secretbox

from bokbok_trio import Key
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._protocol.limits import Limits
from tests.support import second_implementation as second

from .scripts import (
    Script,
    agree,
    make_field,
    names_of,
    refuses,
    same,
)

USER: Final = b"user"
KEY: Final = Key(bytes(range(64, 96)))
SECRETS: Final = {side: hashlib.blake2b(side.encode()).digest()[:32] for side in ("client", "server")}
DECLARED: Final = Limits(2**20, 100)
SERVICE: Final = "service"


def randomness(side: str) -> Callable[[int], bytes]:
    return lambda size: (SECRETS[side] * 2)[:size]


def make_client(*, sealed: bool) -> ClientHandshake:
    return ClientHandshake(
        user=USER.decode() if sealed else None,
        key=KEY if sealed else None,
        service=SERVICE if sealed else "",
        limits=DECLARED,
        options={"a": b"1"},
        randomness=randomness("client"),
    )


def make_server(*, sealed: bool) -> ServerHandshake:
    return ServerHandshake(
        sealed=sealed,
        service=SERVICE if sealed else "",
        limits=DECLARED,
        options={"a": b"1"},
        randomness=randomness("server"),
    )


def make_second(side: str, *, sealed: bool) -> Any:
    """The same side as the second implementation has it."""
    service = SERVICE.encode() if sealed else b""
    limits = (DECLARED.max_message_size, DECLARED.max_requests)
    secret = SECRETS[side]
    grease = second.options(second.flat({b"a": b"1"}))
    if side == "client":
        return second.Client(
            USER if sealed else b"",
            KEY.raw if sealed else b"",
            service,
            limits,
            secret,
            own_options=grease,
        )
    return second.Server({USER: KEY.raw} if sealed else None, service, limits, secret, own_options=grease)


def change(script: Script, message: bytes) -> bytes:
    """A message that was changed, or another one altogether."""
    operation = script.byte()
    if operation % 4 == 0:
        return script.rest()
    changed = bytearray(message)
    while script:
        match script.byte() % 3:
            case 0:
                changed[script.short() % len(changed)] ^= script.byte()
            case 1:
                at = script.short() % len(changed)
                changed[at : at + script.byte() % 8] = script.take(script.byte() % 8)
            case _:
                del changed[script.short() :]
        if not changed:
            break
    return bytes(changed)


def change_fields(script: Script, fields: list[bytes]) -> list[bytes]:
    """Fields, some of which were changed."""
    changed = list(fields)
    while script:
        at = script.byte() % len(changed)
        changed[at] = make_field(script)
    return changed


def hello(side: str, script: Script, *, sealed: bool) -> None:
    """A side receives any hello."""
    ours = make_client(sealed=sealed) if side == "client" else make_server(sealed=sealed)
    theirs = make_server(sealed=sealed) if side == "client" else make_client(sealed=sealed)
    received = change(script, theirs.hello)
    due = make_second(side, sealed=sealed)
    agree(lambda: ours.receive_hello(received), lambda: due.take_hello(received))
    if sealed and due.hs:
        keys = ours.channel_keys()
        same(keys.c2s + keys.s2c, due.hs)
    size = script.byte() % (len(received) + 1)
    if received == theirs.hello:
        ours.check_hello(received[:size])


def opening(script: Script, *, sealed: bool) -> None:
    """A server receives any `open`, also of a user with the right key."""
    server = make_server(sealed=sealed)
    client, due = make_second("client", sealed=sealed), make_second("server", sealed=sealed)
    server.receive_hello(client.own_hello)
    due.take_hello(client.own_hello)
    client.take_hello(server.hello)
    packet = client.open(bytes(32))
    operation = script.byte() % 4
    if operation < 2 or not sealed:
        received = (
            change(script, packet)
            if operation
            else second.packet(change_fields(script, second.unpack(packet)))
        )
    else:
        received = seal_open(client, script, hashes=operation == 2)

    def take() -> None:
        due.take_open(received)

    def accept() -> None:
        server.receive_open(received)
        server.accept([KEY] if server.user == USER.decode() or not sealed else [])

    agree(accept, take)
    if refuses(take)[0] == "takes":
        same(names_of(server.peer_options), due.peer_options)
        same((server.peer_limits.max_message_size, server.peer_limits.max_requests), due.peer_limits)
    else:
        same((server.final_keys, dict(server.peer_options)), (None, {}))


def seal_open(client: Any, script: Script, *, hashes: bool) -> bytes:
    """An `open` of any fields, sealed under the right key; where `hashes`, by the hash of those fields."""
    wrong = b"" if hashes else script.take(32)
    *six, _ = change_fields(script, second.unpack(client.open(bytes(32))))
    if len(six) > 5:
        missing = 512 - len(second.packet([*six, bytes(80)]))
        six[5] = six[5][: len(six[5]) + missing] if missing < 0 else six[5] + bytes(missing)
    client.hash_open(KEY.raw, six)
    inside = bytes(32) + (client.h1 if hashes else wrong.ljust(32, b"\0"))
    box = crypto_secretbox(inside, client.h1[:24], client.box_key)
    return second.packet([*six, box])


def reply(script: Script, *, sealed: bool) -> None:
    """A client receives any answer, also of a server that has the key."""
    client = make_client(sealed=sealed)
    server, due = make_second("server", sealed=sealed), make_second("client", sealed=sealed)
    client.receive_hello(server.own_hello)
    server.take_hello(client.hello)
    packet = client.open()
    server.take_open(packet)
    if sealed:  # bring the second client to where ours is
        due.take_hello(server.own_hello)
        *six, due.box = second.unpack(packet)
        due.hash_open(KEY.raw, six)
        due.session_key = server.session_key
    right = second.packet([b"accepted", *server.declared, server.proof if sealed else b""])
    operation = script.byte() % 4
    if operation == 0:
        received = second.packet([b"refused", *change_fields(script, [b"busy", b"why"])])
    elif operation == 1:
        received = change(script, right)
    else:
        fields = change_fields(script, second.unpack(right))
        if sealed:
            server.hash_accepted(KEY.raw, fields[:4])
            fields[4:] = [server.proof]
        received = second.packet(fields)

    def take() -> None:
        due.take_reply(received)

    agree(lambda: client.receive_reply(received), take)
    if refuses(take)[0] == "takes":
        same(names_of(client.peer_options), due.peer_options)
        same((client.peer_limits.max_message_size, client.peer_limits.max_requests), due.peer_limits)
        if client.final_keys is not None:
            same(client.final_keys.c2s + client.final_keys.s2c, due.fk)
    else:
        same((client.final_keys, dict(client.peer_options)), (None, {}))


def handshake(data: bytes) -> None:
    """Each message of the handshake, right, changed, or made by a peer with the key that plays foul."""
    script = Script(data)
    kind = script.byte()
    sealed = kind % 2 == 0
    match kind // 2 % 4:
        case 0:
            hello("client", script, sealed=sealed)
        case 1:
            hello("server", script, sealed=sealed)
        case 2:
            opening(script, sealed=sealed)
        case _:
            reply(script, sealed=sealed)
