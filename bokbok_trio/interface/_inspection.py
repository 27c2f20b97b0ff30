"""Inspects an interface once, and reports all its problems in one error."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, Required, cast, get_type_hints

from ._annotations import (
    ROOTS,
    SENDING,
    STREAM_LIKE,
    STREAMS,
    Wrong,
    bind_types,
    fill_in,
    find_class,
    find_open,
    find_origin,
    find_parameters,
    is_callback,
    is_protocol,
    item_type,
    result_items,
    show,
    split_callback,
    split_none,
    stream_form,
    strip,
)
from ._codec import find_unsupported
from ._marks import IDEMPOTENT, RAISES
from ._spec import NO_STREAM, Interface, Method, Parameter

MAX_ERROR_NAME: Final = 63
"""Bytes of the name of a declared exception. An error code has 64, and one of them is a prefix."""

CALL: Final = "__call__"

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_OVERLOADED = "_overload_dummy"  # the name of the function that `typing.overload` returns


def inspect_interface(form: Any, name: str | None = None, *, has_hooks: bool = False) -> Interface:
    """Inspect an interface.

    Arguments:
        form: the class, which may be given types.
        name: the name on the wire; None for the name of the class.
        has_hooks: whether hooks convert types that the codec does not know.

    Raises:
        TypeError: the interface cannot be served or called. The text lists all problems, and says what to
            write instead.
    """
    if name is not None and not (isinstance(name, str) and name.isprintable() and name[:1] not in {"", "%"}):
        raise TypeError(
            f"a name of an interface is a printable str that does not begin with '%', and not {name!r}"
        )
    inspection = _Inspection(has_hooks=has_hooks)
    interface = inspection.look_at(form, name)
    if CALL in interface.methods:
        inspection.note(
            f"{interface.name}.{CALL}: only callbacks are called by no name; give the method a name"
        )
    if inspection.offences:
        raise offend(f"{show(form)} cannot be an interface", inspection.offences)
    return interface


def offend(what: str, offences: list[str]) -> TypeError:
    """Make one error of all problems."""
    return TypeError("".join([what, *(f"\n  {each}" for each in offences)]))


class _Inspection:
    """The inspection of one interface and of those that its methods refer to, which may include itself."""

    def __init__(self, *, has_hooks: bool) -> None:
        self.offences: list[str] = []
        self._has_hooks = has_hooks
        self._known: dict[Any, Interface] = {}

    def note(self, offence: str) -> None:
        if offence not in self.offences:
            self.offences.append(offence)

    def look_at(self, form: Any, name: str | None = None) -> Interface:
        if form in self._known:
            return self._known[form]
        cls = find_class(form)
        interface = Interface(name or cls.__name__, inspect.cleandoc(cls.__doc__ or ""), form)
        self._known[form] = interface
        bound = bind_types(form)
        if open := [each for each in find_parameters(cls) if each not in bound[cls]]:
            names = ", ".join(each.__name__ for each in open)
            types = ", ".join(["int"] * len(find_parameters(cls)))
            self.note(f"{interface.name}: {names} has no type; write {cls.__name__}[{types}], say")
            return interface
        told = len(self.offences)
        for owner in cls.__mro__:
            if owner not in ROOTS:
                self._look_at_members(owner, bound.get(owner, {}), interface)
        if not interface.methods and len(self.offences) == told:
            self.note(f"{interface.name}: it has no methods; write 'async def' methods without '_'")
        return interface

    def _look_at_members(self, owner: type, bound: dict[Any, Any], interface: Interface) -> None:
        attributes = dict.fromkeys(inspect.get_annotations(owner))
        for name, member in (attributes | vars(owner)).items():
            if name in interface.methods or (name.startswith("_") and name != CALL):
                continue
            path = f"{interface.name}.{name}"
            if isinstance(member, FunctionType):
                try:
                    interface.methods[name] = self._look_at_method(member, path, bound)
                except Wrong as exc:
                    self.note(f"{path}: {exc}")
            else:
                self.note(f"{path}: it is not a method; write an 'async def' method that returns it")

    def _look_at_method(self, function: FunctionType, path: str, bound: dict[Any, Any]) -> Method:
        if function.__name__ == _OVERLOADED:
            raise Wrong("it is overloaded; write a method for each signature")
        if inspect.isasyncgenfunction(function):
            raise Wrong(f"it is an async generator; write {stream_form()}")
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as exc:  # noqa: BLE001  (annotations may be anything)
            raise Wrong(
                f"its annotations cannot be evaluated: {exc}; import what they need at run time, and not "
                "under TYPE_CHECKING, and define it at the top of a module"
            ) from None
        signature = inspect.signature(function)
        given = list(signature.parameters.values())
        if not given or given[0].name in hints or given[0].kind in _VARIADIC:
            raise Wrong("it has no self; write an ordinary method")
        hints = {name: fill_in(hint, bound) for name, hint in hints.items()}
        parameters = [self._look_at_parameter(each, path, hints) for each in given[1:]]
        streams = [each.name for each in parameters if each.items is not NO_STREAM]
        if len(streams) > 1:
            self.note(f"{path}: {' and '.join(streams)} are both streams; a method takes one")
        result, items = self._look_at_result(function, path, hints)
        method = Method(
            name=path.rpartition(".")[2],
            path=path,
            doc=inspect.getdoc(function) or "",
            signature=signature.replace(parameters=given[1:]),
            parameters=tuple(parameters),
            is_positional=False,
            result=result,
            items=items,
            errors=self._look_at_errors(getattr(function, RAISES, ()), path),
            is_idempotent=getattr(function, IDEMPOTENT, False),
        )
        if method.is_idempotent and method.needs_channel:
            self.note(f"{path}: a stream cannot be repeated; take @idempotent away")
        return method

    def _look_at_parameter(self, given: inspect.Parameter, path: str, hints: dict[str, Any]) -> Parameter:
        name, kind = given.name, given.kind
        parameter = Parameter(name, has_default=given.default is not given.empty)
        if kind in _VARIADIC:
            self.note(f"{path}: {given} has no fixed arguments; write each, or one list or dict of them")
        elif kind is given.POSITIONAL_ONLY:
            self.note(f"{path}: {name} is positional-only, and arguments travel by name; take the '/' away")
        elif name not in hints:
            self.note(f"{path}: parameter {name} has no annotation; write {name}: int, say")
        else:
            try:
                return self._classify(parameter, hints[name], f"{path}: parameter {name}")
            except Wrong as exc:
                self.note(f"{path}: parameter {name} {exc}")
        return parameter

    def _classify(self, parameter: Parameter, hint: Any, where: str) -> Parameter:
        """Classify a parameter as a stream, a reference or a value."""
        inner, may_be_none = split_none(strip(hint))
        inner = strip(inner)
        origin = find_origin(inner)
        if origin in STREAM_LIKE:
            if origin not in STREAMS:
                raise Wrong(f"is {show(inner)}; write AsyncIterable[...] for a stream")
            if may_be_none or parameter.has_default:
                raise Wrong("is a stream that may be missing; write a method for each case")
            items = item_type(inner)
            self._check_type(items, f"{where} has items")
            return dataclasses.replace(parameter, items=items)
        if origin in SENDING:
            raise Wrong(f"is {show(inner)}; write a callback to be given each item, or a stream of results")
        reference: Interface | None = None
        if is_callback(inner):
            reference = self._look_at_callback(inner, where)
        elif is_protocol(inner):
            reference = self.look_at(inner)
        if reference is not None:
            return dataclasses.replace(parameter, reference=reference, may_be_none=may_be_none)
        self._check_type(hint, where)
        return dataclasses.replace(parameter, type=hint)

    def _look_at_callback(self, hint: Any, where: str) -> Interface:
        given, result = split_callback(hint)
        path = where.rpartition(" ")[2]
        parameters = [
            self._classify(Parameter(f"argument {index}"), each, f"{where}: argument {index}")
            for index, each in enumerate(given)
        ]
        if any(each.items is not NO_STREAM for each in parameters):
            raise Wrong("is a callback with a stream; write a Protocol with a method")
        self._check_type(result, f"{where} returns")
        interface = Interface(path, "", hint)
        interface.methods[CALL] = Method(
            name=CALL,
            path=path,
            doc="",
            signature=inspect.Signature(
                [
                    inspect.Parameter(f"argument_{index}", inspect.Parameter.POSITIONAL_ONLY)
                    for index in range(len(given))
                ]
            ),
            parameters=tuple(parameters),
            is_positional=True,
            result=result,
            items=NO_STREAM,
            errors={},
            is_idempotent=False,
        )
        return interface

    def _look_at_result(
        self, function: Callable[..., Any], path: str, hints: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Return the type of the result of a method, and the type of the items of its stream of results."""
        is_async = inspect.iscoroutinefunction(function)
        if "return" not in hints:
            raise Wrong("its result has no annotation; write -> None, if there is none")
        hint = hints["return"]
        inner = strip(hint)
        if find_origin(inner) in STREAM_LIKE:
            if is_async:
                raise Wrong(f"it streams, and is async; write {stream_form()}")
            items = result_items(inner)
            self._check_type(items, f"{path}: its stream has items")
            return None, items
        if not is_async:
            raise Wrong("it is not async; write 'async def'")
        if is_callback(inner) or is_protocol(inner):
            raise Wrong(
                f"it returns {show(inner)}, and a lent object lives only as long as a call; write "
                "methods of this interface, with a name or number that says which object they are about"
            )
        self._check_type(hint, f"{path}: it returns")
        return hint, NO_STREAM

    def _check_type(self, hint: Any, where: str) -> None:
        if open := find_open(hint):
            names = ", ".join(each.__name__ for each in open)
            self.note(f"{where}: {names} has no type; write one")
            return
        try:
            Required[hint]  # this refuses ClassVar and the like
            found = find_unsupported(hint)
        except Exception as exc:  # noqa: BLE001  (whatever the codec says)
            self.note(f"{where}: {exc}")
            return
        for each in found:
            if each in {*STREAM_LIKE, Callable} or is_protocol(each):
                name = each.__name__
                self.note(f"{where}: {name} inside of another type; make it a parameter of its own")
            elif each is object:
                self.note(f"{where}: object is not a type of values; write Any")
            elif not self._has_hooks:
                self.note(
                    f"{where}: {each.__qualname__} does not travel; write a dataclass, or give encode_hook "
                    "and decode_hook"
                )

    def _look_at_errors(self, errors: tuple[type[Exception], ...], path: str) -> dict[str, type[Exception]]:
        found: dict[str, type[Exception]] = {}
        for error in errors:
            name = error.__name__
            if not dataclasses.is_dataclass(error):
                self.note(f"{path}: {name} is not a dataclass; write @dataclass above it")
                continue
            if cast("Any", error).__dataclass_params__.frozen:
                self.note(f"{path}: {name} is frozen, and Python must set its traceback; take frozen away")
            if name in found:
                self.note(f"{path}: it raises two classes named {name}; rename one")
            if len(name.encode()) > MAX_ERROR_NAME:
                self.note(f"{path}: the name {name} is too long; the limit is {MAX_ERROR_NAME} bytes")
            found[name] = error
            self._check_error_fields(error, f"{path}: {name}")
        return found

    def _check_error_fields(self, error: type[Exception], where: str) -> None:
        try:
            hints = get_type_hints(error, include_extras=True)
        except Exception as exc:  # noqa: BLE001  (annotations may be anything)
            self.note(f"{where}: its annotations cannot be evaluated: {exc}")
            return
        fields = [each.name for each in dataclasses.fields(cast("Any", error)) if each.init]
        for name in fields:
            self._check_type(hints[name], f"{where}.{name}")
        for each in inspect.signature(error).parameters.values():
            if each.name not in fields and each.kind not in _VARIADIC and each.default is each.empty:
                self.note(f"{where}: it takes {each.name}, which is not one of its fields; give it a default")
