"""Listing: what a peer that was let in may know of the interfaces that are served to it.

Annotations are no strings here: the classes look as if they were of the package, and the codec would look for
names there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, final

from bokbok_trio import Connection, ProtocolError, ReconnectingConnection

from ._annotations import show
from ._codec import make_decoder, make_encoder, make_schemas
from ._coding import arguments_type, error_type
from ._spec import NO_STREAM, Interface, Method

LIST: Final = b"%list"
"""The only field of the request for the listing."""


@final
@dataclass(frozen=True)
class MethodInfo:
    """A method of an interface that is listed. Schemas are JSON Schemas.

    Attributes:
        name: of the method.
        doc: its docstring.
        signature: as text, as in ``stat(path: str) -> Stat``.
        is_idempotent: it may run twice.
        arguments: schema of an object with all that are values: no streams, and nothing that is lent.
        result: schema of the result.
        items_in, items_out: schemas of the items of its streams of arguments and of results; or None.
        errors: schemas of the fields of the exceptions that it declares, by their names.
    """

    name: str
    doc: str
    signature: str
    is_idempotent: bool
    arguments: dict[str, Any]
    result: dict[str, Any]
    items_in: dict[str, Any] | None
    items_out: dict[str, Any] | None
    errors: dict[str, dict[str, Any]]


@final
@dataclass(frozen=True)
class InterfaceInfo:
    """An interface that is listed.

    Attributes:
        name: on the wire, as in ``Files`` of ``Files.stat``.
        doc: its docstring.
        methods: what can be called.
        definitions: the schemas that others refer to as ``#/$defs/NAME``, by name.
    """

    name: str
    doc: str
    methods: list[MethodInfo]
    definitions: dict[str, Any]


async def list_interfaces(connection: Connection | ReconnectingConnection) -> list[InterfaceInfo]:
    """Ask the other side which interfaces it serves and lists; see `expose`.

    Raises:
        RemoteError: it lists none, or not to this user, with the code ``"no-method"``; or it serves no
            interfaces.
        ProtocolError: what it answered is no listing.
        ConnectionLost, ConnectionClosed: as by `Connection.request`.
    """
    answer = await connection.request([LIST])
    try:
        [listing] = answer
        found: list[InterfaceInfo] = make_decoder(list[InterfaceInfo])(listing)
    except ValueError as exc:
        raise ProtocolError(f"what was answered is no listing: {exc}") from exc
    return found


def encode_listing(interfaces: tuple[InterfaceInfo, ...]) -> bytes:
    """Encode the answer to the request for the listing."""
    return make_encoder()(interfaces)


def describe(interface: Interface) -> InterfaceInfo:
    """Describe an interface.

    Raises:
        TypeError: two of its types have the same name.
    """
    errors: dict[type[Exception], Any] = {}  # the types of their fields, of which there is one for each
    types = {
        (name, part): type
        for name, method in interface.methods.items()
        for part, type in _types_of(method, errors)
    }
    made, definitions = make_schemas(list(types.values()))
    schemas = dict(zip(types, made, strict=True))
    methods = [
        MethodInfo(
            name=name,
            doc=method.doc,
            signature=_show_signature(method),
            is_idempotent=method.is_idempotent,
            arguments=schemas[name, "arguments"],
            result=schemas[name, "result"],
            items_in=schemas.get((name, "items in")),
            items_out=schemas.get((name, "items out")),
            errors={error: schemas[name, f"error {error}"] for error in method.errors},
        )
        for name, method in interface.methods.items()
    ]
    return InterfaceInfo(interface.name, interface.doc, methods, definitions)


def _types_of(method: Method, errors: dict[type[Exception], Any]) -> Iterator[tuple[str, Any]]:
    yield "arguments", arguments_type(method, values_only=True)
    yield "result", method.result
    if method.stream is not None:
        yield "items in", method.stream.items
    if method.items is not NO_STREAM:
        yield "items out", method.items
    for name, error in method.errors.items():
        if error not in errors:
            errors[error] = error_type(error)
        yield f"error {name}", errors[error]


class _Text:
    """An annotation, as `inspect.Signature` is to show it."""

    def __init__(self, annotation: Any) -> None:
        self._text = annotation if isinstance(annotation, str) else show(annotation)

    def __repr__(self) -> str:
        return self._text


def _show_signature(method: Method) -> str:
    signature = method.signature
    parameters = [each.replace(annotation=_Text(each.annotation)) for each in signature.parameters.values()]
    shown = signature.replace(parameters=parameters, return_annotation=_Text(signature.return_annotation))
    return f"{method.name}{shown}"
