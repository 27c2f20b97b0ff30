"""The handshake's messages and key schedule: bytes in, bytes out.

`ClientHandshake` and `ServerHandshake` are the two sides. Each has a method per message, to be
called in the order of the messages, once; what is wrong with a message is a `HandshakeError`, after
which the handshake is of no more use. ``_stream/establish.py`` moves the bytes; ``docs/protocol.rst`` is the
normative text. In short, for mode "sealed"::

    client -> server   hello       an ephemeral X25519 key
    server -> client   hello       an ephemeral X25519 key
                       -- from here on inside an anonymous private channel, keys `hs` --
    client -> server   open        user, limits, options, a session key sealed under the user's key
    server -> client   accepted    limits, options, a proof that the server knows the user's key
                       -- from here on under the final keys `fk` --

Invariants
==========

- Every message binds the ones before it by hash; an attacker who changes a bit of any ends up with
  a different hash on each side, and neither a box nor a proof that fits.
- The user's key keys BLAKE2b under a label of its own for each use, and nothing else.
- A client believes nothing of `accepted`, and a server nothing of `open`, before the box or the
  proof in it has been checked, in constant time. The server checks only the form of its fields before.
- A user that is unknown, a name that cannot be one, and a wrong key take the same path through
  `ServerHandshake.accept`, with as many tries, however many keys there are.

The design follows Noise (the running hash, Noise protocol framework, revision 34, section 5) and
WireGuard (a pre-shared key beside an ephemeral exchange); secretbox and X25519 are NaCl's.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from .._settings import MAX_REQUESTS, MIN_MESSAGE_SIZE
from .._types import Side
from .options import NO_OPTIONS, Randomness, decode_options, encode_options
from .packets import LENGTH_SIZE, decode_body, decode_number, describe, encode_number, encode_packet

MAGIC: Final = b"bokbok1\n"

EPHEMERAL_SIZE: Final = 32
"""Bytes of an X25519 public key, and of a secret one."""

NONCE_SIZE: Final = 24
"""Bytes of a secretbox nonce."""

OPEN_SIZE: Final = 512
"""Bytes of a sealed `open` packet, length included, whatever is in it. With the longest user name, numbers
and options 19 are left for the pad."""

BOX_SIZE: Final = 16 + KEY_SIZE + 32
"""Bytes of the box in `open`: the seal, the session key, and the hash h1."""

MAX_REASON_SIZE: Final = 256
"""Bytes of the message in `refused`."""

_NOBODYS_KEY: Final = Key.generate()
"""What a server tries where a user has fewer keys than `MAX_KEYS`. Were it to fit, it would not do."""


def keyed_hash(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
    """The protocol's ``B``: BLAKE2b of so many bytes, personalised by a zero-padded label."""
    return hashlib.blake2b(data, digest_size=size, key=key, person=label).digest()


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What one side declares: bytes of a packet, and incoming requests in flight."""

    max_message_size: int
    max_requests: int

    def fields(self) -> tuple[bytes, bytes]:
        return encode_number(self.max_message_size), encode_number(self.max_requests)

    @classmethod
    def parse(cls, max_message_size: bytes, max_requests: bytes) -> Limits:
        try:
            limits = cls(decode_number(max_message_size), decode_number(max_requests))
        except ProtocolError as exc:
            raise HandshakeError(str(exc)) from None
        if limits.max_message_size < MIN_MESSAGE_SIZE:
            raise HandshakeError(
                f"the peer takes messages of only {limits.max_message_size} bytes, under {MIN_MESSAGE_SIZE}"
            )
        if not 1 <= limits.max_requests <= MAX_REQUESTS:
            raise HandshakeError(
                f"the peer takes {limits.max_requests} requests at once, not 1 to {MAX_REQUESTS}"
            )
        return limits


@final
@dataclass(frozen=True, slots=True)
class DirectionKeys:
    """A key for each direction of the record stream."""

    c2s: bytes
    s2c: bytes

    @classmethod
    def split(cls, derived: bytes) -> DirectionKeys:
        return cls(derived[:KEY_SIZE], derived[KEY_SIZE:])

    def __repr__(self) -> str:
        return "<DirectionKeys>"

    def for_side(self, side: Side) -> dict[str, bytes]:
        """The keyword arguments of a `SecretboxStream` on that side."""
        client = side == "client"
        return {
            "send_key": self.c2s if client else self.s2c,
            "receive_key": self.s2c if client else self.c2s,
        }


class _Handshake:
    """The part of both sides: hello, and the anonymous channel's keys.

    Attributes:
        peer_limits, peer_options, final_keys, key: of the peer, for both directions, and the user's; right
            once the handshake has ended well.
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
        """Bytes of the other side's hello, exactly."""
        return len(self.hello)

    def check_hello(self, start: bytes) -> None:
        """Check the first bytes of the other side's hello, as soon as they are there.

        Raises:
            HandshakeError: they begin no hello that may come here.
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
        return f"a hello that does not fit: we are {ours}, and the peer may be {other}"

    def receive_hello(self, hello: bytes) -> None:
        """Take in the other side's hello, whole.

        Raises:
            HandshakeError: it is none that may come here, or its key is no usable one.
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
        if not self._ee:  # not inside of an `except`: the frames of that exception hold our secret
            raise HandshakeError("the peer's key gives an all-zero secret")
        first, second = (self.hello, hello) if self.side == "client" else (hello, self.hello)
        self._h0 = keyed_hash(32, b"", b"bokbok1 hello", first + second)

    def channel_keys(self) -> DirectionKeys:
        """The keys of the anonymous channel: ``hs``."""
        return DirectionKeys.split(keyed_hash(64, self._ee, b"bokbok1 shake", self._h0))

    def _hash_open(self, fields: Sequence[bytes]) -> bytes:
        service = bytes((len(self._service),)) + self._service
        return keyed_hash(32, b"", b"bokbok1 open", self._h0 + service + encode_packet(*fields))

    def _final_keys(self, key: Key, session_key: bytes, h2: bytes) -> DirectionKeys:
        derived = keyed_hash(64, key.raw, b"bokbok1 final", session_key + self._ee + h2)
        return DirectionKeys.split(derived)


def encode_hello(side: Side, public: bytes) -> bytes:
    """A side's first message; `public` is its ephemeral key, or empty in mode plain."""
    mode = b"sealed" if public else b"plain"
    return MAGIC + encode_packet(b"hello", side.encode(), mode, public)


_HELLO_STARTS: Final[dict[tuple[Side, bool], bytes]] = {
    ("client", True): encode_hello("client", bytes(EPHEMERAL_SIZE))[:-EPHEMERAL_SIZE],
    ("server", True): encode_hello("server", bytes(EPHEMERAL_SIZE))[:-EPHEMERAL_SIZE],
    ("client", False): encode_hello("client", b""),
    ("server", False): encode_hello("server", b""),
}
"""All of a hello but the ephemeral key, by the side that sends it and whether it is sealed: to encode
it each time, to send it and to check the other side's, takes both sides together 5 us."""


def _box_key(key: Key, h1: bytes) -> bytes:
    return keyed_hash(32, key.raw, b"bokbok1 box", h1)


def _hash_accepted(h1: bytes, box: bytes, accepted: bytes) -> bytes:
    return keyed_hash(32, b"", b"bokbok1 accept", h1 + box + accepted)


def _proof(key: Key, h2: bytes) -> bytes:
    return keyed_hash(32, key.raw, b"bokbok1 server", h2)


def _decode(packet: bytes) -> list[bytes]:
    """The fields of exactly one packet, its length included."""
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
        user, key: both, for mode sealed, or neither, for mode plain.
        service: what the client means to reach; part of the hash.
        limits, options: what this side declares. An option that means nothing is added.
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
            self._session_key + self._h1, self._h1[:NONCE_SIZE], _box_key(self.key, self._h1)
        )
        return encode_packet(*fields, self._box)

    def receive_reply(self, packet: bytes) -> None:
        """Take in `accepted` or `refused`. Then `peer_limits`, `peer_options` and `final_keys` are right.

        Raises:
            AuthenticationError: refused for it, or the server's proof does not hold.
            ConnectionRefused: refused for another reason.
            HandshakeError: it is neither.
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
        h2 = _hash_accepted(self._h1, self._box, encode_packet(b"accepted", *declared))
        if not hmac.compare_digest(proof, _proof(self.key, h2)):
            raise AuthenticationError("the server did not prove that it knows the key")
        return self._final_keys(self.key, self._session_key, h2)


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
        sealed: the mode this server speaks; there is no other way in.
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
        """Take in `open`. Then `user` is the name it claims, or None where it cannot be one.

        Nothing of it is believed before `accept`.

        Raises:
            HandshakeError: it is no `open` of this mode.
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
        """Make the `accepted` packet. Then `peer_options`, `final_keys` and `key` are right.

        Arguments:
            keys: the keys the user may have; none where there is no such user. In mode plain there
                are none either.

        Raises:
            AuthenticationError: none of them opens the box. Then `MAX_KEYS` were tried, a random
                one where there are fewer, so that the time does not tell how many there are.
        """
        proof = b""
        if self.sealed:
            key, session_key = self._open_box(keys)
            h2 = _hash_accepted(self._h1, self._box, encode_packet(b"accepted", *self._declared))
            proof = _proof(key, h2)
            self.key, self.final_keys = key, self._final_keys(key, session_key, h2)
        self.peer_options = self._claimed_options
        return encode_packet(b"accepted", *self._declared, proof)

    def _open_box(self, keys: Sequence[Key]) -> tuple[Key, bytes]:
        own = keys[:MAX_KEYS]
        for at in range(MAX_KEYS):
            key = own[at] if at < len(own) else _NOBODYS_KEY
            try:
                opened = crypto_secretbox_open(self._box, self._h1[:NONCE_SIZE], _box_key(key, self._h1))
            except CryptoError:
                continue
            if hmac.compare_digest(opened[KEY_SIZE:], self._h1) and at < len(own):
                return key, opened[:KEY_SIZE]
        raise AuthenticationError(f"user {self.user!r} has no key that fits")


def encode_refused(code: Literal["authentication", "busy", "stopping"], message: str) -> bytes:
    """Make a `refused` packet; the message must fit 256 bytes."""
    return encode_packet(b"refused", code.encode(), message.encode())


def _decode_user(user: bytes) -> str | None:
    try:
        text = user.decode()
        encode_user(text)
    except ValueError:
        return None
    return text
