"""What the arguments of a case are changed to.

Layouts keep an argument valid: the same shape, dtype and device, differently laid out or marked. Faults
mostly make it invalid; the op may refuse it, or give the right answer for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz.harness import Draw, Unsized, has_bytes, tensors_in


class Subclass(Tensor):
    pass


def offset(draw: Draw, t: Tensor) -> Tensor:
    """Out of the middle of larger memory."""
    before, after = draw.randint(0, 9), draw.randint(0, 9)
    memory = torch.full((before + t.numel() + after,), float("nan"), dtype=t.dtype)
    inside = memory[before : before + t.numel()].view(t.shape)
    return inside.copy_(t)


def strided(draw: Draw, t: Tensor) -> Tensor:
    """Every second or third element, of rows that are longer than they look."""
    steps = [draw.randint(1, 3) for _ in t.shape]
    memory = torch.full(
        [n * step + draw.randint(0, 2) for n, step in zip(t.shape, steps, strict=True)], torch.nan
    )
    memory = memory.to(t.dtype)
    part = memory[tuple(slice(None, n * step, step) for n, step in zip(t.shape, steps, strict=True))]
    return part.copy_(t)


def expanded(draw: Draw, t: Tensor) -> Tensor:
    """One row, or one element, again and again with stride 0."""
    if t.dim() == 0 or 0 in t.shape:
        return t
    dim = draw.randrange(t.dim())
    return t.narrow(dim, 0, 1).expand(t.shape)


def odd_strides_of_one(draw: Draw, t: Tensor) -> Tensor:
    strides = [draw.choice((0, 1, 7, s)) if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides) if t.layout == torch.strided else t


def misaligned(draw: Draw, t: Tensor) -> Tensor:
    """At an address that is no multiple of the size of an element, as memory from elsewhere may be."""
    kinds = torch.float16, torch.float32, torch.float64
    if t.dtype not in kinds or not has_bytes(t) or not 0 < t.numel() < LARGE:
        return t
    values = t.detach().contiguous().resolve_neg().numpy()
    memory = np.zeros(values.nbytes + 64, dtype=np.uint8)
    shift = draw.randint(1, t.itemsize - 1)
    inside = memory[shift : shift + values.nbytes].view(values.dtype).reshape(values.shape)
    inside[...] = values
    return torch.from_numpy(inside)


def inference(draw: Draw, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone()


def special_values(draw: Draw, t: Tensor) -> Tensor:
    t = t.detach().clone(memory_format=torch.contiguous_format)
    for _ in range(min(t.numel(), draw.randint(1, 3))):
        at = draw.randrange(t.numel())
        t.view(-1)[at] = draw.choice((torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 1e30, -1e30))
    return t


LARGE = 1e8  # elements no memory is there for: expanded ones
Change = Callable[[Draw, Tensor], Any]
LAYOUTS: dict[str, Change] = {
    "offset": offset,
    "strided": strided,
    "transposed": lambda draw, t: t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else t,
    "channels last": lambda draw, t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "expanded": expanded,
    "flipped": lambda draw, t: t.flip(tuple(range(t.dim()))),
    "lazily negated": lambda draw, t: torch._neg_view(t.neg()),
    "imaginary part of a conjugate": lambda draw, t: (
        torch.complex(t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t
    ),
    "requires_grad": lambda draw, t: t.detach().requires_grad_(),
    "no leaf": lambda draw, t: t.detach().requires_grad_() * 1,
    "Parameter": lambda draw, t: nn.Parameter(t.detach()),
    "subclass": lambda draw, t: t.detach().as_subclass(Subclass),
    "odd strides of size 1": odd_strides_of_one,
    "values": special_values,
}
# valid for torch, refused by some
FOREIGN: dict[str, Change] = {"misaligned": misaligned, "inference tensor": inference}

FAULTS: dict[str, Change] = {
    "one more dimension": lambda draw, t: t.unsqueeze(draw.randint(0, t.dim())),
    "flat": lambda draw, t: t.reshape(-1),
    "scalar": lambda draw, t: torch.tensor(1.5, dtype=t.dtype),
    "one less": lambda draw, t: t.narrow(0, 0, t.shape[0] - 1) if t.dim() and t.shape[0] else t.new_empty(1),
    "one more": lambda draw, t: torch.cat([t, t[:1]]) if t.dim() and t.shape[0] else t.new_empty(1),
    "other way round": lambda draw, t: t.transpose(0, -1) if t.dim() > 1 else t[None],
    "empty": lambda draw, t: t.new_empty(0),
    "huge but empty": lambda draw, t: t.new_empty(draw.choice(((2**40, 0), (0, 2**40), (0, 2**31, 3)))),
    "huge and expanded": lambda draw, t: t.new_ones(1).expand(2**40),
    "float": lambda draw, t: t.float(),
    "double": lambda draw, t: t.double(),
    "half": lambda draw, t: t.half(),
    "bfloat16": lambda draw, t: t.bfloat16(),
    "float8": lambda draw, t: t.to(torch.float8_e4m3fn),
    "integer": lambda draw, t: (
        t.nan_to_num().clamp(-99, 99).to(draw.choice((torch.int64, torch.int32, torch.uint8)))
    ),
    "bool": lambda draw, t: t.bool(),
    "complex": lambda draw, t: t.double().to(torch.complex128),
    "quantized": lambda draw, t: torch.quantize_per_tensor(t.float().nan_to_num(), 0.1, 0, torch.qint8),
    "meta": lambda draw, t: t.to("meta"),
    "sparse": lambda draw, t: t.to_sparse(),
    "sparse rows": lambda draw, t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda draw, t: t.float().to_mkldnn(),
    "nested": lambda draw, t: torch.nested.nested_tensor([t.float(), t.float()]),
    "None": lambda draw, t: None,
    "list": lambda draw, t: t.float().tolist() if t.numel() < 1000 else [1.0],
    "number": lambda draw, t: draw.choice((0, 1.5, True)),
    "array": lambda draw, t: t.float().resolve_neg().numpy(),
    "text": lambda draw, t: "tensor",
}
LIST_FAULTS: dict[str, Callable[[Draw, list], Any]] = {
    "None": lambda draw, ts: None,
    "one less": lambda draw, ts: ts[:-1],
    "one more": lambda draw, ts: [*ts, *(ts[:1] or [torch.ones(1)])],
    "reversed": lambda draw, ts: ts[::-1],
    "empty": lambda draw, ts: [],
    "tuple": lambda draw, ts: tuple(ts),
    "without length": lambda draw, ts: Unsized(ts),
    "dict": lambda draw, ts: dict(enumerate(ts)),
    "number": lambda draw, ts: 3,
    "first alone": lambda draw, ts: next(
        iter(t for t in ts if not isinstance(t, Tensor) or t.shape[:1] < (1000,)), None
    ),
}


VALUES = (
    None, "x", "", "auto", "reference", 0, 1, -1, 2**70, 0.5, float("nan"), float("inf"), -0.0, 1e-300, 1j,
    [], [1.0],
    (2, 3), True, torch.tensor(0.5), torch.tensor([1.0, 2.0]), object(), b"x", len,
)  # fmt: skip
ROW_FAULTS: tuple[Callable[[tuple], Any], ...] = (
    lambda row: row[:-1],
    lambda row: (*row, 1.0),
    lambda row: (*row[:-1], None),
    lambda row: (*row[:-1], "x"),
    lambda row: (*row[:-1], float("nan")),
    lambda row: (float("inf"), *row[1:]),
    lambda row: list(row),
    lambda row: torch.tensor(row, dtype=torch.float64),
    lambda row: None,
    lambda row: 1.0,
)


def slots(arguments: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Where a tensor is: (name, None), or (name, i) in a list."""
    found: list[tuple[str, int | None]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, None))
        elif isinstance(value, list):
            found += [(name, i) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return found


def get(arguments: dict[str, Any], name: str, i: int | None) -> Any:
    return arguments[name] if i is None else arguments[name][i]


def put(arguments: dict[str, Any], name: str, i: int | None, value: Any) -> None:
    if i is None:
        arguments[name] = value
    else:
        arguments[name][i] = value


def writable(t: Tensor) -> bool:
    """What an op updated in place must take: as the documentation says, contiguous; and alone in its
    memory."""
    return t.is_contiguous() and not t.is_neg() and not t.is_inference()


def mutate(draw: Draw, arguments: dict[str, Any], written: tuple[str, ...]) -> bool:
    """Changes some of the arguments; returns whether they still are what the op must accept."""
    places = slots(arguments)
    for name, i in draw.sample(places, min(len(places), draw.choice((0, 1, 2, len(places))))):
        layouts = LAYOUTS if name in written or draw.chance(0.9) else FOREIGN
        if get(arguments, name, i).is_inference():
            continue
        put(arguments, name, i, layouts[draw.choice(list(layouts))](draw, get(arguments, name, i)))
    tensors = [get(arguments, *place) for place in places]
    valid = all(writable(get(arguments, name, i)) for name, i in places if name in written)
    valid = valid and all(t.data_ptr() % t.itemsize == 0 for t in tensors)
    if any(t.requires_grad for t in tensors):  # autograd cannot save inference tensors
        valid = valid and not any(t.is_inference() for t in tensors)
    if draw.chance(0.4) and places:
        valid = False
        for _ in range(draw.choice((1, 1, 2))):
            fault(draw, arguments)
    return valid


def fault(draw: Draw, arguments: dict[str, Any]) -> None:
    """One change after which the op may refuse."""
    name, i = draw.choice(slots(arguments) or [("", None)])
    lists = [n for n, value in arguments.items() if isinstance(value, list)]
    kind = draw.random()
    lists = [n for n in lists if all(t is None or isinstance(t, (Tensor, tuple)) for t in arguments[n])]
    if lists and kind < 0.15:
        name = draw.choice(lists)
        arguments[name] = LIST_FAULTS[draw.choice(list(LIST_FAULTS))](draw, arguments[name])
    elif not name:
        return
    elif kind < 0.25:  # memory of another argument
        other = overlapping(draw, get(arguments, name, i), get(arguments, *draw.choice(slots(arguments))))
        put(arguments, name, i, other if i is not None else other.detach())
    elif kind < 0.35:
        put(arguments, name, i, FOREIGN[draw.choice(list(FOREIGN))](draw, get(arguments, name, i)))
    elif kind < 0.45:
        other_fault(draw, arguments)
    elif plain(get(arguments, name, i)):
        t = get(arguments, name, i).detach().as_subclass(Tensor)
        put(arguments, name, i, FAULTS[draw.choice(list(FAULTS))](draw, t))


def plain(t: Tensor) -> bool:
    """Whether this still is what further changes can work on."""
    return has_bytes(t) and t.dtype.is_floating_point and t.numel() < LARGE


def other_fault(draw: Draw, arguments: dict[str, Any]) -> None:
    """Another value for an argument that is no tensor: a number, a name, a row of coefficients."""
    rows = [n for n, v in arguments.items() if isinstance(v, list) and v and not list(tensors_in(v))]
    values = [n for n, v in arguments.items() if n != "context" and isinstance(v, (float, str, bool, int))]
    if not values + rows:
        return
    name = draw.choice(values + rows)
    if name in rows:
        i = draw.randrange(len(arguments[name]))
        if isinstance(arguments[name][i], tuple):
            arguments[name][i] = draw.choice(ROW_FAULTS)(arguments[name][i])
    else:
        same = type(arguments[name])  # torch itself does not always take True for 1, or a tensor for True
        values = [
            v
            for v in VALUES
            if not (same is bool and isinstance(v, Tensor)) and (v is not True or same is bool)
        ]
        arguments[name] = draw.choice(values)


def overlapping(draw: Draw, t: Tensor, other: Tensor) -> Tensor:
    """Shape and dtype of `t` where they fit, in the memory of `other`; else `other` itself."""
    if t.dtype != other.dtype or not (has_bytes(t) and has_bytes(other)) or not other.is_contiguous():
        return other
    room = other.detach().reshape(-1)
    if room.numel() < t.numel():
        return other
    start = draw.choice((0, draw.randint(0, room.numel() - t.numel())))
    return room[start : start + t.numel()].view(t.shape)


def copied(value: Any) -> Any:
    """The same values in memory of their own, with strides as they are where that is possible."""
    if isinstance(value, Tensor):
        return value.detach().clone() if has_bytes(value) and value.numel() < LARGE else value
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, Unsized)) and not hasattr(value, "_fields"):
        return type(value)(copied(item) for item in value)
    return value
