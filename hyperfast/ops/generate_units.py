"""`generate_units`: the kernels of many layers, tiled by units that one matrix product makes (Ha et al.)."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _DTYPES,
    MAX_ROWS,
    _cpu,
    address,
    autocast_dtype,
    check_backend,
    check_dense,
    check_like,
    dtype_name,
    engine,
    library,
    needs_function,
    no_autocast,
    triton_kernels,
)
from hyperfast.ops.generate import penalize_l2

# shapes: of all layers, one after another. dtype: of the result, None for that of a. ws: none where l2 is 0
library.define(
    "generate_units(Tensor a, Tensor weight, Tensor? bias, int[] shapes, int[] unit, bool channels_last, "
    "ScalarType? dtype) -> Tensor[]"
)
library.define(
    "generate_units_backward(Tensor?[] dws, Tensor[] ws, float l2, Tensor a, Tensor weight, int[] shapes, "
    "int[] unit, bool need_a, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


class Unit(NamedTuple):
    """What the kernels are told of a unit (O, I, *kernel); T: elements of a kernel, R S of a 2-D one."""

    O: int
    I: int
    T: int

    @staticmethod
    def of(unit: Sequence[int]) -> Unit:
        return Unit(unit[0], unit[1], math.prod(unit[2:]))

    def tiles(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many units a layer has, and how many of them lie side by side in its input channels."""
        across = shape[1] // self.I
        return shape[0] // self.O * across, across


def _split(shapes: Sequence[int], unit: Sequence[int]) -> list[tuple[int, ...]]:
    """The shape of each layer."""
    rank = len(unit)
    return [tuple(shapes[i : i + rank]) for i in range(0, len(shapes), rank)]


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(a: Tensor, shapes, unit, channels_last, dtype) -> list[Tensor]:
    options = {"dtype": dtype or a.dtype, "device": a.device, "memory_format": _layout(channels_last)}
    return [torch.empty(shape, **options) for shape in _split(shapes, unit)]


@torch.library.impl(library, "generate_units", "CompositeExplicitAutograd")
def _forward_reference(a, weight, bias, shapes, unit, channels_last, dtype):
    ws = _empty(a, shapes, unit, channels_last, dtype)
    with no_autocast([a]):
        made = reference.generate_units(a, weight, bias, _split(shapes, unit), unit)
    for w, values in zip(ws, made, strict=True):
        w.copy_(values)
    return ws


@torch.library.impl(library, "generate_units_backward", "CompositeExplicitAutograd")
def _backward_reference(dws, ws, l2, a, weight, shapes, unit, need_a, need_weight, need_bias):
    with no_autocast([a]):
        made = reference.generate_units_backward(dws, ws, l2, a, weight, _split(shapes, unit), unit)
    wanted = zip(made, (need_a, need_weight, need_bias), strict=True)
    return tuple(d.contiguous() if needed else a.new_empty(0) for d, needed in wanted)


def _engine(a: Tensor, weight: Tensor, dtype: torch.dtype) -> str:
    """`engine` for layers of `dtype`. The C++ kernels write dtype of `a`, or bfloat16 beside float32."""
    name = engine(a) if a.numel() and weight.numel() and len(a) <= MAX_ROWS else "reference"
    writes = dtype in (a.dtype, torch.bfloat16) and (dtype == a.dtype or a.dtype == torch.float32)
    return name if name != "cpu" or writes else "reference"


# What the native modules and `hyperfast.kernels.generate_units` get: a row for each layer, (address of w,
# units, units side by side) forward, (address of dw or 0, address of w or 0, units, units side by side)
# backward; contiguous a [P, D], weight [D, C] and bias [C] or None; the `Unit`; whether the layers lie in
# channels_last, [m O, T, n I] instead of [m O, n I, T]. Backward: da, dweight, dbias to be written, None
# where not needed.


@torch.library.impl(library, "generate_units", "CPU")
@torch.library.impl(library, "generate_units", "CUDA")
def _forward_native(a, weight, bias, shapes, unit, channels_last, dtype):
    name = _engine(a, weight, dtype or a.dtype)
    if name == "reference":
        return _forward_reference(a, weight, bias, shapes, unit, channels_last, dtype)
    ws = _empty(a, shapes, unit, channels_last, dtype)
    a, weight, bias = a.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    sizes = Unit.of(unit)
    rows = [(w.data_ptr(), *sizes.tiles(w.shape)) for w in ws]
    if name == "triton":
        triton_kernels("generate_units").run(rows, a, weight, bias, sizes, channels_last, ws[0].dtype)
    else:
        tensors = a.data_ptr(), weight.data_ptr(), address(bias)
        names = dtype_name(a), dtype_name(ws[0])
        shape = *a.shape, weight.shape[1], *sizes
        _cpu.generate_units(rows, tensors, shape, channels_last, *names, torch.get_num_threads())
    return ws


def _in_one_layout(dws: Sequence[Tensor | None], ws: Sequence[Tensor]) -> tuple[list, list, bool]:
    """dws and ws in one layout, and whether it is channels_last: that of most dws, the others are copied."""
    given = [dw for dw in dws if dw is not None] or list(ws)
    contiguous = sum(t.is_contiguous() for t in given)
    last = given[0].dim() == 4 and contiguous < sum(
        t.is_contiguous(memory_format=torch.channels_last) for t in given
    )
    dws, ws = (
        # optional lists come as they are: what is lazily negated in them is for the op to negate
        [None if t is None else t.resolve_neg().contiguous(memory_format=_layout(last)) for t in tensors]
        for tensors in (dws, ws)
    )
    return dws, ws, last


@torch.library.impl(library, "generate_units_backward", "CPU")
@torch.library.impl(library, "generate_units_backward", "CUDA")
def _backward_native(dws, ws, l2, a, weight, shapes, unit, need_a, need_weight, need_bias):
    given = [t for t in (*dws, *ws) if t is not None]
    name = _engine(a, weight, given[0].dtype) if len({t.dtype for t in given}) == 1 else "reference"
    if name == "reference":
        return _backward_reference(dws, ws, l2, a, weight, shapes, unit, need_a, need_weight, need_bias)
    dws, ws, channels_last = _in_one_layout(dws, ws)
    a, weight = a.contiguous(), weight.contiguous()
    needed = (need_a, need_weight, need_bias)
    made = _backward_fake(dws, ws, l2, a, weight, shapes, unit, *needed)
    wanted = [d if need else None for d, need in zip(made, needed, strict=True)]
    sizes = Unit.of(unit)
    rows = [
        (address(dw), address(w), *sizes.tiles(shape))
        for dw, w, shape in zip(dws, ws or [None] * len(dws), _split(shapes, unit), strict=True)
    ]
    if name == "triton":
        triton_kernels("generate_units").run_backward(
            rows, l2, a, weight, *wanted, sizes, channels_last, given[0].dtype
        )
    else:
        tensors = [address(t) for t in (a, weight, *wanted)]
        names = dtype_name(a), dtype_name(given[0])
        shape = *a.shape, weight.shape[1], *sizes
        _cpu.generate_units_backward(rows, l2, tensors, shape, channels_last, *names, torch.get_num_threads())
    return made


@torch.library.register_fake("hyperfast::generate_units", lib=library)
def _forward_fake(a, weight, bias, shapes, unit, channels_last, dtype):
    return _empty(a, shapes, unit, channels_last, dtype)


@torch.library.register_fake("hyperfast::generate_units_backward", lib=library)
def _backward_fake(dws, ws, l2, a, weight, shapes, unit, need_a, need_weight, need_bias):
    wanted = ((need_a, a.shape), (need_weight, weight.shape), (need_bias, weight.shape[1:]))
    return tuple(a.new_empty(shape if needed else 0) for needed, shape in wanted)


class GenerateUnits(torch.autograd.Function):
    """The layers of the op, differentiable in a, weight and bias."""

    @staticmethod
    def forward(
        a, weight, bias, shapes, unit, l2: float, channels_last: bool, dtype: torch.dtype | None, backend: str
    ):
        op = _forward_reference if backend == "reference" else torch.ops.hyperfast.generate_units
        return tuple(op(a, weight, bias, shapes, unit, channels_last, dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, weight, _, ctx.shapes, ctx.unit, ctx.l2, *_, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, weight, *(output if ctx.l2 else ()))

    @staticmethod
    def backward(ctx, *dws):
        a, weight, *ws = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        # create_graph and torch.func: a backward that can be differentiated again
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if again or ctx.backend == "reference":
            shapes = _split(ctx.shapes, ctx.unit)
            made = reference.generate_units_backward(dws, ws, ctx.l2, a, weight, shapes, ctx.unit)
        else:
            made = torch.ops.hyperfast.generate_units_backward(
                dws, ws, ctx.l2, a, weight, ctx.shapes, ctx.unit, *needed
            )
        return *(d if need else None for d, need in zip(made, needed, strict=True)), *[None] * 6

    @staticmethod
    def vmap(info, in_dims, a, weight, bias, shapes, unit, l2, channels_last, dtype, backend):
        def one(a, weight, bias):
            made = reference.generate_units(a, weight, bias, _split(shapes, unit), unit)
            return tuple(penalize_l2(w.to(dtype or w.dtype), l2) for w in made)

        made = torch.vmap(one, in_dims[:3], randomness="different")(a, weight, bias)
        return made, (0,) * len(made)


# Function.apply asks for it at every call
GenerateUnits.forward.__signature__ = inspect.signature(GenerateUnits.forward)


def _check(a, weight, bias, shapes, unit, l2, channels_last) -> None:
    for name, tensor in (("a", a), ("weight", weight)):
        check_dense(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(
                f"{name} must be [{'P, D' if name == 'a' else 'D, C'}], got {list(tensor.shape)}"
            )
    if a.dtype not in _DTYPES:
        raise TypeError(f"a must be floating point ({', '.join(_DTYPES.values())}), got {a.dtype}")
    (P, D), C = a.shape, weight.shape[1]
    if weight.shape[0] != D:
        raise ValueError(f"weight must be [{D}, C] for a of shape {[P, D]}, got {list(weight.shape)}")
    if weight.dtype != a.dtype:
        raise TypeError(f"weight must be {a.dtype} like a, got {weight.dtype}")
    if weight.device != a.device:
        raise ValueError(f"weight must be on {a.device} like a, got {weight.device}")
    if bias is not None:
        check_dense("bias", bias)
        check_like("bias", bias, weight, [C])
    if len(unit) < 2 or min(unit) < 1:
        raise ValueError(f"unit must be (O, I, *kernel), each at least 1, got {unit}")
    units, size = 0, math.prod(unit)
    for i, shape in enumerate(shapes):
        fits = len(shape) == len(unit) and min(shape) >= 1 and shape[2:] == unit[2:]
        if not fits or shape[0] % unit[0] or shape[1] % unit[1]:
            wanted = f"(m {unit[0]}, n {unit[1]}, {', '.join(map(str, unit[2:]))})"
            raise ValueError(f"shape {i} must be {wanted} for units of shape {unit}, got {shape}")
        units += math.prod(shape) // size
    if P * C != units * size or (C and size % C):
        raise ValueError(
            f"a weight must be [P, C] with C a divisor of {size} and P C = {units * size} for {units} units "
            f"of shape {unit}, got {[P, C]}"
        )
    if not isinstance(channels_last, bool) or not isinstance(l2, (int, float)):
        raise TypeError(f"channels_last must be a bool and l2 a number, got {channels_last!r} and {l2!r}")
    if channels_last and len(unit) != 4:
        raise ValueError(f"channels_last is for units of four dimensions, got {unit}")
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 must be at least 0 and finite, got {l2}")


def generate_units(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shapes: Sequence[Sequence[int]],
    unit: Sequence[int],
    *,
    l2: float = 0.0,
    channels_last: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The kernels of all layers from one matrix product, u = a weight + bias, in one launch.

    a [P, D], weight [D, C], bias [C] or None, of one floating dtype and device. Read in order, u [P, C] is E
    units of shape `unit` = (O, I, *kernel); C divides O I prod(kernel). Each of `shapes`, (m O, n I,
    *kernel), takes the next m n units: w[o O : (o + 1) O, i I : (i + 1) I] = units[o n + i]. Together they
    take all E. Returns one tensor for each of `shapes`, contiguous or, for four dimensions, in channels_last
    if asked; they alias nothing and have autocast's dtype under autocast. l2: the backward adds l2 w to dw,
    the gradient of l2 / 2 |w|^2, once any layer is used to those that are not as well. float32, float64 and
    bfloat16 have CPU kernels, float16 runs `hyperfast.reference`. Raises ValueError or TypeError for wrong
    shapes, dtypes or devices.

    Ha, Dai, Le, "HyperNetworks" (ICLR 2017), section 3.1: with a = z w2 + b2 [E I, D] and weight = w1 [D, O
    prod(kernel)] the second layer of their generator; with a = z [E, K] and weight the product of both layers
    all of it. `two_layer` chooses.
    """
    check_backend(backend)
    shapes, unit = [tuple(map(operator.index, shape)) for shape in shapes], tuple(map(operator.index, unit))
    _check(a, weight, bias, shapes, unit, l2, channels_last)
    if not shapes:
        return ()
    if a is weight:  # torch 2.11 compiled: half the gradient of a tensor given twice
        weight = weight.view_as(weight)
    flat = [n for shape in shapes for n in shape]
    function = GenerateUnits.apply if needs_function(a, weight, bias) else GenerateUnits.forward
    options = float(l2), channels_last, autocast_dtype(a), backend
    return function(a, weight, bias, flat, list(unit), *options)


def product_first(E: int, K: int, D: int, C: int) -> bool:
    """Whether two linear layers, [E, K] x [K, R D] and [E R, D] x [D, C], cost fewer multiplications when the
    layers are multiplied first, [K R, D] x [D, C], and then E rows by that; forward and backward alike."""
    return K * C * (D + E) < E * D * (K + C)


def two_layer(
    z: Tensor,
    w2: Tensor,
    b2: Tensor,
    w1: Tensor,
    b1: Tensor,
    shapes: Sequence[Sequence[int]],
    unit: Sequence[int],
    *,
    l2: float = 0.0,
    channels_last: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The kernels of all layers from their embeddings by the two-layer generator of Ha, Dai, Le,
    "HyperNetworks" (ICLR 2017), section 3.1: a = z w2 + b2 viewed as [E R, D], units = a w1 + b1.

    z [E, K], w2 [K, R D], b2 [R D], w1 [D, C], b1 [C] with R C = O I prod(kernel): R is I for Ha et al. The
    rest as in `generate_units`. There is nothing but products in between, so the cheaper order is taken: for
    more embeddings than C, z (w2 w1) + (b2 w1 + b1).
    """
    D, C = w1.shape
    with no_autocast([z]):  # as in generate_units: its products are in the dtype of the parameters
        if product_first(*z.shape, D, C):
            weight = (w2.view(-1, D) @ w1).view(z.shape[1], -1)
            a, bias = z, torch.addmm(b1, b2.view(-1, D), w1).view(-1)
        else:
            a, weight, bias = torch.addmm(b2, z, w2).view(-1, D), w1, b1
    return generate_units(a, weight, bias, shapes, unit, l2=l2, channels_last=channels_last, backend=backend)
