"""`bokbok key` and `bokbok users`: files of keys and of users."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager, suppress

import trio

from .. import Key, Keyring, passphrase_to_key
from ._connecting import load_key
from ._exits import CommandError, describe_os_error
from ._fields import STDIN, ask_secret
from ._output import Output


def new(options: Namespace, out: Output) -> None:
    """Make a key, and save it in a new file."""
    _save(Key.generate(), options.file, out)


def from_passphrase(options: Namespace, out: Output) -> None:
    """Derive a key from a passphrase, and save it in a new file."""
    passphrase = ask_secret("Passphrase", twice=True)
    with explained():
        key = trio.run(passphrase_to_key, passphrase, options.user)
    _save(key, options.file, out)


def show(options: Namespace, out: Output) -> None:
    """Write the fingerprint of a key, or the key itself if that is asked for."""
    key = _read(options.file)
    if options.secret:
        _write(out, options.file, "key", key.to_text())
    else:
        _write(out, options.file, "fingerprint", key.fingerprint)


def check(options: Namespace, out: Output) -> None:
    """Check that a text is a key without a typing error, and write its fingerprint."""
    _write(out, options.file, "fingerprint", _read(options.file).fingerprint)


def add_user(options: Namespace, out: Output) -> None:
    """Add a key of a user to a file. Make the file if it is missing."""
    key = _read(options.key)
    with explained():
        with suppress(FileExistsError):
            Keyring.create(options.file)
            out.note(f"made {options.file}")
        users = Keyring.load(options.file)
        users.add(options.user, key)
    _write(out, options.user, "fingerprint", key.fingerprint)


def remove_user(options: Namespace, _out: Output) -> None:
    """Remove a user, or one key of the user, from a file."""
    with explained():
        users = Keyring.load(options.file)
        try:
            users.remove(options.user, options.fingerprint)
        except KeyError:
            raise CommandError(f"{options.file} has no user {options.user!r}") from None


def list_users(options: Namespace, out: Output) -> None:
    """Write the users of a file, with the fingerprints of their keys."""
    with explained():
        users = Keyring.load(options.file)
    found = {user: [key.fingerprint for key in keys] for user, keys in users.items()}
    if out.is_for_programs:
        out.value([{"user": user, "fingerprints": each} for user, each in found.items()])
        return
    for user, fingerprints in found.items():
        for fingerprint in fingerprints:
            out.line(f"{fingerprint} {user}")


def _read(path: str) -> Key:
    if path != STDIN:
        return load_key(path)
    with explained():
        return Key.from_text(ask_secret("Key"))


def _save(key: Key, path: str, out: Output) -> None:
    if path == STDIN:
        out.line(key.to_text())
        return
    with explained():
        key.save(path)
    _write(out, path, "fingerprint", key.fingerprint)


def _write(out: Output, name: str, what: str, value: str) -> None:
    """Write one value about a key or a user."""
    if out.is_for_programs:
        out.value({"name": name, what: value})
    else:
        out.line(value)


@contextmanager
def explained() -> Generator[None]:
    """Report the error of a file, a name or a key in one line."""
    try:
        yield
    except OSError as exc:
        raise CommandError(describe_os_error(exc)) from exc
    except (ValueError, MemoryError) as exc:
        raise CommandError(str(exc)) from exc
