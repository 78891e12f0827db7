"""Random cases with fixed seeds: what a case is drawn from, how its result is judged, how one runs alone.

A case of an op (`OpCase`) draws valid arguments, changes some of them (tests/fuzz/mutations.py), calls the op
and accepts one of two ends: the right answer, or ValueError or TypeError with every argument as it was
before. Right means, element by element, within

    bound = (8 + terms / 4) u scale + v |exact|

of the float64 reference `exact`: `terms` is the length of the sum, `scale` the same expression of absolute
values, u half a unit in the last place of the type computed with, v that of a narrower type stored. Whatever
order a sum is added in, it stays within that; one forgotten term of a sum does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129)
KS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 511, 512)
UNSERVED_KS = (0, 513, 600)
MAX_ELEMENTS = 30_000  # of a generator; more only where a case asks for several shares of blocks


class Draw(random.Random):
    """Random numbers of one case; tensors too."""

    def __init__(self, name: str, seed: int):
        super().__init__(f"{name} {seed}")
        self.torch = torch.Generator().manual_seed(self.getrandbits(48))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float | None = None) -> Tensor:
        """Normal numbers; of standard deviation 1e-3 to 1e3 unless `scale` says."""
        scale = 10 ** self.uniform(-3, 3) if scale is None else scale
        return (torch.randn(shape, generator=self.torch, dtype=torch.float64) * scale).to(dtype)

    def positive(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return (torch.rand(shape, generator=self.torch, dtype=torch.float64) + 1e-2).to(dtype)

    def generator_size(self) -> tuple[int, int]:
        """N, K of a generator: odd, empty, around blocks of rows (csrc/cpu/kernels.h), K with and without
        kernel."""
        K = self.choice(UNSERVED_KS) if self.chance(0.1) else self.choice(KS)
        rows = max(1, min(1024, 16384 // max(K, 1)))
        N = self.choice((0, *SIZES, rows - 1, rows, rows + 1, 2 * rows + 1))
        return min(N, MAX_ELEMENTS // max(K, 1)), K

    def large_size(self) -> tuple[int, int]:
        """N, K of a generator with several shares of blocks, so that several threads work on it."""
        K = self.choice((1, 4, 5, 16, 33, 512))
        return max(1, min(1024, 16384 // K)) * self.choice((17, 40)) + self.choice((0, 1, 5)), K


class Output(NamedTuple):
    """A tensor that an op made or updated, and what it should be; see the bound above. computed: the dtype
    that plain PyTorch computed it in, None for a kernel."""

    name: str
    got: Tensor
    exact: Tensor
    scale: Tensor
    terms: int = 1
    computed: torch.dtype | None = None


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def bound(out: Output) -> Tensor:
    """The error allowed for each element. Kernels compute half precision in float32; plain PyTorch rounds
    after every operation, some of which we do not see."""
    dtype, info = out.got.dtype, torch.finfo(out.got.dtype)
    computed = out.computed or (torch.float64 if dtype == torch.float64 else torch.float32)
    terms = out.terms * 4 if out.computed else out.terms
    smallest = info.tiny * info.eps * (terms + 4)  # what underflows
    stored = roundoff(dtype) * 1.01 if computed != dtype else 0.0
    return (8 + terms / 4) * roundoff(computed) * out.scale + stored * out.exact.abs() + smallest


def assert_right(out: Output) -> None:
    """AssertionError unless out.got is out.exact within the bound. Where the sums may overflow anything may
    become infinite; where the exact value is not finite, neither may be the one got."""
    assert out.got.shape == out.exact.shape, f"{out.name}: {list(out.got.shape)}, not {list(out.exact.shape)}"
    got, finite = out.got.detach().double(), out.exact.isfinite()
    wrong = got.isfinite() & ~finite
    assert not wrong.any(), f"{out.name}: finite where it should be {out.exact[wrong][0].item()}"
    safe = finite & (out.scale < torch.finfo(out.got.dtype).max / 4)
    error = (got - out.exact).abs()[safe]
    far = ~(error <= bound(out)[safe])  # NaN is far, too
    if far.any():
        at = far.nonzero()[0, 0]
        values = f"{got[safe][at].item()!r} instead of {out.exact[safe][at].item()!r}"
        limit = bound(out)[safe][at].item()
        raise AssertionError(
            f"{out.name}: {int(far.sum())} of {far.numel()} wrong, {values}, bound {limit:.1e}"
        )


class Unsized:
    """An iterable that is no sequence."""

    def __init__(self, items: Iterable[Any]):
        self.items = list(items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Unsized)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of the memory behind a tensor, as uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def has_bytes(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


class Memory:
    """Every byte behind the tensors in `arguments`, around views of larger tensors too, to tell what
    changed."""

    def __init__(self, arguments: dict[str, Any]):
        tensors = [t for t in tensors_in(arguments) if has_bytes(t)]
        self.before = {t.untyped_storage().data_ptr(): (t, bytes_of(t).clone()) for t in tensors}
        self.members = {name: list(v) for name, v in arguments.items() if isinstance(v, list)}

    def assert_unchanged(self, arguments: dict[str, Any], except_for: Iterable[Tensor] = ()) -> None:
        for name, members in self.members.items():
            same = [a is b for a, b in zip(members, arguments[name], strict=True)]
            assert all(same), f"the list {name} was changed"
        allowed = {address: torch.zeros_like(b, dtype=torch.bool) for address, (_, b) in self.before.items()}
        for t in except_for:
            if has_bytes(t) and t.numel():
                size, mask = t.itemsize, allowed[t.untyped_storage().data_ptr()]
                strides = (*(stride * size for stride in t.stride()), 1)
                mask.as_strided((*t.shape, size), strides, t.storage_offset() * size).fill_(True)
        for address, (t, before) in self.before.items():
            changed = (bytes_of(t) != before) & ~allowed[address]
            assert not changed.any(), (
                f"{int(changed.sum())} bytes changed of memory that is not to be written"
            )


@dataclass(frozen=True)
class OpCase:
    """How to draw, call and judge one op.

    draw: valid keyword arguments. call: the op with them (and the draw, for seeds of gradients); returns what
    outputs needs. outputs(before, arguments, result): what was made or updated, with its reference; `before`
    are copies of the arguments before the call. written: names of the arguments updated in place."""

    draw: Callable[[Draw], dict[str, Any]]
    call: Callable[[Draw, dict[str, Any]], Any]
    outputs: Callable[[dict[str, Any], dict[str, Any], Any], list[Output]]
    written: tuple[str, ...] = ()
    draw_large: Callable[[Draw], dict[str, Any]] | None = None

    def __call__(self, draw: Draw) -> str:
        """Runs one case; "right" or "refused". AssertionError, or whatever the op should not have raised."""
        from tests.fuzz.mutations import copied, mutate

        arguments = self.draw(draw)
        acceptable = mutate(draw, arguments, self.written)
        before, memory = copied(arguments), Memory(arguments)
        try:
            result = self.call(draw, arguments)
        except (ValueError, TypeError) as error:
            assert str(error), "an error without a message"
            assert not acceptable, f"valid arguments were refused: {error}"
            memory.assert_unchanged(arguments)
            return "refused"
        memory.assert_unchanged(arguments, tensors_in([arguments[name] for name in self.written]))
        for out in self.outputs(before, arguments, result):
            assert_right(out)
        return "right"

    def valid(self, draw: Draw, large: bool = False) -> list[Output]:
        """The outputs of a case whose arguments are left valid, not judged: to compare instruction sets,
        threads."""
        from tests.fuzz.mutations import copied

        arguments = (self.draw_large or self.draw)(draw) if large else self.draw(draw)
        before = copied(arguments)
        return self.outputs(before, arguments, self.call(draw, arguments))


def computed_in(weights: list[Tensor], backend: str = "auto") -> torch.dtype | None:
    """The dtype a call with these generators computes in where plain PyTorch does it, None where a kernel
    does."""
    kernels = backend == "auto" and all(t.dtype in KERNEL_DTYPES and 1 <= t.shape[1] <= 512 for t in weights)
    return None if kernels or not weights else weights[0].dtype
