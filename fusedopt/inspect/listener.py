"""Listens to the loads and stores of interpreted kernels, and tells which loads something stored depends on.

Every operation of an interpreted kernel is a method of the interpreter's builder, or a reduction or scan; while a step
runs they are wrapped: a value carries the loads that it was computed from to where it is stored. A compiler drops the
other loads, so they are not counted. Loads that only decide where a kernel goes read tables, which are not counted
either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

MARK = "_loads"
"""Attribute of a value: indices of the loads that it was computed from."""

NONE: frozenset[int] = frozenset()


class Access(NamedTuple):
    """what: load or store. addresses: of the lanes that the mask leaves. size: bytes of each."""

    what: str
    addresses: np.ndarray
    size: int


class Listener:
    """accesses: all of them, in order. needed: indices of those that count."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.needed: set[int] = set()

    def counted(self) -> list[Access]:
        """Stores, and loads that one of them depends on."""
        return [self.accesses[i] for i in sorted(self.needed)]

    def note(self, what: str, pointers: Any, mask: Any) -> int:
        """Write an access down; returns its index."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        self.accesses.append(Access(what, pointers.data[lanes].astype(np.uint64).ravel(), size))
        return len(self.accesses) - 1


def _loads(values: Iterable[Any]) -> frozenset[int]:
    """What some arguments or results were computed from."""
    found = NONE
    for value in values:
        if isinstance(value, list | tuple):
            found |= _loads(value)
        else:
            found |= getattr(getattr(value, "handle", value), MARK, NONE)
    return found


def _mark(result: Any, loads: frozenset[int]) -> Any:
    for value in result if isinstance(result, list | tuple) else (result,):
        handle = getattr(value, "handle", value)
        if loads and hasattr(handle, "data"):
            setattr(handle, MARK, getattr(handle, MARK, NONE) | loads)
    return result


def _carrying(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, its results marked as computed from its arguments."""

    def carried(*args: Any, **keywords: Any) -> Any:
        return _mark(operation(*args, **keywords), _loads((*args[1:], *keywords.values())))

    return carried


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Note every load and store that interpreted kernels do meanwhile."""
    from triton.runtime import interpreter

    builder_class: Any = interpreter.InterpreterBuilder
    reduction_class: Any = interpreter.ReduceScanOpInterface
    load, store = builder_class.create_masked_load, builder_class.create_masked_store

    def noted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        index = listener.note("load", ptrs, mask)
        return _mark(load(builder, ptrs, mask, *rest), _loads((ptrs, mask, *rest)) | {index})

    def noted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        index = listener.note("store", ptrs, mask)
        listener.needed |= _loads((ptrs, value, mask)) | {index}
        return store(builder, ptrs, value, mask, *rest)

    wrapped = {name: _carrying(getattr(builder_class, name)) for name in dir(builder_class) if _is_operation(name)}
    changes = [(builder_class, name, value) for name, value in wrapped.items()]
    changes += [(builder_class, "create_masked_load", noted_load), (builder_class, "create_masked_store", noted_store)]
    changes += [(reduction_class, "apply", _carrying(reduction_class.apply))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _is_operation(name: str) -> bool:
    return name.startswith("create_") or name == "cast_impl"
