"""What an interface says, once it has been looked at: plain data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

NO_STREAM: Final = object()
"""The type of the items of what is no stream. None would be a type of items."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        type: of its value; unused where it is a stream or a reference.
        items: of the items, where it is a stream.
        reference: the interface of what is lent, where it is a reference.
        may_be_none: a reference may be None.
        has_default: it may be left out.
    """

    name: str
    type: Any = None
    items: Any = NO_STREAM
    reference: Interface | None = None
    may_be_none: bool = False
    has_default: bool = False


@dataclass(frozen=True)
class Method:
    """A method of an interface, or the one of a callback.

    Attributes:
        name: the attribute; ``__call__`` of a callback.
        path: for people, as in ``Files.stat``.
        signature: without ``self``.
        is_positional: the arguments travel by position, as those of a ``Callable`` have no names.
        result: its type; None of a method with a stream of results.
        items: of the items of its stream of results, or `NO_STREAM`.
        errors: the exceptions that it declares, by the names that travel.
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
        """The parameter that is a stream."""
        return next((each for each in self.parameters if each.items is not NO_STREAM), None)

    @property
    def needs_channel(self) -> bool:
        """Whether anything streams."""
        return self.items is not NO_STREAM or self.stream is not None

    @property
    def references(self) -> tuple[Parameter, ...]:
        """The parameters that are lent."""
        return tuple(each for each in self.parameters if each.reference is not None)


@dataclass(frozen=True, eq=False)
class Interface:
    """An interface. Those of references may hold themselves, so their methods are added later.

    Attributes:
        source: the class.
        methods: by name.
    """

    name: str
    doc: str
    source: Any
    methods: dict[str, Method] = field(default_factory=dict[str, Method])
