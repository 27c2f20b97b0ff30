from __future__ import annotations

import copy
import errno
import gc
import hashlib
import multiprocessing
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import traceback
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import nacl.exceptions
import nacl.pwhash
import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

import bokbok_trio._keys
from bokbok_trio import Key, passphrase_to_key
from bokbok_trio._bech32 import encode, to_values
from bokbok_trio._keys import (
    ARGON2ID_MEMORY,
    ARGON2ID_PASSES,
    KEY_SIZE,
    KEY_TEXT_SIZE,
    MAX_NAME_SIZE,
    encode_service,
    encode_user,
)

from ..support.helpers import check_holds_no_secret

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


# ---- their text ----


def test_the_text_of_a_key() -> None:
    """As ``docs/keys.rst`` has it, which a scanner may rely on."""
    text = Key(RAW).to_text()
    assert text == "bokbok-key-1xqcnyve5x5mrwwpev93xxer9venks6t2ddkx6mn0wpchyum5w4mqmyfvga"
    assert len(text) == KEY_TEXT_SIZE
    assert re.fullmatch(r"bokbok-key-1[02-9ac-hj-np-z]{58}", text)


@given(st.binary(min_size=32, max_size=32), st.sampled_from(["", " ", "\n", "\r\n", "\t \u00a0"]))
def test_a_text_is_a_key_again(raw: bytes, space: str) -> None:
    key = Key(raw)
    text = key.to_text()
    assert Key.from_text(text) == Key.from_text(text.upper()) == Key.from_text(space + text + space) == key


@given(st.binary(min_size=32, max_size=32), st.data())
def test_a_mistyped_text_is_noticed_and_not_shown(raw: bytes, data: st.DataObject) -> None:
    text = Key(raw).to_text()
    at = data.draw(st.integers(0, len(text) - 2))
    typed = data.draw(st.sampled_from("qpz0aO1.\u00e9 \n"))
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    for wrong in (
        text[:at] + typed + text[at + 1 :],
        text[:at] + text[at + 1 :],
        text[: at + 1] + text[at:],
        swapped,
    ):
        if wrong.strip() == text:
            continue
        with pytest.raises(ValueError, match=r"^this is not the text of a key: ") as caught:
            Key.from_text(wrong)
        assert wrong[12:30] not in str(caught.value)
        assert text[12:30] not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "it does not begin with bokbok-key-1"),
        ("hello", "it does not begin with bokbok-key-1"),
        (RAW.hex(), "it does not begin with bokbok-key-1"),
        ("bokbok-key-1", "it has 12 characters, and not 70"),
        ("BOKBOK-KEY-1" + "Q" * 57, "it has 69 characters, and not 70"),
        ("bokbok-key-1" + "q" * 59, "it has 71 characters, and not 70"),
        ("bokbok-key-1" + "q" * 58, "the checksum is wrong"),
        ("bokbok-key-1qqqb" + "q" * 54, "character 16 cannot be there: 1, b, i and o never can"),
        ("Bokbok-key-1" + "q" * 58, "upper and lower case are mixed"),
        (encode("bokbok-key-", [*to_values(RAW)[:-1], 1]), "it has bits left over"),
        (encode("bokbok-kez-", to_values(RAW)), "it does not begin with bokbok-key-1"),
    ],
)
def test_it_says_what_is_wrong_with_a_text(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^this is not the text of a key: {message}"):
        Key.from_text(wrong)


def test_a_key_in_hex() -> None:
    assert Key.from_hex(RAW.hex()) == Key.from_hex(f" {RAW.hex().upper()}\n") == Key(RAW)
    for wrong in ("", RAW.hex()[:-1], RAW.hex()[:-2], f"{RAW.hex()}00", f"{RAW.hex()[:-1]}g", "\u0661" * 64):
        with pytest.raises(ValueError, match=r"^a key in hex is 64 hexadecimal digits$"):
            Key.from_hex(wrong)


@pytest.mark.parametrize("text", [RAW, None, 1])
def test_texts_are_str(text: Any) -> None:
    with pytest.raises(TypeError, match=f"^the text of a key is a str, not {type(text).__name__}$"):
        Key.from_text(text)
    with pytest.raises(TypeError, match=f"^a key in hex is a str, not {type(text).__name__}$"):
        Key.from_hex(text)


def test_a_fingerprint_tells_keys_apart_and_shows_none() -> None:
    prints = {Key.generate().fingerprint for _ in range(100)}
    assert len(prints) == 100
    key = Key(RAW)
    assert key.fingerprint == Key(RAW).fingerprint == "dfe6d5582db569c6"
    assert key.fingerprint == hashlib.blake2b(key=RAW, digest_size=8, person=b"bokbok1 key id").hexdigest()


# ---- they stay where they are ----


def test_a_key_cannot_be_changed() -> None:
    key = Key(RAW)
    for name in ("_raw", "raw", "other"):
        with pytest.raises(AttributeError, match="a key cannot be changed"):
            setattr(key, name, RAW[::-1])
        with pytest.raises(AttributeError, match="a key cannot be changed"):
            delattr(key, name)
    cast("Any", key).__init__(RAW[::-1])
    assert key.raw == RAW
    assert copy.copy(key) is copy.deepcopy(key) is copy.deepcopy([key])[0] is key


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_key_is_not_pickled(protocol: int) -> None:
    for thing in (Key(RAW), [Key(RAW)], {"alice": (Key(RAW),)}):
        with pytest.raises(TypeError, match="a key is not pickled") as caught:
            pickle.dumps(thing, protocol)
        assert RAW.decode() not in str(caught.value)


def identity(key: Key) -> Key:
    return key


def test_a_key_gets_into_no_other_process() -> None:
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(TypeError, match="is not pickled"),
    ):
        pool.apply(identity, (Key(RAW),))


# ---- errors hold no secrets ----


TEXT = Key(RAW).to_text()


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (Key, RAW + b"x"),
        (Key, RAW.decode()),
        (Key, bytearray(RAW)),
        (Key.from_text, TEXT[:-1]),
        (Key.from_text, TEXT[:-1] + "q"),
        (Key.from_text, TEXT.capitalize()),
        (Key.from_text, TEXT.encode()),
        (Key.from_hex, RAW.hex()[:-1]),
        (Key.from_hex, RAW.hex().encode()),
    ],
)
def test_an_error_holds_no_key(function: Any, argument: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(argument)
    check_holds_no_secret(caught.value, RAW[:31], RAW[:31].hex(), TEXT[:68], TEXT[:68].capitalize())


def test_an_error_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        with suppress(ValueError):
            Key.from_text("no key")
        assert gc.collect() == 0
    finally:
        gc.enable()


# ---- files ----


def test_a_saved_key_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Key(RAW).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"{TEXT}\n"
    assert Key.load(path) == Key.load(str(path)) == Key(RAW)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_saved_key_is_private_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        Key(RAW).save(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path, link, dangling = tmp_path / "key", tmp_path / "link", tmp_path / "dangling"
    path.write_text("something")
    link.symlink_to(path)
    dangling.symlink_to(tmp_path / "nowhere")
    for there in (path, link, dangling, tmp_path):
        with pytest.raises(FileExistsError) as caught:
            Key(RAW).save(there)
        assert caught.value.filename == str(there)
        check_holds_no_secret(caught.value, TEXT)
    assert path.read_text() == "something"
    assert {*tmp_path.iterdir()} == {path, link, dangling}


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        Key(RAW).save(tmp_path / "key")
    check_holds_no_secret(caught.value, TEXT)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "content",
    [
        f"{TEXT}",
        f"{TEXT}\r\n",
        f"\ufeff# Alice's, of the laptop\n\n  # and\t\n \t{TEXT.upper()}  \n\n",
    ],
)
def test_a_key_file_may_have_comments(content: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8", newline="")
    path.chmod(0o400)
    assert Key.load(path) == Key(RAW)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777, 0o644])
def test_a_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a key"
    Key(RAW).save(path)
    path.chmod(mode)
    with pytest.raises(PermissionError) as caught:
        Key.load(path)
    assert f"others can read or change it: chmod 600 '{path}'" in str(caught.value)
    command = re.search(r"chmod .*'(?=:)", str(caught.value))
    assert command
    subprocess.run(command[0], shell=True, check=True)
    assert Key.load(path) == Key(RAW)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 lines with a key, instead of one"),
        ("# nothing\n", "has 0 lines with a key, instead of one"),
        (f"{TEXT}\n{TEXT}\n", "has 2 lines with a key, instead of one"),
        (f"alice {TEXT}\n", "this is not the text of a key: it does not begin with bokbok-key-1"),
        (TEXT[:-2] + "\n", "this is not the text of a key: it has 68 characters"),
        (f"{TEXT}\xff", "is not text in UTF-8"),
        (f"{TEXT}\n#" + "x" * 2**16, "has more than 65536 bytes"),
    ],
)
def test_a_file_that_holds_no_key(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(ValueError, match=f"^{path}.*{message}") as caught:
        Key.load(path)
    check_holds_no_secret(caught.value, TEXT[:68])


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo, private = tmp_path / "fifo", tmp_path / "directory"
    os.mkfifo(fifo, 0o600)
    private.mkdir(0o700)
    for path in (fifo, private, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file") as caught:
            Key.load(path)
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError):
        Key.load(tmp_path / "nothing")


def test_a_key_file_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", note)
    Key(RAW).save(tmp_path / "key")
    assert synced == [str(tmp_path / "key"), str(tmp_path)]


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


# ---- services ----


@pytest.mark.parametrize(
    ("service", "error", "message"),
    [
        (b"x", TypeError, "a service is a str, not bytes"),
        ("x" * 256, ValueError, "at most 255 bytes of UTF-8, and not 256"),
        ("\u00e9" * 128, ValueError, "at most 255 bytes of UTF-8, and not 256"),
        ("caf" + "e\u0301", ValueError, "is not in normal form C"),
        ("\u212b", ValueError, "is not in normal form C"),
    ],
    ids=ascii,
)
def test_a_service_is_a_str_of_at_most_255_bytes_in_normal_form_c(
    service: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        encode_service(service)


@pytest.mark.parametrize("service", ["", "mail", "caf\u00e9", "x" * 255])
def test_a_service(service: str) -> None:
    assert encode_service(service) == service.encode()


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


@pytest.mark.parametrize(
    ("passphrase", "user"),
    [("secret\ud800", "user"), ("secret", "a\nb"), (b"secret", "user"), ("secret", "")],
)
async def test_a_passphrase_is_in_no_error(argon2id: FakeArgon2id, passphrase: Any, user: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        await passphrase_to_key(passphrase, user)
    assert not argon2id.calls
    check_holds_no_secret(caught.value, "secret")


async def test_it_says_that_there_is_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: int, secret: bytes, *rest: object) -> bytes:
        raise nacl.exceptions.RuntimeError(f"Unexpected failure in key derivation of {secret!r}")

    monkeypatch.setattr(bokbok_trio._keys, "crypto_pwhash_alg", fail)
    with pytest.raises(MemoryError, match="takes 256 MiB of memory, which the system did not give") as caught:
        await passphrase_to_key("secret", "user")
    check_holds_no_secret(caught.value, "secret")


def test_too_little_memory_in_truth() -> None:
    code = """
import resource, trio, bokbok_trio
async def main():
    await trio.to_thread.run_sync(int)  # or no thread would start
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)
    await bokbok_trio.passphrase_to_key("secret", "user")
trio.run(main)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.stderr.splitlines()[-1].startswith("MemoryError: deriving a key takes 256 MiB of memory")
    assert "nacl" not in run.stderr
