"""Triton's interpreter without the work that it does again and again: the same numbers in a third of the time.

Most of its time goes into looking through `triton.language` at every call of a device function, into checks for
overflow whose result it throws away, and into types and names of shapes that it has made before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

VERSIONS = ("3.6.",)
"""What the shortcuts are made for; any other Triton is left as it is."""

_changes: list[tuple[Any, str, Any, Any]] = []
"""Owner, name, what it was (NOTHING for none) and what it is now."""
NOTHING = object()


def hasten() -> None:
    """Take the shortcuts, in this process, from now on."""
    if _changes or not triton.__version__.startswith(VERSIONS):
        return
    _patch_once_a_launch()
    _check_nothing_unseen()
    _share_shapes()
    _remember_dtypes()


@contextmanager
def unhastened() -> Iterator[None]:
    """Triton as it is."""
    for owner, name, was, _ in reversed(_changes):
        delattr(owner, name) if was is NOTHING else setattr(owner, name, was)
    try:
        yield
    finally:
        for owner, name, _, now in _changes:
            setattr(owner, name, now)


def _set(owner: Any, name: str, now: Any) -> Any:
    was = owner.__dict__.get(name, NOTHING)
    _changes.append((owner, name, was, now))
    setattr(owner, name, now)
    return was


def _patch_once_a_launch() -> None:
    """A device function finds the language as its launch, or another device function, has patched it."""
    patched: set[int] = set()
    modules: dict[Any, frozenset[int]] = {}

    def patch_lang(fn):
        if fn not in modules:
            modules[fn] = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is core)
        if patched and modules[fn] <= patched:
            return None
        scope, launch = original(fn), not patched
        patched.update(modules[fn])
        if launch:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    original = _set(interpreter, "_patch_lang", patch_lang)


def _check_nothing_unseen() -> None:
    """Without `debug` nothing looks at what the checks for overflow find."""

    def check(semantic, *args):
        if semantic.builder.options.debug:
            original(semantic, *args)

    original = _set(TritonSemantic, "binary_op_sanitize_overflow_impl", check)


def _share_shapes() -> None:
    """All blocks of a shape share its tuples; what type a tuple has is found out when somebody asks."""

    def get_type(self):
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def init_tuple(self, args, type=None):
        self.values = list(args)
        self._type = type if type is None or isinstance(type, core.tuple_type) else core.tuple_type(type)

    _set(core.tuple, "type", property(get_type, lambda self, value: setattr(self, "_type", value)))
    _set(core.tuple, "__init__", init_tuple)

    @cache
    def shared(sizes):
        """A block's shape, its numel, and both as a tensor has them."""
        numel = core.validate_block_shape(sizes) if sizes else 1
        return (
            core.tuple(sizes),
            numel,
            core.tuple([core.constexpr(n) for n in sizes]),
            core.constexpr(math.prod(sizes)),
        )

    @cache
    def name_of(sizes, element):
        return f"<{core.tuple(sizes)}, {element}>"

    def init_block(self, element_ty, shape):
        sizes = tuple([x.value if type(x) is core.constexpr else x for x in shape])
        if not sizes or not all(type(size) is int for size in sizes):
            return block_init(self, element_ty, shape)
        self.element_ty, (self.shape, self.numel, *_) = element_ty, shared(sizes)
        self.name = name_of(sizes, str(element_ty))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, _, self.shape, self.numel = shared(tuple(type.shape.values) if type.is_block() else ())

    def broadcast(semantic, lhs, rhs):
        x, y = lhs.type, rhs.type
        if x.is_block() != y.is_block() or (x.is_block() and x.shape is not y.shape):
            return broadcast_value(semantic, lhs, rhs)
        return lhs, rhs

    block_init = _set(core.block_type, "__init__", init_block)
    _set(core.tensor, "__init__", init_tensor)
    broadcast_value = _set(TritonSemantic, "broadcast_impl_value", broadcast)


def _remember_dtypes() -> None:
    known: dict[str, Any] = {}

    def np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    original = _set(interpreter, "_get_np_dtype", np_dtype)
