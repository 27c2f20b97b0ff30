"""`bokbok list` and `bokbok describe` show what the other side serves. They need the extra ``interface``."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any, Final, NamedTuple

from .. import RemoteError, UnixAddress
from ..interface import InterfaceInfo, MethodInfo, list_interfaces
from ._connecting import Session, run_connected
from ._exits import CommandError, Exit
from ._output import Output
from ._schemas import Schemas
from ._values import as_json, dump

NO_ANSWER: Final = "a command line cannot answer it"


class Listed(NamedTuple):
    """A method of the listing.

    Attributes:
        path: its name on the wire, such as ``Files.stat``.
        info: the entry of the listing.
        schemas: the schemas that its schemas refer to.
    """

    path: str
    info: MethodInfo
    schemas: Schemas

    @property
    def names(self) -> list[str]:
        """The names of its arguments that are values. Only the signature has their order."""
        signature = self.info.signature
        return sorted(
            self.schemas.properties(self.info.arguments),
            key=lambda name: (
                found.start() if (found := re.search(rf"\b{name}: ", signature)) else len(signature)
            ),
        )

    @property
    def stream(self) -> str:
        """The name of its argument that is a stream."""
        found = re.search(r"(\w+): (?:AsyncItera|ReceiveChannel)", self.info.signature)
        return found[1] if found else "a stream"

    @property
    def callbacks(self) -> dict[str, str]:
        """Its arguments that are callbacks and must be given, by name, with the types that they return."""
        try:
            tree = ast.parse(f"async def {self.info.signature}: ...")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return {}
        found: dict[str, str] = {}
        for each in ast.walk(tree):
            match each:
                case ast.arg(
                    arg=name,
                    annotation=ast.Subscript(
                        value=ast.Name(id="Callable"), slice=ast.Tuple(elts=[_, ast.Subscript(slice=result)])
                    ),
                ):
                    found[name] = ast.unparse(result)
                case _:
                    pass
        return found

    def template(self, name: str) -> Any:
        """Return an example value for an argument: its default, if the signature shows that as a literal."""
        found = re.search(rf"\b{name}: .*? = (.*?)(?:, \w+: |, \*, |\)(?: -> |$))", self.info.signature)
        if found and name not in self.schemas.required(self.info.arguments):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return as_json(ast.literal_eval(found[1]))
        return self.schemas.template(self.schemas.properties(self.info.arguments)[name])


async def ask_listing(session: Session) -> list[InterfaceInfo]:
    """Ask for the listing.

    Raises:
        CommandError: the other side lists nothing to this user.
    """
    try:
        return await list_interfaces(session.connection)
    except RemoteError as exc:
        text = f"{explain_unlisted(session)} [{exc.code}]"
        raise CommandError(text, Exit.HANDLER_SAID_NO, exc.code) from exc


def explain_unlisted(session: Session) -> str:
    """Say that nothing is listed to this user, and what to do about it."""
    if session.options.user is not None:
        return "the other side lists no interfaces"
    plain = (
        "" if isinstance(session.connection.address, UnixAddress) else ", and a plain TCP connection has none"
    )
    return f"the other side lists no interfaces, or only to users{plain}: give --user and --key-file"


def find_method(interfaces: Sequence[InterfaceInfo], path: str) -> Listed:
    """Find a method by its name on the wire.

    Raises:
        CommandError: there is no such method. The message suggests one of a similar name.
    """
    paths = {f"{each.name}.{method.name}": (each, method) for each in interfaces for method in each.methods}
    if path not in paths:
        similar = difflib.get_close_matches(path, paths, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise CommandError(f"no such method: {path}{hint} [no-method]", Exit.HANDLER_SAID_NO, "no-method")
    interface, method = paths[path]
    return Listed(path, method, Schemas(interface.definitions))


# ---- the commands ----


def list_all(options: Namespace, out: Output) -> None:
    """Write the interfaces that the other side serves."""
    interfaces = run_connected(options, ask_listing)
    if out.is_for_programs:
        out.value([dataclasses.asdict(each) for each in interfaces])
        return
    show = show_markdown if options.markdown else show_text
    for n, each in enumerate(interfaces):
        for line in ([""] if n else []) + list(show(each)):
            out.line(line.rstrip())


def describe(options: Namespace, out: Output) -> None:
    """Write the description of a method, and an example of a call."""
    method = find_method(run_connected(options, ask_listing), options.method)
    template = make_template(method)
    if out.is_for_programs:
        out.value({**dataclasses.asdict(method.info), "template": template})
        return
    for line in show_method(method, options.address, template):
        out.line(line)


def make_template(method: Listed) -> dict[str, Any]:
    """Return example arguments of a method: its defaults, if it has any."""
    template = {name: method.template(name) for name in method.names}
    return template if method.info.items_in is None else {**template, method.stream: []}


# ---- for people ----


def show_text(interface: InterfaceInfo) -> Iterator[str]:
    """Yield the lines that show an interface as text."""
    yield interface.name
    yield from indent(interface.doc, 4)
    for method in interface.methods:
        yield f"    {method.signature}"
        yield from indent(method.doc.partition("\n")[0], 8)


def show_markdown(interface: InterfaceInfo) -> Iterator[str]:
    """Yield the lines that show an interface as a chapter of Markdown."""
    yield f"# {interface.name}"
    if interface.doc:
        yield from ("", *interface.doc.splitlines())
    schemas = Schemas(interface.definitions)
    for method in interface.methods:
        yield from ("", f"## {interface.name}.{method.name}", "", "```python", method.signature, "```")
        if method.doc:
            yield from ("", *method.doc.splitlines())
        if method.is_idempotent:
            yield from ("", "It may run twice.")
        for name, schema in method.errors.items():
            yield from ("", f"Raises `{name}` with {show_members(schemas, schema)}.")


def show_method(method: Listed, address: str, template: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show a method, with an example of a call."""
    info, schemas = method.info, method.schemas
    yield info.signature
    yield from indent(info.doc, 4)
    if info.is_idempotent:
        yield "    It may run twice."
    properties, required = schemas.properties(info.arguments), schemas.required(info.arguments)
    for name in method.names:
        may_be_left_out = "" if name in required else ", may be left out"
        yield f"    {name}: {schemas.name(properties[name])}{may_be_left_out}"
    for name, result in method.callbacks.items():
        what = "its calls are written as JSON, a line each" if result == "None" else NO_ANSWER
        yield f"    {name}: a callback that returns {result}: {what}"
    for what, schema in (("takes", info.items_in), ("gives", info.items_out)):
        if schema is not None:
            yield f"    It {what} a stream of items: {schemas.name(schema)}"
    for error, schema in info.errors.items():
        yield f"    It raises {error} with {show_members(schemas, schema)}"
    words = [
        word if name in required else f"[{word}]"
        for name in method.names
        for word in [schemas.placeholder(name, properties[name])]
    ]
    if info.items_in is not None:
        words.append(f"{quote(method.stream)}=@FILE")
    yield ""
    command = f"bokbok call {quote(address)} {quote(method.path)}"
    yield " ".join([command, *words])
    if template:
        yield f"{command} {quote(dump(template))}"


def show_members(schemas: Schemas, schema: Any) -> str:
    """Describe the fields of an error."""
    members = schemas.properties(schema)
    return ", ".join(f"{name} ({schemas.name(each)})" for name, each in members.items()) or "nothing"


def indent(text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text, indented."""
    for line in text.splitlines():
        yield f"{' ' * width}{line}".rstrip()
