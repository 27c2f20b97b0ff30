from __future__ import annotations

import copy
import hashlib
import threading
import traceback
import unicodedata
from typing import Any

import nacl.pwhash
import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

import bokbok_trio._keys
from bokbok_trio import Key, passphrase_to_key
from bokbok_trio._keys import ARGON2ID_MEMORY, ARGON2ID_PASSES, KEY_SIZE, MAX_NAME_SIZE, encode_user

RAW = b"0123456789abcdefghijklmnopqrstuv"

# ---- keys ----


def test_a_key_is_its_bytes() -> None:
    assert Key(RAW).raw == RAW


def test_generated_keys_differ() -> None:
    keys = {Key.generate() for _ in range(10)}
    assert len(keys) == 10
    assert {len(key.raw) for key in keys} == {KEY_SIZE}


def test_equality_and_hash() -> None:
    key, same, other = Key(RAW), Key(bytes(bytearray(RAW))), Key(RAW[::-1])
    assert key == same
    assert hash(key) == hash(same)
    assert key != other
    assert key != RAW
    assert {key, same, other} == {key, other}
    assert copy.deepcopy(key) == key


def test_a_key_does_not_show_itself() -> None:
    key = Key(RAW)
    for shown in (repr(key), str(key), f"{key}", f"{[key]}", "%s %r" % (key, {"k": key}), ascii(key)):  # noqa: UP031
        assert RAW.decode() not in shown
        assert RAW.hex() not in shown
        assert "<Key>" in shown
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"^a key is 32 bytes long, and not {size}$") as caught:
        Key((RAW * 2)[:size])
    assert RAW[:31].decode() not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("raw", [RAW.decode(), bytearray(RAW), memoryview(RAW), None, 32])
def test_a_key_of_something_else(raw: Any) -> None:
    with pytest.raises(TypeError, match=f"^a key is made of bytes, not {type(raw).__name__}$"):
        Key(raw)


# ---- user names ----


@pytest.mark.parametrize(
    "user", ["u", "my user", "J\u00fcrgen", "\u540d\u524d", "\U0001f511", "u" * 255, "\u00fc" * 127]
)
def test_a_user_name(user: str) -> None:
    assert encode_user(user) == user.encode()


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("", "is 1 to 255 bytes of UTF-8, and not 0"),
        ("u" * 256, "is 1 to 255 bytes of UTF-8, and not 256"),
        ("\u00fc" * 128, "is 1 to 255 bytes of UTF-8, and not 256"),
        ("u\u0308", "is not in normal form C"),
        ("\u212b", "is not in normal form C"),
        ("a\0", "has a control character"),
        ("a\nb", "has a control character"),
        ("\x1b[31m", "has a control character"),
        ("\x7f", "has a control character"),
        ("\x85", "has a control character"),
        ("\ud800", "surrogates not allowed"),
    ],
    ids=ascii,
)
def test_no_user_name(user: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_user(user)


@pytest.mark.parametrize("user", [b"user", None, 1])
def test_a_user_name_of_something_else(user: Any) -> None:
    with pytest.raises(TypeError, match=f"^a user name is a str, not {type(user).__name__}$"):
        encode_user(user)


@given(st.text(max_size=10))
def test_user_names_are_taken_or_refused(user: str) -> None:
    try:
        encoded = encode_user(user)
    except ValueError:
        return
    assert encoded.decode() == user == unicodedata.normalize("NFC", user)
    assert 1 <= len(encoded) <= MAX_NAME_SIZE


# ---- passphrases ----


async def test_a_passphrase_is_derived_by_argon2id_in_normal_form_c() -> None:
    salt = hashlib.blake2b(b"user", digest_size=16, person=b"bokbok1 argon2id").digest()
    expected = nacl.pwhash.argon2id.kdf(32, "caf\u00e9".encode(), salt, opslimit=3, memlimit=256 * 2**20)
    assert await passphrase_to_key("cafe\u0301", "user") == Key(expected)


class FakeArgon2id:
    """In the place of the real one, which takes its time; it waits while it is held."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.started = trio.Event()
        self.may_go_on = threading.Event()
        self.finished = threading.Event()

    def __call__(self, *args: Any) -> bytes:
        self.calls.append(args)
        trio.from_thread.run_sync(self.started.set)
        self.may_go_on.wait(10)
        self.finished.set()
        return hashlib.blake2b(args[1], digest_size=args[0], salt=args[2]).digest()


@pytest.fixture
def argon2id(monkeypatch: pytest.MonkeyPatch) -> FakeArgon2id:
    fake = FakeArgon2id()
    monkeypatch.setattr(bokbok_trio._keys, "crypto_pwhash_alg", fake)
    return fake


async def test_the_loop_goes_on_meanwhile(argon2id: FakeArgon2id) -> None:
    keys = []

    async def derive() -> None:
        keys.append(await passphrase_to_key("secret", "user"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(derive)
        await argon2id.started.wait()
        assert not keys
        argon2id.may_go_on.set()
    assert len(keys) == 1


async def test_every_user_has_another_salt_and_the_cost_is_fixed(argon2id: FakeArgon2id) -> None:
    argon2id.may_go_on.set()
    users = ["user", "User", "other"]
    keys = {await passphrase_to_key("secret", user) for user in users}
    assert len(keys) == len({call[2] for call in argon2id.calls}) == len(users)
    assert {call[3:5] for call in argon2id.calls} == {(ARGON2ID_PASSES, ARGON2ID_MEMORY)}


async def test_cancelled_it_returns_at_once(argon2id: FakeArgon2id) -> None:
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passphrase_to_key, "secret", "user")
            await argon2id.started.wait()
            nursery.cancel_scope.cancel()
        assert not argon2id.finished.is_set()
    finally:
        argon2id.may_go_on.set()
        assert argon2id.finished.wait(10)


async def test_it_is_a_checkpoint(argon2id: FakeArgon2id) -> None:
    argon2id.may_go_on.set()
    with trio.testing.assert_checkpoints():
        await passphrase_to_key("secret", "user")


@pytest.mark.parametrize(
    ("passphrase", "user", "error", "message"),
    [
        ("", "user", ValueError, "a passphrase must not be empty"),
        (b"secret", "user", TypeError, "a passphrase is a str, not bytes"),
        (None, "user", TypeError, "a passphrase is a str, not NoneType"),
        ("secret", "", ValueError, "a user name is 1 to 255 bytes"),
        ("secret", "a\nb", ValueError, "has a control character"),
        ("secret", b"user", TypeError, "a user name is a str, not bytes"),
    ],
)
async def test_no_passphrase_or_user(
    argon2id: FakeArgon2id, passphrase: Any, user: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await passphrase_to_key(passphrase, user)
    assert not argon2id.calls


async def test_a_passphrase_that_has_no_utf_8_does_not_show_itself(argon2id: FakeArgon2id) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its message is what this is about)
        await passphrase_to_key("secret\ud800", "user")
    assert not argon2id.calls
    exc: BaseException | None = caught.value
    while exc is not None:
        assert "secret" not in repr(exc) + str(exc) + repr(vars(exc))
        exc = exc.__cause__ or exc.__context__
