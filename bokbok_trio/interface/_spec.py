"""The description of an inspected interface: plain data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

NO_STREAM: Final = object()
"""Stands for the type of the items where there is no stream. None would be a type."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        type: the type of its value; unused for a stream or a reference.
        items: the type of the items of a stream; else `NO_STREAM`.
        reference: the interface of a callback or an object that is lent; else None.
        may_be_none: whether a reference may be None.
        has_default: whether callers may leave the parameter out.
    """

    name: str
    type: Any = None
    items: Any = NO_STREAM
    reference: Interface | None = None
    may_be_none: bool = False
    has_default: bool = False


@dataclass(frozen=True)
class Method:
    """A method of an interface, or the only method of a callback.

    Attributes:
        name: the name of the attribute; ``__call__`` for a callback.
        path: the name for people, such as ``Files.stat``.
        signature: the signature without ``self``.
        is_positional: whether arguments are sent by position, because those of a ``Callable`` have no names.
        result: the type of the result; None for a method with a stream of results.
        items: the type of the items of its stream of results, or `NO_STREAM`.
        errors: the exceptions that it declares, by their names on the wire.
    """

    name: str
    path: str
    doc: str
    signature: inspect.Signature
    parameters: tuple[Parameter, ...]
    is_positional: bool
    result: Any
    items: Any
    errors: Mapping[str, type[Exception]]
    is_idempotent: bool

    @property
    def stream(self) -> Parameter | None:
        """The parameter that is a stream, or None."""
        return next((each for each in self.parameters if each.items is not NO_STREAM), None)

    @property
    def needs_channel(self) -> bool:
        """Whether the method has a stream."""
        return self.items is not NO_STREAM or self.stream is not None

    @property
    def references(self) -> tuple[Parameter, ...]:
        """The parameters whose arguments are lent."""
        return tuple(each for each in self.parameters if each.reference is not None)


@dataclass(frozen=True, eq=False)
class Interface:
    """An interface. It may refer to itself, so its methods are added after it is made.

    Attributes:
        source: the class.
        methods: the methods by name.
    """

    name: str
    doc: str
    source: Any
    methods: dict[str, Method] = field(default_factory=dict[str, Method])
