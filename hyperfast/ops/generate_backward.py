"""`generate_backward`: the gradients of all embeddings and |dw|^2, without a dense generator gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _cpu,
    _cuda,
    check_generators,
    dtype_name,
    generator_engine,
    library,
    no_autocast,
    triton_kernels,
)

library.define("generate_backward(Tensor[] weights, Tensor[] dws) -> (Tensor[], Tensor)")


@torch.library.impl(library, "generate_backward", "CompositeExplicitAutograd")
def _backward_reference(weights, dws):
    with no_autocast(weights):
        return reference.generate_backward(weights, dws)


@torch.library.impl(library, "generate_backward", "CPU")
@torch.library.impl(library, "generate_backward", "CUDA")
def _backward_native(weights, dws):
    engine, device = generator_engine(weights, cuda="generate_backward"), weights[0].device
    if engine == "reference":
        return _backward_reference(weights, dws)
    weights, dws = [w.contiguous() for w in weights], [dw.contiguous() for dw in dws]
    dzs = [weight.new_empty(weight.shape[1]) for weight in weights]
    squared_norms = torch.empty(len(weights), dtype=torch.float64, device=device)
    segments = [
        (weight.data_ptr(), dw.data_ptr(), dz.data_ptr(), squared_norms.data_ptr() + 8 * i, *weight.shape)
        for i, (weight, dw, dz) in enumerate(zip(weights, dws, dzs, strict=True))
    ]
    if engine == "triton":
        triton_kernels("generate_backward").run(segments, weights[0].dtype, device)
    elif engine == "cuda":
        doubles = _cuda.generate_backward_scratch([tuple(weight.shape) for weight in weights])
        scratch = torch.empty(doubles, dtype=torch.float64, device=device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            _cuda.generate_backward(segments, scratch.data_ptr(), dtype_name(weights[0]), stream)
    else:
        _cpu.generate_backward(segments, dtype_name(weights[0]), torch.get_num_threads())
    return dzs, squared_norms


@torch.library.register_fake("hyperfast::generate_backward", lib=library)
def _backward_fake(weights, dws):
    dzs = [weight.new_empty(weight.shape[1]) for weight in weights]
    return dzs, weights[0].new_empty(len(weights), dtype=torch.float64)


def backward_op(weights: list[Tensor], dws: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The op without checks, for autograd."""
    return torch.ops.hyperfast.generate_backward(weights, dws)


def generate_backward(weights: Sequence[Tensor], dws: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """dz[k] = sum_n weight[n, k] dw[n] for every layer, and |dw|^2, reading each generator once.

    weights: L tensors [N, K]; dws: L tensors [N], gradients with respect to the generated weights. Returns L
    tensors [K] and the squared norms, float64 [L]: |d weight|^2 = |dw|^2 |z|^2. The sums are added in an
    order that depends neither on the number of threads nor on their timing. Not differentiable. Raises
    ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    weights, dws = list(weights), list(dws)
    check_generators(weights, dw=(dws, "N"))
    if not weights:
        return [], torch.empty(0, dtype=torch.float64)
    with torch.no_grad():
        return backward_op(weights, dws)
