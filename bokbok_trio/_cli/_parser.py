"""The command line: the commands, their arguments and options, and the help."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from .. import __version__
from . import _keys, _requests, _serving
from ._connecting import DEFAULT_TIMEOUT
from ._exits import FORGIVABLE, CommandError, Exit
from ._fields import ESCAPE, decode_name
from ._output import OUT, Output, write_all

Run = Callable[[argparse.Namespace, Output], None]

DEFAULT_ADDRESS: Final = "localhost:12345"
SHELLS: Final = ("bash", "zsh", "fish", "tcsh")
ADDRESS: Final = "HOST:PORT, [IPV6]:PORT, or the path of a UNIX socket with a slash in it"
FIELD: Final = "a text, @FILE, or - for the standard input; the rest after a backslash is a text"

ARGUMENT: Final = "NAME=TEXT, NAME:=JSON, NAME=@FILE; or one JSON object, or - for one on the standard input"


class Parser(argparse.ArgumentParser):
    """Parses the command line as GNU programs do: options may stand anywhere. They cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command's own arguments. argparse alone fails if options stand between positional ones."""
        assert args is not None
        if self._subparsers is None:
            args = self._sort(list(args))
        return super().parse_known_args(args, namespace)

    def _sort(self, args: list[str]) -> list[str]:
        """Move the options to the front."""
        options: list[str] = []
        rest: list[str] = []
        while args:
            arg = args.pop(0)
            if arg == "--":
                break
            if not arg.startswith("-") or arg == "-" or arg[1].isdigit():
                rest.append(arg)
                continue
            options.append(arg)
            action = self._option_string_actions.get(arg)
            if action is not None and action.nargs != 0:
                options += args[:1]
                del args[:1]
        # argparse would remove another "--", wherever it stands. After a backslash it is kept as a field.
        rest += [f"{ESCAPE}--" if arg == "--" else arg for arg in args]
        return [*options, "--", *rest] if rest else options

    def error(self, message: str) -> NoReturn:
        """Raise an error of the command line, in one line."""
        raise CommandError(f"{message} (see {self.prog} --help)", Exit.USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ARG002  (argparse)
        """Write the help or the version."""
        write_all(OUT, message.encode())


def make_parser() -> Parser:
    """Make the parser of the whole command line. `Namespace.run` is the function that runs the command."""
    parser = Parser(prog="bokbok", description="Requests, typed calls and keys of bokbok_trio, from a shell.")
    parser.add_argument("--version", action="version", version=f"bokbok {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add_request(commands)
    _add_call(commands)
    _add_listing(commands)
    _add_ping(commands)
    _add_serve(commands)
    _add_key(commands)
    _add_users(commands)
    _add_completion(commands)
    return parser


def _add(commands: Any, name: str, run: Run, help: str, description: str = "") -> Parser:
    """Add a command."""
    text = description or f"{help[0].upper()}{help[1:]}."
    parser: Parser = commands.add_parser(name, help=help, description=text)
    parser.set_defaults(run=run, raw=False, graceful=[], verbose=False, shows_log=False)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="write JSON for programs, and errors as JSON too")
    output.add_argument("--seq", action="store_true", help="write JSON as the records of RFC 7464")
    return parser


def _add_connected(commands: Any, name: str, run: Run, help: str, description: str = "") -> Parser:
    """Add a command that needs a connection."""
    parser = _add(commands, name, run, help, description)
    parser.add_argument("address", metavar="ADDRESS", help=ADDRESS)
    access = parser.add_argument_group("connection")
    access.add_argument(
        "--user", metavar="NAME", type=decode_name, help="the user to connect as; BOKBOK_USER if not given"
    )
    key_file = access.add_argument(
        "--key-file", metavar="FILE", help="the file of the user's key; BOKBOK_KEY_FILE if not given"
    )
    complete_files(key_file)
    access.add_argument("--plain", action="store_true", help="use no key, whatever the environment says")
    access.add_argument(
        "--service", metavar="NAME", type=decode_name, default="", help="the name of the service to reach"
    )
    access.add_argument("--insecure", action="store_true", help="allow plain TCP to another machine")
    access.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=parse_seconds,
        help=f"the time limit, 0 for none; {DEFAULT_TIMEOUT:g} if not given, and none for streams",
    )
    access.add_argument(
        "--graceful",
        metavar="CODE",
        action="append",
        type=parse_graceful,
        help="exit with 0 on this error: an exit code, or the code of an error that was answered",
    )
    access.add_argument("-v", "--verbose", action="store_true", help="show the log and tracebacks")
    return parser


def complete_files(action: argparse.Action) -> None:
    """Let the shell complete an argument as the name of a file."""
    action.complete = {  # type: ignore[attr-defined]
        "bash": "_shtab_compgen_files",
        "zsh": "_files",
        "tcsh": "f",
        "fish": "(__fish_complete_path (commandline -ct))",
    }


def parse_seconds(text: str) -> float:
    """Parse a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def parse_count(text: str) -> int:
    """Parse a number of times."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse_graceful(text: str) -> str | Exit:
    """Parse an error that is to exit with 0: an exit code, or the code of an error answer."""
    number = int(text) if text.isascii() and text.isdigit() else None
    if number not in set(Exit):
        return text  # a server's code may consist of digits
    if number not in FORGIVABLE:
        raise argparse.ArgumentTypeError(f"exit code {text} cannot be made 0: use 3 to 8 or 124")
    return Exit(number)


# ---- the commands ----


def _add_raw(parser: Parser, help: str) -> None:
    parser.add_argument("--raw", action="store_true", help=help)


def _add_request(commands: Any) -> None:
    parser = _add_connected(
        commands, "request", _requests.request, "send a request of fields, and write its answer"
    )
    parser.add_argument("field", metavar="FIELD", nargs="+", help=FIELD)
    parser.add_argument(
        "--channel", action="store_true", help="open a channel, and write its items, one a line"
    )
    _add_raw(parser, "write the bytes of the fields, with nothing added")


def _add_call(commands: Any) -> None:
    for name, help, description in (
        ("call", "call a method", "Call a method, and write what it returns as JSON."),
        (
            "follow",
            "write the items of a method that streams",
            "Call a method that streams, and write its items.",
        ),
    ):
        parser = _add_connected(commands, name, _typed("_calls", name), help, description)
        parser.add_argument("method", metavar="METHOD", help="the method, such as Files.stat")
        parser.add_argument("argument", metavar="ARGUMENT", nargs="*", default=[], help=ARGUMENT)
        _add_raw(parser, "write texts and bytes as they are, and not as JSON")


def _add_listing(commands: Any) -> None:
    parser = _add_connected(
        commands, "list", _typed("_listing", "list_all"), "list the methods of the other side"
    )
    parser.add_argument("--markdown", action="store_true", help="write Markdown")
    parser = _add_connected(
        commands,
        "describe",
        _typed("_listing", "describe"),
        "describe a method",
        "Describe a method, and write an example of a call.",
    )
    parser.add_argument("method", metavar="METHOD", help="the method, such as Files.stat")


def _typed(module: str, name: str) -> Run:
    """Return a command that needs the extra ``interface``. Its module is loaded when it runs."""

    def run(options: argparse.Namespace, out: Output) -> None:
        try:
            found = importlib.import_module(f".{module}", __package__)
        except ImportError as exc:
            raise CommandError(str(exc)) from exc
        getattr(found, name)(options, out)

    return run


def _add_ping(commands: Any) -> None:
    parser = _add_connected(commands, "ping", _requests.ping, "measure the round trip")
    parser.add_argument(
        "-c",
        "--count",
        metavar="N",
        type=parse_count,
        default=math.inf,
        help="the number of pings; no limit if not given",
    )
    parser.add_argument(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=parse_seconds,
        default=1.0,
        help="the time between two pings; 1 if not given",
    )


def _add_group(commands: Any, name: str, help: str) -> Any:
    parser: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    return parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)


def _add_file(parser: Parser, help: str, name: str = "file", **options: Any) -> None:
    complete_files(parser.add_argument(name, metavar=name.upper(), help=help, **options))


def _add_key(commands: Any) -> None:
    keys = _add_group(commands, "key", "make, show and check keys")
    new = _add(keys, "new", _keys.new, "make a key, and write its fingerprint")
    _add_file(new, "the new file, or - for the standard output")
    show = _add(keys, "show", _keys.show, "write the fingerprint of a key")
    _add_file(show, "the key file")
    show.add_argument(
        "--secret", action="store_true", help="write the key itself, which nobody else should see"
    )
    check = _add(keys, "check", _keys.check, "check a key for typing errors, and write its fingerprint")
    _add_file(
        check,
        "the key file; or -, to type the key or to read it from the standard input",
        nargs="?",
        default="-",
    )
    derive = _add(
        keys,
        "from-passphrase",
        _keys.from_passphrase,
        "derive a key from a passphrase",
        "Derive a key from a passphrase that is typed, or read from the standard input. "
        "A generated key is better.",
    )
    derive.add_argument(
        "user", metavar="USER", type=decode_name, help="the user's name; the key depends on it"
    )
    _add_file(derive, "the new file, or - for the standard output")


def _add_users(commands: Any) -> None:
    users = _add_group(commands, "users", "change and list the users of a server")
    add = _add(users, "add", _keys.add_user, "add a key of a user, and make the file if it is missing")
    _add_file(add, "the server's file of users")
    add.add_argument("user", metavar="USER", type=decode_name, help="the user's name")
    _add_file(add, "the key file; or -, to type the key or to read it from the standard input", "key")
    remove = _add(users, "remove", _keys.remove_user, "remove a user, or one of the user's keys")
    _add_file(remove, "the server's file of users")
    remove.add_argument("user", metavar="USER", type=decode_name, help="the user's name")
    remove.add_argument(
        "fingerprint",
        metavar="FINGERPRINT",
        nargs="?",
        help="the fingerprint of the key to remove; all keys if not given",
    )
    list = _add(users, "list", _keys.list_users, "list users, with the fingerprints of their keys")
    _add_file(list, "the server's file of users")


def _add_serve(commands: Any) -> None:
    parser = _add(
        commands,
        "serve",
        _serving.serve,
        "serve an object of a module, for development",
        "Serve a handler, or the result of expose(), and start again when the code changes.",
    )
    parser.set_defaults(shows_log=True)
    parser.add_argument("object", metavar="MODULE:OBJECT", help="the object, such as app:handler")
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        default=DEFAULT_ADDRESS,
        help=f"{ADDRESS}; {DEFAULT_ADDRESS} if not given",
    )
    users = parser.add_argument(
        "--users",
        metavar="FILE",
        help="the file of the users and their keys; connections are plain if not given",
    )
    complete_files(users)
    parser.add_argument(
        "--service",
        metavar="NAME",
        type=decode_name,
        default="",
        help="the name of the service, which clients must give too",
    )
    parser.add_argument("--insecure", action="store_true", help="allow plain TCP with other machines")
    parser.add_argument("--no-reload", action="store_true", help="do not start again when the code changes")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show tracebacks of errors of the command"
    )


def _add_completion(commands: Any) -> None:
    parser = _add(
        commands,
        "completion",
        _complete,
        "write the completion script of a shell",
        "Write the completion script of a shell. For bash: "
        "bokbok completion bash > ~/.local/share/bash-completion/completions/bokbok",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _complete(options: argparse.Namespace, out: Output) -> None:
    try:
        import shtab  # noqa: PLC0415  (an extra)
    except ImportError:
        raise CommandError("this needs shtab: install bokbok-trio[completion]") from None
    if options.shell not in shtab.SUPPORTED_SHELLS:
        raise CommandError(f"this version of shtab does not know {options.shell}")
    out.data(shtab.complete(make_parser(), options.shell).encode())
