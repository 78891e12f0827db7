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


def record(buffer: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> None:
    """Notes that `buffer` holds the weights that weight, bias and z generate now."""
    address = buffer.data_ptr()
    watched = weakref.ref(buffer, lambda _: _records.pop(address, None))
    refs = (watched, weakref.ref(weight), weakref.ref(bias), weakref.ref(z))
    _records[address] = _Record(refs, _state(weight, bias, z))


def is_current(buffer: Tensor | None, weight: Tensor, bias: Tensor | None, z: Tensor) -> bool:
    """Whether `buffer` still holds what weight, bias and z generate."""
    if buffer is None or bias is None:
        return False
    found = _records.get(buffer.data_ptr())
    if found is None or any(ref() is None for ref in found.alive):
        return False
    return found.state == _state(weight, bias, z)
