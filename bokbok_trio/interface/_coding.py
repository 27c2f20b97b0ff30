"""The codecs of an interface, made once for each side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import takewhile
from types import NoneType
from typing import Any, Final, NotRequired, Required, TypedDict, cast, get_type_hints
from weakref import WeakSet

import trio

from bokbok_trio import ProtocolError, RemoteError, RequestError

from ._codec import DecodeHook, EncodeHook, make_decoder, make_encoder
from ._inspection import CALL
from ._spec import NO_STREAM, Interface, Method, Parameter

RAISED: Final = "%"
"""The prefix of the error code for a declared exception; its name follows."""

MAX_DETAILS: Final = 2**14
"""Bytes of the fields of an exception: the limit of the details of a `RequestError`."""

BAD_ARGUMENTS: Final = "bad-arguments"

_PLAIN: Final = frozenset({NoneType, bool, int, float, str, bytes})
"""Types that need no check beyond the class of a value."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The functions with which an application converts types that the codec does not know."""

    encode: EncodeHook | None = None
    decode: DecodeHook | None = None


class Coders:
    """Makes codecs once for each interface, because interfaces may refer to themselves."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._made: dict[Interface, InterfaceCoder] = {}

    def make(self, interface: Interface) -> InterfaceCoder:
        """Make the codecs of an interface."""
        if interface not in self._made:
            coder = self._made[interface] = InterfaceCoder(interface)
            for name, method in interface.methods.items():
                coder.methods["" if name == CALL else name] = MethodCoder(method, self._hooks, self)
        return self._made[interface]


class InterfaceCoder:
    """The codecs of an interface.

    Attributes:
        interface: the interface.
        methods: the codecs of its methods, by the name that a call back has on the wire. The name is empty if
            a callback itself is called.
        stand_in_class: the class of stand-ins for objects that the peer lends; made when it is first needed.
        fitting: classes whose objects are known to have the interface. Functions are not remembered here.
    """

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.methods: dict[str, MethodCoder] = {}
        self.stand_in_class: type[object] | None = None
        self.fitting: WeakSet[type[object]] = WeakSet()

    @property
    def lends(self) -> bool:
        """Whether anything is lent to a method."""
        return any(each.references for each in self.methods.values())


class MethodCoder:
    """Encodes and decodes the arguments, results, items and errors of one method.

    Attributes:
        method: the method.
        decode_arguments: returns a dict by name, or a list if arguments are sent by position. Raises
            `BadValue`.
        result: the codec of the result.
        items_in, items_out: the codecs of the items of its streams, or None.
        stream: the name of the parameter that is a stream, or None.
        references: the interfaces of the parameters that are lent, by name or by position.
        optional: the names or positions among these whose argument may be None.
    """

    def __init__(self, method: Method, hooks: Hooks, coders: Coders) -> None:
        path = method.path
        self.method = method
        self.decode_arguments = _make_arguments_decoder(method, hooks)
        self.result = ValueCoder(f"{path} returned", method.result, hooks)
        stream = method.stream
        self.stream = None if stream is None else stream.name
        self.items_in = None if stream is None else ValueCoder(f"{path} was sent", stream.items, hooks)
        self.items_out = (
            None if method.items is NO_STREAM else ValueCoder(f"{path} sent", method.items, hooks)
        )
        parameters: list[tuple[Any, Parameter]] = [
            (index if method.is_positional else each.name, each)
            for index, each in enumerate(method.parameters)
        ]
        self.references: dict[Any, InterfaceCoder] = {
            key: coders.make(each.reference) for key, each in parameters if each.reference is not None
        }
        self.optional = frozenset(key for key, each in parameters if each.may_be_none)
        self._encode = make_encoder(hooks.encode)
        self._errors = {name: _ErrorCoder(error, hooks) for name, error in method.errors.items()}
        self._error_names = {error: name for name, error in method.errors.items()}

    def encode_arguments(self, arguments: dict[str, Any] | list[Any]) -> bytes:
        """Encode the arguments of a call. The side that has the method checks them.

        Raises:
            TypeError, ValueError: an argument cannot be sent; a note says which.
        """
        try:
            return self._encode(arguments)
        except Exception as exc:
            pairs = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
            for name, value in pairs:
                try:
                    self._encode(value)
                except Exception:  # noqa: BLE001  (whatever the hook raises)
                    exc.add_note(f"in the argument {name} of {self.method.path}")
            raise

    def as_request_error(self, error: BaseException) -> RequestError | None:
        """Return the error answer for an exception that the method declares; None for others.

        Raises:
            TypeError, ValueError: the fields of the exception cannot be sent.
        """
        for cls in type(error).__mro__:
            name = self._error_names.get(cls)
            if name is not None:
                details = self._errors[name].encode(error)
                if len(details) > MAX_DETAILS:
                    raise ValueError(
                        f"the fields of {name} take {len(details)} bytes; the limit is {MAX_DETAILS}"
                    )
                return RequestError(f"{name}: {error}", code=RAISED + name, details=details)
        return None

    def as_declared(self, error: RemoteError) -> Exception:
        """Return the declared exception for an error answer; if the method declares none, return the error.

        The error is the cause of the declared exception.
        """
        coder = self._errors.get(error.code.removeprefix(RAISED)) if error.code.startswith(RAISED) else None
        if coder is None:
            return error
        try:
            declared = coder.decode(error.details)
        except Exception:  # noqa: BLE001  (an exception class may refuse its fields by any error)
            return error
        declared.__cause__ = error
        return declared


class ValueCoder:
    """Encodes and decodes the values of one type, and checks them both ways.

    Arguments:
        what: the beginning of an error message, such as ``Files.stat returned``.
        type: the type of the values.
    """

    __slots__ = ("_decode", "_encode", "_plain", "_what")

    def __init__(self, what: str, type: Any, hooks: Hooks) -> None:
        self._what = what
        self._plain = type if type in _PLAIN else None
        self._encode = make_encoder(hooks.encode)
        self._decode = make_decoder(type, hooks.decode)

    def encode(self, value: Any) -> bytes:
        """Encode a value of this side.

        Raises:
            TypeError: the value is not of the type.
        """
        try:
            data = self._encode(value)
            # A wrong value must fail here and not at the peer, so decode the bytes as a check. Most results
            # have a plain type, which needs no check.
            if type(value) is not self._plain:
                self._decode(data)
        except Exception as exc:
            raise TypeError(f"{self._what} a value that its interface does not allow: {exc}") from exc
        return data

    def decode(self, fields: list[bytes]) -> Any:
        """Decode a value of the peer.

        Raises:
            ProtocolError: the value is not of the type.
        """
        try:
            [data] = fields
            return self._decode(data)
        except ValueError as exc:
            raise ProtocolError(f"{self._what} a value that our interface does not allow: {exc}") from exc

    def decode_argument(self, fields: list[bytes]) -> Any:
        """Decode an argument that the peer sent as an item.

        Raises:
            RequestError: the value is not of the type.
        """
        try:
            [data] = fields
            return self._decode(data)
        except ValueError as exc:
            raise RequestError(
                f"{self._what} a value that its interface does not allow: {exc}", BAD_ARGUMENTS
            ) from exc


class _ErrorCoder:
    """Encodes and decodes the fields of an exception class."""

    def __init__(self, error: type[Exception], hooks: Hooks) -> None:
        self._error = error
        self._fields = _error_fields(error)
        self._encode = make_encoder(hooks.encode)
        self._decode = make_decoder(error_type(error), hooks.decode)

    def encode(self, error: BaseException) -> bytes:
        try:
            data = self._encode({each.name: getattr(error, each.name) for each in self._fields})
            self._decode(data)
        except Exception as exc:
            raise TypeError(
                f"{self._error.__qualname__} has a value that its fields do not allow: {exc}"
            ) from exc
        return data

    def decode(self, details: bytes) -> Exception:
        values = self._decode(details)
        # Pass arguments by position as far as possible: Python makes the text of an exception from these.
        first = list(takewhile(lambda each: not each.kw_only and each.name in values, self._fields))
        return self._error(*[values.pop(each.name) for each in first], **values)


def arguments_type(method: Method, *, values_only: bool = False) -> Any:
    """Return the type of the encoded arguments: a map, or a tuple if they have no names.

    Arguments:
        values_only: leave out the references, which are sent as numbers.
    """
    given = [
        each
        for each in method.parameters
        if each.items is NO_STREAM and not (values_only and each.reference is not None)
    ]
    if method.is_positional:
        return tuple.__class_getitem__(tuple(map(_wire_type, given)))
    return _map_type(method.path, {each.name: (_wire_type(each), each.has_default) for each in given})


def error_type(error: type[Exception]) -> Any:
    """Return the type of the fields of an exception: a map."""
    hints = get_type_hints(error, include_extras=True)
    missing = dataclasses.MISSING
    made = _map_type(
        error.__name__,
        {
            each.name: (
                hints[each.name],
                each.default is not missing or each.default_factory is not missing,
            )
            for each in _error_fields(error)
        },
    )
    # These distinguish it in a listing from other exceptions of the same name.
    made.__module__, made.__qualname__ = error.__module__, error.__qualname__
    return made


def _error_fields(error: type[Exception]) -> list[dataclasses.Field[Any]]:
    return [each for each in dataclasses.fields(cast("Any", error)) if each.init]


def _wire_type(parameter: Parameter) -> Any:
    if parameter.reference is None:
        return parameter.type
    return int | None if parameter.may_be_none else int


def _map_type(name: str, types: dict[str, tuple[Any, bool]]) -> Any:
    """Return the type of a map, given for each key the type of its value and whether it may be missing."""
    fields = {key: NotRequired[type] if missing else Required[type] for key, (type, missing) in types.items()}
    return TypedDict(name, fields)  # type: ignore[operator]


def _make_arguments_decoder(method: Method, hooks: Hooks) -> Callable[[bytes], Any]:
    decode = make_decoder(arguments_type(method), hooks.decode, is_closed=not method.is_positional)
    return (lambda data: list(decode(data))) if method.is_positional else decode


def split_leaves(error: BaseException) -> tuple[list[BaseException], list[trio.Cancelled]]:
    """Return the errors in a group, at any depth, or the error itself; and the cancellations apart."""
    leaves = _leaves(error)
    cancelled = [each for each in leaves if isinstance(each, trio.Cancelled)]
    return [each for each in leaves if not isinstance(each, trio.Cancelled)], cancelled


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    members = cast("BaseExceptionGroup[BaseException]", error).exceptions
    return [leaf for each in members for leaf in _leaves(each)]
