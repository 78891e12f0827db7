"""Knowing whether next weights still are what their generator would make.

`adamw_generate` leaves the weights of the next forward in a buffer. They hold as long as weight, bias and z
are the very tensors they were made from, unchanged. `record` notes address and version of each; `is_current`
compares. Addresses alone could be reused after a free, so the tensors are also watched by weak references.
Edits through `.data` do not change a version and go unseen: `hyperfast.invalidate` is for those.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor


class _Record(NamedTuple):
    alive: tuple[weakref.ref, ...]
    state: tuple[int, ...]


_records: dict[int, _Record] = {}  # by address of the buffer


def _state(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(number for t in tensors for number in (t.data_ptr(), 0 if t.is_inference() else t._version))


def record(buffer: Tensor, *made_from: Tensor) -> None:
    """Notes that `buffer` holds the weights that these tensors, weight, bias and z, generate now."""
    address = buffer.data_ptr()
    watched = weakref.ref(buffer, lambda _: _records.pop(address, None))
    _records[address] = _Record((watched, *map(weakref.ref, made_from)), _state(*made_from))


def is_current(buffer: Tensor | None, *made_from: Tensor | None) -> bool:
    """Whether `buffer` still holds what these tensors generate."""
    if buffer is None or any(t is None for t in made_from):
        return False
    found = _records.get(buffer.data_ptr())
    if found is None or any(ref() is None for ref in found.alive):
        return False
    return found.state == _state(*made_from)
