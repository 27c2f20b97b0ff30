"""The command line: which commands there are, and what each takes."""

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
FIELD: Final = "a text, @FILE, or - for the standard input; after a backslash all is text"

ARGUMENT: Final = "NAME=TEXT, NAME:=JSON, NAME=@FILE; or one JSON object, or - for one on the standard input"


class Parser(argparse.ArgumentParser):
    """Parses the command line as GNU programs do: options may stand anywhere, and none is abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command's own arguments; argparse gives up where positional ones are not in a row."""
        assert args is not None
        if self._subparsers is None:
            args = self._sort(list(args))
        return super().parse_known_args(args, namespace)

    def _sort(self, args: list[str]) -> list[str]:
        """Put options first."""
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
        # argparse takes another "--" away, wherever it stands; behind a backslash it is a field.
        rest += [f"{ESCAPE}--" if arg == "--" else arg for arg in args]
        return [*options, "--", *rest] if rest else options

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong."""
        raise CommandError(f"{message} (see {self.prog} --help)", Exit.USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ARG002  (argparse)
        """Write the help or the version."""
        write_all(OUT, message.encode())


def make_parser() -> Parser:
    """Make the parser of the whole command line; `Namespace.run` is then what does it."""
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
    output.add_argument("--json", action="store_true", help="JSON for programs, also of an error")
    output.add_argument("--seq", action="store_true", help="JSON as records of RFC 7464")
    return parser


def _add_connected(commands: Any, name: str, run: Run, help: str, description: str = "") -> Parser:
    """Add a command that needs a connection."""
    parser = _add(commands, name, run, help, description)
    parser.add_argument("address", metavar="ADDRESS", help=ADDRESS)
    access = parser.add_argument_group("connection")
    access.add_argument(
        "--user", metavar="NAME", type=decode_name, help="who to be; BOKBOK_USER if not given"
    )
    key_file = access.add_argument(
        "--key-file", metavar="FILE", help="where the user's key is; BOKBOK_KEY_FILE if not given"
    )
    complete_files(key_file)
    access.add_argument("--plain", action="store_true", help="use no key, whatever the environment says")
    access.add_argument(
        "--service", metavar="NAME", type=decode_name, default="", help="what is meant to be reached"
    )
    access.add_argument("--insecure", action="store_true", help="allow plain TCP to another machine")
    access.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=parse_seconds,
        help=f"for all of it, 0 for no limit; {DEFAULT_TIMEOUT:g} if not given, and none for streams",
    )
    access.add_argument(
        "--graceful",
        metavar="CODE",
        action="append",
        type=parse_graceful,
        help="end with 0 on this error: the code of one that is answered, or an exit code",
    )
    access.add_argument("-v", "--verbose", action="store_true", help="show the log, and tracebacks")
    return parser


def complete_files(action: argparse.Action) -> None:
    """Have the shell complete the names of files here."""
    action.complete = {  # type: ignore[attr-defined]
        "bash": "_shtab_compgen_files",
        "zsh": "_files",
        "tcsh": "f",
        "fish": "(__fish_complete_path (commandline -ct))",
    }


def parse_seconds(text: str) -> float:
    """A time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def parse_count(text: str) -> int:
    """How often."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def parse_graceful(text: str) -> str | Exit:
    """Which error is none."""
    number = int(text) if text.isascii() and text.isdigit() else None
    if number not in set(Exit):
        return text  # servers may have codes of digits
    if number not in FORGIVABLE:
        raise argparse.ArgumentTypeError(f"exit code {text} cannot be made 0: use 3 to 8 or 124")
    return Exit(number)


# ---- the commands ----


def _add_raw(parser: Parser, help: str) -> None:
    parser.add_argument("--raw", action="store_true", help=help)


def _add_request(commands: Any) -> None:
    parser = _add_connected(commands, "request", _requests.request, "make a request of fields of bytes")
    parser.add_argument("field", metavar="FIELD", nargs="+", help=FIELD)
    parser.add_argument(
        "--channel", action="store_true", help="with a channel, and write its items, a line each"
    )
    _add_raw(parser, "write fields as they are, with nothing added")


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
        parser.add_argument("method", metavar="METHOD", help="as in Files.stat")
        parser.add_argument("argument", metavar="ARGUMENT", nargs="*", default=[], help=ARGUMENT)
        _add_raw(parser, "write texts and bytes as they are, and not as JSON")


def _add_listing(commands: Any) -> None:
    parser = _add_connected(commands, "list", _typed("_listing", "list_all"), "list what can be called")
    parser.add_argument("--markdown", action="store_true", help="as a text in Markdown")
    parser = _add_connected(
        commands,
        "describe",
        _typed("_listing", "describe"),
        "describe a method",
        "Describe a method, and write a call of it to be filled in.",
    )
    parser.add_argument("method", metavar="METHOD", help="as in Files.stat")


def _typed(module: str, name: str) -> Run:
    """A command that needs the extra ``interface``, which is not loaded for others."""

    def run(options: argparse.Namespace, out: Output) -> None:
        try:
            found = importlib.import_module(f".{module}", __package__)
        except ImportError as exc:
            raise CommandError(str(exc)) from exc
        getattr(found, name)(options, out)

    return run


def _add_ping(commands: Any) -> None:
    parser = _add_connected(commands, "ping", _requests.ping, "measure the way there and back")
    parser.add_argument(
        "-c",
        "--count",
        metavar="N",
        type=parse_count,
        default=math.inf,
        help="how often; for ever if not given",
    )
    parser.add_argument(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=parse_seconds,
        default=1.0,
        help="between two; 1 if not given",
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
    check = _add(keys, "check", _keys.check, "check that something is a key, and write its fingerprint")
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
        "Derive a key from a passphrase, which is asked for, or read from the standard input. "
        "A generated key is better.",
    )
    derive.add_argument(
        "user", metavar="USER", type=decode_name, help="whose key it is; it depends on the name"
    )
    _add_file(derive, "the new file, or - for the standard output")


def _add_users(commands: Any) -> None:
    users = _add_group(commands, "users", "change and list the users of a server")
    add = _add(users, "add", _keys.add_user, "add a key of a user; makes the file if it is not there")
    _add_file(add, "the server's file of users")
    add.add_argument("user", metavar="USER", type=decode_name, help="the user's name")
    _add_file(add, "the key file; or -, to type the key or to read it from the standard input", "key")
    remove = _add(users, "remove", _keys.remove_user, "take a user out, or one of the user's keys")
    _add_file(remove, "the server's file of users")
    remove.add_argument("user", metavar="USER", type=decode_name, help="the user's name")
    remove.add_argument(
        "fingerprint", metavar="FINGERPRINT", nargs="?", help="of the key to take out; all if not given"
    )
    list = _add(users, "list", _keys.list_users, "list users, with the fingerprints of their keys")
    _add_file(list, "the server's file of users")


def _add_serve(commands: Any) -> None:
    parser = _add(
        commands,
        "serve",
        _serving.serve,
        "serve an object of a module, for development",
        "Serve a handler, or what expose() returns, and begin anew when the code changes.",
    )
    parser.set_defaults(shows_log=True)
    parser.add_argument("object", metavar="MODULE:OBJECT", help="as in app:handler")
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        default=DEFAULT_ADDRESS,
        help=f"{ADDRESS}; {DEFAULT_ADDRESS} if not given",
    )
    users = parser.add_argument(
        "--users", metavar="FILE", help="the users to let in, and their keys; plain if not given"
    )
    complete_files(users)
    parser.add_argument(
        "--service",
        metavar="NAME",
        type=decode_name,
        default="",
        help="what this is, for clients that say it too",
    )
    parser.add_argument("--insecure", action="store_true", help="allow plain TCP with other machines")
    parser.add_argument("--no-reload", action="store_true", help="leave the code as it is")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show tracebacks of errors of the command"
    )


def _add_completion(commands: Any) -> None:
    parser = _add(
        commands,
        "completion",
        _complete,
        "write what a shell needs to complete this command",
        "Write what a shell needs to complete this command, as for bash: "
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
