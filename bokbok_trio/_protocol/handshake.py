"""The messages of the handshake: bytes in, bytes out.

`ClientHandshake` and `ServerHandshake` are the two sides. Each has a method for each message; call them in
the order of the messages, once. A bad message is a `HandshakeError`, after which the handshake is useless.
``_stream/establish.py`` moves the bytes, `key_schedule` has the hashes and keys, and ``docs/protocol.rst`` is
the normative text. In mode "sealed" the messages are::

    client -> server   hello       an ephemeral X25519 key
    server -> client   hello       an ephemeral X25519 key
                       -- from here on inside an anonymous private channel, keys `hs` --
    client -> server   open        user, limits, options, a session key sealed under the user's key
    server -> client   accepted    limits, options, a proof that the server knows the user's key
                       -- from here on under the final keys `fk` --

Invariants
==========

- Every message binds the ones before it by hash. If an attacker changes a bit of any message, the two sides
  have different hashes, and neither the box nor the proof fits.
- A client believes nothing in `accepted` before it has checked the proof, and a server believes nothing in
  `open` before it has opened the box, both in constant time. Before that the server only checks the form of
  the fields.
- An unknown user, an impossible user name and a wrong key take the same path through
  `ServerHandshake.accept`, with as many tries, however many keys the user has.

The design follows Noise (the running hash; Noise protocol framework, revision 34, section 5) and
WireGuard (a pre-shared key beside an ephemeral exchange). Secretbox and X25519 are NaCl's.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, Literal, final

from nacl.bindings import (
    crypto_scalarmult,
    crypto_scalarmult_base,
    crypto_secretbox,
    crypto_secretbox_open,
)
from nacl.exceptions import CryptoError, RuntimeError as SodiumError

from .._errors import AuthenticationError, ConnectionRefused, HandshakeError, ProtocolError
from .._keys import KEY_SIZE, MAX_KEYS, Key, encode_service, encode_user
from .._types import Side
from .key_schedule import (
    DirectionKeys,
    derive_box_key,
    derive_channel_keys,
    derive_final_keys,
    hash_accepted,
    hash_hellos,
    hash_open,
    make_proof,
)
from .limits import Limits
from .options import NO_OPTIONS, Randomness, decode_options, encode_options
from .packets import LENGTH_SIZE, decode_body, describe, encode_packet

MAGIC: Final = b"bokbok1\n"

EPHEMERAL_SIZE: Final = 32
"""Bytes of an X25519 public key, and of a secret one."""

NONCE_SIZE: Final = 24
"""Bytes of a secretbox nonce."""

OPEN_SIZE: Final = 512
"""Bytes of every sealed `open` packet, length included, so that its size tells nothing. With the longest user
name, numbers and options, 19 bytes remain for the pad."""

BOX_SIZE: Final = 16 + KEY_SIZE + 32
"""Bytes of the box in `open`: the seal, the session key, and the hash h1."""

MAX_REASON_SIZE: Final = 256
"""Bytes of the message in `refused`."""

_NOBODYS_KEY: Final = Key.generate()
"""A server tries this key in place of keys that a user does not have. It never lets anybody in."""


class _Handshake:
    """The part that both sides share: hello, and the anonymous channel's keys.

    Attributes:
        peer_limits, peer_options: those of the peer, once the handshake has ended well.
        final_keys: the keys of the open connection, once the handshake has ended well; None in mode plain.
        key: the user's key; None in mode plain.
    """

    side: Side

    def __init__(
        self,
        *,
        sealed: bool,
        service: str,
        limits: Limits,
        options: Mapping[str, bytes],
        randomness: Randomness,
    ) -> None:
        self.sealed = sealed
        self.peer_limits = limits
        self.peer_options = NO_OPTIONS
        self.final_keys: DirectionKeys | None = None
        self.key: Key | None = None
        self._service = encode_service(service)
        self._randomness = randomness
        self._secret = randomness(EPHEMERAL_SIZE) if sealed else b""
        self._public = crypto_scalarmult_base(self._secret) if sealed else b""
        self.hello: Final = _HELLO_STARTS[self.side, sealed] + self._public
        self._declared = (*limits.fields(), encode_options(options, randomness))
        self._ee = b""
        self._h0 = b""
        self._h1 = b""
        self._box = b""

    @property
    def hello_size(self) -> int:
        """The exact number of bytes of the other side's hello."""
        return len(self.hello)

    def check_hello(self, start: bytes) -> None:
        """Check the first bytes of the other side's hello, without waiting for the rest.

        Raises:
            HandshakeError: they do not begin the hello that must come here.
        """
        expected = _HELLO_STARTS["server" if self.side == "client" else "client", self.sealed]
        if start[: len(expected)] != expected[: len(start)]:
            raise HandshakeError(self._describe_hello(start))

    def _describe_hello(self, start: bytes) -> str:
        if not MAGIC.startswith(start[: len(MAGIC)]):
            return f"not a bokbok peer: the first bytes are {start[: len(MAGIC)]!r}"
        if start == self.hello[: len(start)]:
            return "our own hello came back"
        ours, other = ("sealed", "plain") if self.sealed else ("plain", "sealed")
        return f"a hello that does not fit: this side is {ours}, and the peer may be {other}"

    def receive_hello(self, hello: bytes) -> None:
        """Take the other side's hello, all of it.

        Raises:
            HandshakeError: it is not the hello that must come here, or its key is not usable.
        """
        if len(hello) != self.hello_size:
            raise HandshakeError(f"a hello of {len(hello)} bytes instead of {self.hello_size}")
        self.check_hello(hello)
        if not self.sealed:
            return
        theirs = hello[-EPHEMERAL_SIZE:]
        if theirs == self._public:
            raise HandshakeError("our own key came back")
        with suppress(SodiumError):
            self._ee = crypto_scalarmult(self._secret, theirs)
        # Raised outside of an `except`, or it would refer to an exception whose frames hold our secret.
        if not self._ee:
            raise HandshakeError("the peer's key gives an all-zero secret")
        both = (self.hello, hello) if self.side == "client" else (hello, self.hello)
        self._h0 = hash_hellos(*both)

    def channel_keys(self) -> DirectionKeys:
        """Return the keys of the anonymous channel, ``hs``."""
        return derive_channel_keys(self._ee, self._h0)

    def _hash_open(self, fields: Sequence[bytes]) -> bytes:
        return hash_open(self._h0, self._service, encode_packet(*fields))


def encode_hello(side: Side, public: bytes) -> bytes:
    """Encode a side's first message. `public` is its ephemeral key, or empty in mode plain."""
    mode = b"sealed" if public else b"plain"
    return MAGIC + encode_packet(b"hello", side.encode(), mode, public)


_HELLO_STARTS: Final[dict[tuple[Side, bool], bytes]] = {
    ("client", True): encode_hello("client", bytes(EPHEMERAL_SIZE))[:-EPHEMERAL_SIZE],
    ("server", True): encode_hello("server", bytes(EPHEMERAL_SIZE))[:-EPHEMERAL_SIZE],
    ("client", False): encode_hello("client", b""),
    ("server", False): encode_hello("server", b""),
}
"""A hello without its ephemeral key, by the side that sends it and whether it is sealed. Encoded once,
because each handshake uses two of them on either side."""


def _decode(packet: bytes) -> list[bytes]:
    """Decode the fields of exactly one packet, given with its length."""
    if int.from_bytes(packet[:LENGTH_SIZE], "big") != len(packet) - LENGTH_SIZE:
        raise HandshakeError("not exactly one packet")
    try:
        return decode_body(packet[LENGTH_SIZE:])
    except ProtocolError as exc:
        raise HandshakeError(str(exc)) from None


@final
class ClientHandshake(_Handshake):
    """The side that dialled.

    Arguments:
        user, key: both for mode sealed, neither for mode plain.
        service: the name of the service that the client means to reach. It is only hashed, never sent.
        limits, options: this side's. One option without a meaning is added, see `options`.
        randomness: where random bytes come from; for test vectors.
    """

    side: Side = "client"

    def __init__(
        self,
        *,
        user: str | None,
        key: Key | None,
        service: str,
        limits: Limits,
        options: Mapping[str, bytes] = NO_OPTIONS,
        randomness: Randomness = secrets.token_bytes,
    ) -> None:
        super().__init__(
            sealed=key is not None, service=service, limits=limits, options=options, randomness=randomness
        )
        self._user = b"" if user is None else encode_user(user)
        self.key = key
        self._session_key = b""

    def open(self) -> bytes:
        """Make the `open` packet."""
        fields = [b"open", self._user, *self._declared, b""]
        if self.key is None:
            return encode_packet(*fields, b"")
        fields[-1] = bytes(OPEN_SIZE - len(encode_packet(*fields, bytes(BOX_SIZE))))
        self._h1 = self._hash_open(fields)
        self._session_key = self._randomness(KEY_SIZE)
        self._box = crypto_secretbox(
            self._session_key + self._h1, self._h1[:NONCE_SIZE], derive_box_key(self.key, self._h1)
        )
        return encode_packet(*fields, self._box)

    def receive_reply(self, packet: bytes) -> None:
        """Take `accepted` or `refused`. Afterwards `peer_limits`, `peer_options` and `final_keys` are set.

        Raises:
            AuthenticationError: the server refused the user or the key, or its proof is wrong.
            ConnectionRefused: the server refused for another reason.
            HandshakeError: it is neither of these packets.
        """
        match _decode(packet):
            case [b"accepted", max_message_size, max_requests, options, proof]:
                final_keys = self._check_proof([max_message_size, max_requests, options], proof)
                peer_options = decode_options(options)
                self.peer_limits = Limits.parse(max_message_size, max_requests)
                self.peer_options, self.final_keys = peer_options, final_keys
            case [b"refused", code, message]:
                raise _refusal(code, message)
            case fields:
                raise HandshakeError(f"expected accepted or refused, got {describe(fields)}")

    def _check_proof(self, declared: Sequence[bytes], proof: bytes) -> DirectionKeys | None:
        if self.key is None:
            if proof:
                raise HandshakeError("a proof in mode plain")
            return None
        h2 = hash_accepted(self._h1, self._box, encode_packet(b"accepted", *declared))
        if not hmac.compare_digest(proof, make_proof(self.key, h2)):
            raise AuthenticationError("the server did not prove that it knows the key")
        return derive_final_keys(self.key, self._session_key, self._ee, h2)


def _refusal(code: bytes, message: bytes) -> HandshakeError:
    if len(message) > MAX_REASON_SIZE:
        return HandshakeError(f"a refusal of {len(message)} bytes exceeds the limit of {MAX_REASON_SIZE}")
    text = message.decode(errors="replace")
    match code:
        case b"authentication":
            return AuthenticationError(f"the server refused: {text!r}")
        case b"busy" | b"stopping":
            return ConnectionRefused(f"the server refused: {text!r}", code.decode())
        case _:
            return HandshakeError(f"a refusal with the unknown code {code[:20]!r}")


@final
class ServerHandshake(_Handshake):
    """The side that accepted.

    Arguments:
        sealed: the mode of this server. It takes no client of the other mode.
        service, limits, options, randomness: as for the client.
    """

    side: Side = "server"

    def __init__(
        self,
        *,
        sealed: bool,
        service: str,
        limits: Limits,
        options: Mapping[str, bytes] = NO_OPTIONS,
        randomness: Randomness = secrets.token_bytes,
    ) -> None:
        super().__init__(
            sealed=sealed, service=service, limits=limits, options=options, randomness=randomness
        )
        self.user: str | None = None
        self._claimed_options = NO_OPTIONS

    def receive_open(self, packet: bytes) -> None:
        """Take `open`. Afterwards `user` is the claimed name; None: it cannot be a user's name.

        Nothing in the packet is believed before `accept`.

        Raises:
            HandshakeError: it is not an `open` of this mode.
        """
        try:
            tag, user, max_message_size, max_requests, options, pad, box = fields = _decode(packet)
        except ValueError:
            raise HandshakeError("expected open, which has seven fields") from None
        if tag != b"open":
            raise HandshakeError(f"expected open, not {tag[:20]!r}")
        if self.sealed:
            if len(packet) != OPEN_SIZE or len(box) != BOX_SIZE or pad.strip(b"\0"):
                raise HandshakeError("an open with invalid padding")
        elif user or pad or box:
            raise HandshakeError("an open with a user, a pad or a box in mode plain")
        self.peer_limits = Limits.parse(max_message_size, max_requests)
        self._claimed_options = decode_options(options)
        self.user = _decode_user(user)
        self._box = box
        if self.sealed:
            self._h1 = self._hash_open(fields[:-1])

    def accept(self, keys: Sequence[Key]) -> bytes:
        """Make the `accepted` packet. Afterwards `peer_options`, `final_keys` and `key` are set.

        Arguments:
            keys: the keys the user may have; empty for an unknown user, and in mode plain.

        Raises:
            AuthenticationError: none of the keys opens the box. `MAX_KEYS` keys were tried, random ones in
                place of missing ones, so that the time does not tell how many keys there are.
        """
        proof = b""
        if self.sealed:
            key, session_key = self._open_box(keys)
            h2 = hash_accepted(self._h1, self._box, encode_packet(b"accepted", *self._declared))
            proof = make_proof(key, h2)
            self.key, self.final_keys = key, derive_final_keys(key, session_key, self._ee, h2)
        self.peer_options = self._claimed_options
        return encode_packet(b"accepted", *self._declared, proof)

    def _open_box(self, keys: Sequence[Key]) -> tuple[Key, bytes]:
        # A client without a key must not learn from the time how many keys the user has. So as many are tried
        # in any case; only a client that knows a key gets its answer sooner.
        own = keys[:MAX_KEYS]
        for at in range(MAX_KEYS):
            key = own[at] if at < len(own) else _NOBODYS_KEY
            try:
                opened = crypto_secretbox_open(
                    self._box, self._h1[:NONCE_SIZE], derive_box_key(key, self._h1)
                )
            except CryptoError:
                continue
            if hmac.compare_digest(opened[KEY_SIZE:], self._h1) and at < len(own):
                return key, opened[:KEY_SIZE]
        raise AuthenticationError(f"user {self.user!r} has no key that fits")


def encode_refused(code: Literal["authentication", "busy", "stopping"], message: str) -> bytes:
    """Make a `refused` packet. The message takes at most `MAX_REASON_SIZE` bytes."""
    return encode_packet(b"refused", code.encode(), message.encode())


def _decode_user(user: bytes) -> str | None:
    try:
        text = user.decode()
        encode_user(text)
    except ValueError:
        return None
    return text
