"""The listing tells an authenticated peer which interfaces are served to it.

Annotations in this file are evaluated, and not strings: `__init__` gives the classes the module name of the
package, and there the codec would not find the names in the strings.
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
"""The only field of a request for the listing."""


@final
@dataclass(frozen=True)
class MethodInfo:
    """A method of a listed interface. All schemas are JSON Schemas.

    Attributes:
        name: the name of the method.
        doc: its docstring.
        signature: a text such as ``stat(path: str) -> Stat``.
        is_idempotent: whether the method is marked `idempotent`.
        arguments: the schema of an object with the arguments that are values. It leaves out streams,
            callbacks and objects.
        result: the schema of the result.
        items_in: the schema of the items of its stream of arguments, or None.
        items_out: the schema of the items of its stream of results, or None.
        errors: the schemas of the exceptions that the method declares, by name.
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
    """A listed interface.

    Attributes:
        name: the name on the wire, such as ``Files`` in ``Files.stat``.
        doc: its docstring.
        methods: its methods.
        definitions: the schemas that other schemas refer to as ``#/$defs/NAME``, by name.
    """

    name: str
    doc: str
    methods: list[MethodInfo]
    definitions: dict[str, Any]


async def list_interfaces(connection: Connection | ReconnectingConnection) -> list[InterfaceInfo]:
    """Ask the other side which interfaces it serves and lists; see `expose`.

    Raises:
        RemoteError: the other side lists no interface to this user; the code is ``"no-method"``. Or it serves
            none, and its handler refused the request.
        ProtocolError: the answer is not a listing.
        ConnectionLost, ConnectionClosed: as `Connection.request` does.
    """
    answer = await connection.request([LIST])
    try:
        [listing] = answer
        found: list[InterfaceInfo] = make_decoder(list[InterfaceInfo])(listing)
    except ValueError as exc:
        raise ProtocolError(f"the answer is not a listing: {exc}") from exc
    return found


def encode_listing(interfaces: tuple[InterfaceInfo, ...]) -> bytes:
    """Encode the answer to the request for the listing."""
    return make_encoder()(interfaces)


def describe(interface: Interface) -> InterfaceInfo:
    """Describe an interface.

    Raises:
        TypeError: two of its types have the same name.
    """
    # The type of the fields of each exception is made once: a second one would have the same name.
    errors: dict[type[Exception], Any] = {}
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
    """An annotation with the text that `inspect.Signature` shows."""

    def __init__(self, annotation: Any) -> None:
        self._text = annotation if isinstance(annotation, str) else show(annotation)

    def __repr__(self) -> str:
        return self._text


def _show_signature(method: Method) -> str:
    signature = method.signature
    parameters = [each.replace(annotation=_Text(each.annotation)) for each in signature.parameters.values()]
    shown = signature.replace(parameters=parameters, return_annotation=_Text(signature.return_annotation))
    return f"{method.name}{shown}"
