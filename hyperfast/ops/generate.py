"""`generate`: the weights of all layers from their embeddings, in one launch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _cpu,
    _cuda,
    address,
    autocast_dtype,
    check_backend,
    check_generators,
    dtype_name,
    generator_engine,
    has_tangent,
    is_transformed,
    library,
    needs_function,
    no_autocast,
    run_first,
    triton_kernels,
)
from hyperfast.ops.generate_backward import backward_op
from hyperfast.ops.next_weights import is_current

# dtype: of the result, None for that of the weights
library.define(
    "generate(Tensor[] weights, Tensor?[] biases, Tensor[] zs, Tensor?[] next_weights, ScalarType? dtype) "
    "-> Tensor[]"
)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous copies in `dtype`; on a GPU in one launch."""
    copies = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _generate(weights, biases, zs, next_weights, dtype, kernel) -> list[Tensor]:
    """Copies of next weights where they are current; `kernel(indices of the others)` makes those."""
    made = [w if is_current(w, *p) else None for w, *p in zip(next_weights, weights, biases, zs, strict=True)]
    missing = [i for i, w in enumerate(made) if w is None]
    for i, w in zip(missing, kernel(missing) if missing else (), strict=True):
        made[i] = w
    dtype = dtype or weights[0].dtype
    copied = [i for i, w in enumerate(made) if i not in missing or w.dtype != dtype]
    for i, w in zip(copied, cast([made[i] for i in copied], dtype), strict=True):
        made[i] = w
    return made


@torch.library.impl(library, "generate", "CompositeExplicitAutograd")
def _generate_reference(weights, biases, zs, next_weights, dtype):
    def kernel(missing):
        with no_autocast(weights):
            return reference.generate(*([tensors[i] for i in missing] for tensors in (weights, biases, zs)))

    return _generate(weights, biases, zs, next_weights, dtype, kernel)


@torch.library.impl(library, "generate", "CPU")
@torch.library.impl(library, "generate", "CUDA")
def _generate_native(weights, biases, zs, next_weights, dtype):
    engine = generator_engine(weights, cuda="generate")
    if engine == "reference":
        return _generate_reference(weights, biases, zs, next_weights, dtype)

    def kernel(missing):
        out, keep, segments = [], [], []
        for i in missing:
            weight, z = weights[i].contiguous(), zs[i].contiguous()
            # optional lists come as they are: what is lazily negated in them is for the op to negate
            bias = None if biases[i] is None else biases[i].contiguous().resolve_neg()
            out.append(weight.new_empty(weight.shape[0]))
            keep.append((weight, bias, z))
            addresses = (weight.data_ptr(), address(bias), z.data_ptr(), out[-1].data_ptr())
            segments.append((*addresses, *weight.shape))
        if engine == "triton":
            triton_kernels("generate").run(segments, weights[0].dtype, weights[0].device)
        elif engine == "cuda":
            with torch.cuda.device(weights[0].device):
                _cuda.generate(segments, dtype_name(weights[0]), torch.cuda.current_stream().cuda_stream)
        else:
            _cpu.generate(segments, dtype_name(weights[0]), torch.get_num_threads())
        return out

    return _generate(weights, biases, zs, next_weights, dtype, kernel)


@torch.library.register_fake("hyperfast::generate", lib=library)
def _generate_fake(weights, biases, zs, next_weights, dtype):
    return [weight.new_empty(weight.shape[0], dtype=dtype or weight.dtype) for weight in weights]


class Generate(torch.autograd.Function):
    """tensors: L weights, L biases (or None), L zs, L next weights (or None), in this order. dtype: of the
    result, None for that of the weights."""

    @staticmethod
    def forward(factored: bool, backend: str, dtype: torch.dtype | None, *tensors):
        L = len(tensors) // 4
        weights, biases, zs, next_weights = (list(tensors[i * L : (i + 1) * L]) for i in range(4))
        if backend == "reference":
            with no_autocast(weights):
                made = reference.generate(weights, biases, zs)
            return tuple(w.to(dtype or w.dtype) for w in made)
        return tuple(torch.ops.hyperfast.generate(weights, biases, zs, next_weights, dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        factored, backend, _, *tensors = inputs
        ctx.factored, ctx.backend, ctx.L = factored, backend, len(tensors) // 4
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: ctx.L], *tensors[2 * ctx.L : 3 * ctx.L])

    @staticmethod
    def backward(ctx, *dws):
        L, saved = ctx.L, ctx.saved_tensors
        weights, zs = saved[:L], saved[L:]
        need_weight, need_bias, need_z = (ctx.needs_input_grad[3 + i * L : 3 + (i + 1) * L] for i in range(3))
        used = [i for i in range(L) if dws[i] is not None]
        # create_graph and torch.func: a backward that can be differentiated again, dense weight gradients
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dws = _in_dtype(dws, weights[0].dtype, again)
        dz: list[Tensor | None] = [None] * L
        with_dz = [i for i in used if need_z[i]]
        if with_dz:
            op = reference.generate_backward if again or ctx.backend == "reference" else backward_op
            made, _ = op([weights[i] for i in with_dz], [dws[i] for i in with_dz])
            for i, gradient in zip(with_dz, made, strict=True):
                dz[i] = gradient
        ctx.factored = ctx.factored and not again  # stays dense in the second backward through this node
        dense = not ctx.factored
        dweight = [
            torch.outer(dws[i], zs[i]) if i in used and need_weight[i] and dense else None for i in range(L)
        ]
        dbias = [dws[i] if need_bias[i] else None for i in range(L)]
        return (None, None, None, *dweight, *dbias, *dz, *([None] * L))

    @staticmethod
    def vmap(info, in_dims, factored, backend, dtype, *tensors):
        L = len(tensors) // 4

        def batched(tensor, dim):
            return tensor if tensor is None or dim is None else tensor.movedim(dim, 0)

        tensors = [batched(t, dim) for t, dim in zip(tensors, in_dims[3:], strict=True)]
        out = []
        for i in range(L):
            weight, bias, z = tensors[i], tensors[L + i], tensors[2 * L + i]
            w = (weight @ z.unsqueeze(-1)).squeeze(-1)
            w = (w if bias is None else w + bias).to(dtype or weight.dtype)
            out.append(w.expand(info.batch_size, w.shape[-1]) if w.dim() == 1 else w)
        return tuple(out), tuple(0 for _ in out)


# Function.apply asks for it at every call, which took 18 of 60 us
Generate.forward.__signature__ = inspect.signature(Generate.forward)


def _in_dtype(dws, dtype: torch.dtype, differentiable: bool) -> list[Tensor | None]:
    """dws (or None) in `dtype`, those of a main network under autocast cast at once."""
    low = [i for i, dw in enumerate(dws) if dw is not None and dw.dtype != dtype]
    given = [dws[i] for i in low]
    made = list(dws)
    for i, dw in zip(
        low, [dw.to(dtype) for dw in given] if differentiable else cast(given, dtype), strict=True
    ):
        made[i] = dw
    return made


class PenalizeL2(torch.autograd.Function):
    """w itself; its gradient is that of the loss plus l2 w, the gradient of l2 / 2 |w|^2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, l2: float) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        w, ctx.l2 = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx, dw):
        (w,) = ctx.saved_tensors
        return torch.add(dw, w, alpha=ctx.l2), None


def penalize_l2(w: Tensor, l2: float) -> Tensor:
    """w; its backward adds the gradient of l2 / 2 |w|^2, as if the loss had that term. A `Generator` applies
    it to what it makes, with its `l2`."""
    return PenalizeL2.apply(w, l2) if l2 and torch.is_grad_enabled() else w


class Carry(torch.autograd.Function):
    """w [N] in `dtype` (None: as it is), made from `bias` [N] that its graph does not know: in the backward
    dw, with l2 w added, is the gradient of both.

    `Generate` runs when the dw of every layer is there, at the end of the backward. This node runs when its
    own is, so that dw is on its way to other ranks while the rest of the network still computes.
    """

    @staticmethod
    def forward(w: Tensor, bias: Tensor, l2: float, dtype: torch.dtype | None) -> Tensor:
        return w.view_as(w) if dtype in (None, w.dtype) else w.to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        w, _, ctx.l2, _ = inputs
        ctx.dtype = w.dtype
        if ctx.l2:
            ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx, dw):
        dw = dw.to(ctx.dtype)
        if ctx.l2:
            dw = torch.add(dw, *ctx.saved_tensors, alpha=ctx.l2)
        return dw, dw if ctx.needs_input_grad[1] else None, None, None


def _carried(
    made: Sequence[Tensor], biases: Sequence[Tensor], l2: Sequence[float], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    return tuple(run_first(Carry.apply(*of_layer, dtype)) for of_layer in zip(made, biases, l2, strict=True))


def _told_apart(*lists: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The same values, no tensor twice: a compiled autograd Function returns half the gradient of a tensor
    given twice (torch 2.11). Only parameters have an id there; a view of anything else does not hurt."""
    seen: set[int] = set()

    def apart(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in seen:
            seen.add(id(tensor))
            return tensor
        return tensor.view_as(tensor)

    return [[apart(tensor) for tensor in tensors] for tensors in lists]


def _takes_order(*tensors: Tensor) -> bool:
    """Whether there will be a backward of autograd's engine alone, whose order of nodes can be told."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return False
    return any(t.requires_grad for t in tensors) and not has_tangent(*tensors)


def generate(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    zs: Sequence[Tensor],
    *,
    next_weights: Sequence[Tensor | None] | None = None,
    factored: bool = False,
    early: bool = False,
    l2: Sequence[float] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """w[n] = sum_k weight[n, k] z[k] + bias[n] for every layer, in one launch.

    weights: L tensors [N, K]; biases: L tensors [N] or None; zs: L tensors [K]; N and K may differ between
    layers. float32, float64 and bfloat16 have CPU kernels (K up to 512), float16, other K and devices run
    `hyperfast.reference`. next_weights: what `adamw_generate` left, [N] each or None; used where weight, bias
    and z are unchanged since. factored: no gradient of weight is formed; it is dw outer z, and dw is the
    gradient of bias. early: where factored, each bias, which none may be without, gets dw as soon as that is
    there, not at the backward's end with all others; compiled code has an order of its own. l2: L numbers;
    the backward adds l2 w to dw, the gradient of l2 / 2 |w|^2. Returns L tensors [N] that alias nothing,
    in autocast's dtype under autocast. Raises ValueError or TypeError for
    wrong shapes, dtypes or devices, and for a gradient of inference tensors. Ha, Dai, Le, "HyperNetworks"
    (ICLR 2017), section 3, with a linear generator.
    """
    check_backend(backend)
    weights, biases, zs = list(weights), list(biases), list(zs)
    next_weights = [None] * len(weights) if next_weights is None else list(next_weights)
    check_generators(weights, bias=(biases, "N?"), z=(zs, "K"), next_weight=(next_weights, "N?"))
    l2 = [0.0] * len(weights) if l2 is None else list(l2)
    if len(l2) != len(weights):
        raise ValueError(f"l2 must have one number for each of {len(weights)} weights, got {len(l2)}")
    if not weights:
        return ()
    if backend == "reference" and not factored:
        made = reference.generate(weights, biases, zs)
        return tuple(penalize_l2(w, c) for w, c in zip(made, l2, strict=True))
    early = early and factored
    if early and any(bias is None for bias in biases):
        raise ValueError("early hands dw to the biases: every layer needs one")
    early = early and _takes_order(*weights, *biases, *zs)
    if torch.compiler.is_compiling():
        weights, biases, zs = _told_apart(weights, biases, zs)
    with_function = needs_function(*weights, *biases, *zs)
    dtype = autocast_dtype(weights[0])
    if early:
        inputs = (*weights, *(b.detach() for b in biases), *zs, *next_weights)
        return _carried(Generate.apply(factored, backend, None, *inputs), biases, l2, dtype)
    inputs = (*weights, *biases, *zs, *next_weights)
    penalized = any(l2) and torch.is_grad_enabled()  # in the dtype of the weights, so cast after that
    out = (Generate.apply if with_function else Generate.forward)(
        factored, backend, None if penalized else dtype, *inputs
    )
    if not penalized:
        return out
    out = tuple(penalize_l2(w, c) for w, c in zip(out, l2, strict=True))
    return out if dtype is None else tuple(w.to(dtype) for w in out)
