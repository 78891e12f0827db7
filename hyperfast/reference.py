"""Every op in plain PyTorch, with the names and arguments of `hyperfast.ops`: the specification.

Letters: L generated layers, N weights of a layer, K embedding size. Lists have one entry for each layer,
layers may differ in N and K. Nothing here is fast; everything here is differentiable where the mathematics
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast import states
from hyperfast.states import EightBit, State


class AdamWCoefficients(NamedTuple):
    """One step of AdamW (Loshchilov and Hutter, 2019): `decay` = 1 - lr weight_decay, `step_size` = lr / (1 -
    beta1^t), `bias_correction2_sqrt` = sqrt(1 - beta2^t); or of Adam with weight decay in the gradient:
    `decay` 1, `l2` = weight_decay."""

    decay: float
    step_size: float
    beta1: float
    beta2: float
    bias_correction2_sqrt: float
    eps: float
    l2: float = 0.0


class SGDCoefficients(NamedTuple):
    """One step of SGD as in torch: with g the gradient plus `l2` = weight_decay times the parameter, the
    momentum buffer becomes `keep` buffer + `take` g (momentum and 1 - dampening; 0 and 1 in the first step),
    and the parameter moves by -`lr` (`gradient` g + `buffer` buffer): 0 and 1, with Nesterov 1 and momentum,
    without momentum 1 and 0."""

    lr: float
    l2: float
    keep: float
    take: float
    gradient: float
    buffer: float


def generate(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], zs: Sequence[Tensor]
) -> list[Tensor]:
    """w[n] = sum_k weight[n, k] z[k] + bias[n]: weight [N, K], bias [N] or None, z [K] -> w [N]."""
    return [F.linear(z, weight, bias) for weight, bias, z in zip(weights, biases, zs, strict=True)]


def generate_backward(weights: Sequence[Tensor], dws: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """dz = weight^T dw [K] for each layer, and |dw|^2 as float64 [L].

    With them every gradient of `generate` is known: d bias = dw, d weight = dw outer z, |d weight|^2 = |dw|^2
    |z|^2.
    """
    dzs = [weight.t() @ dw for weight, dw in zip(weights, dws, strict=True)]
    return dzs, torch.stack([dw.double().square().sum() for dw in dws])


def generate_units(
    a: Tensor, weight: Tensor, bias: Tensor | None, shapes: Sequence[Sequence[int]], unit: Sequence[int]
) -> list[Tensor]:
    """u = a weight + bias, laid out as the kernels of layers: a [P, D], weight [D, C], bias [C] or None.

    Read in order, u [P, C] is E units of shape `unit` = (O, I, *kernel). A layer of `shapes`, (m O, n I,
    *kernel), is tiled by the next m n of them: w[o O : (o + 1) O, i I : (i + 1) I] = units[o n + i].
    """
    u = a @ weight if bias is None else torch.addmm(bias, a, weight)
    O, I, *kernel = unit
    tiles = [(shape[0] // O, shape[1] // I) for shape in shapes]
    parts = u.reshape(-1, *unit).split([m * n for m, n in tiles])
    return [
        part.view(m, n, *unit).transpose(1, 2).reshape(m * O, n * I, *kernel)
        for part, (m, n) in zip(parts, tiles, strict=True)
    ]


def generate_units_backward(
    dws: Sequence[Tensor | None],
    ws: Sequence[Tensor],
    l2: float,
    a: Tensor,
    weight: Tensor,
    shapes: Sequence[Sequence[int]],
    unit: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """da = du weight^T [P, D], dweight = a^T du [D, C] and dbias [C], the sum of the rows of du, with du [P,
    C] what dw + l2 w of all layers are when read unit by unit.

    A dw may be None: zeros. ws: the layers' w; empty where l2 is 0.
    """
    O, I, *kernel = unit
    rows = []
    for i, (dw, shape) in enumerate(zip(dws, shapes, strict=True)):
        g = a.new_zeros(shape) if dw is None else dw.to(a.dtype)
        g = g + l2 * ws[i].to(a.dtype) if l2 else g
        rows.append(g.reshape(shape[0] // O, O, shape[1] // I, I, *kernel).transpose(1, 2).reshape(-1))
    du = torch.cat(rows).view(-1, weight.shape[1])
    return du @ weight.t(), a.t() @ du, du.sum(0)


def hyper_linear(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None, layer_bias: Tensor | None = None
) -> Tensor:
    """A linear layer on generated weights: x [..., I], z [K], weight [O I, K], bias [O I] or None, layer_bias
    [O] or None -> [..., O]. z [B, K] with x [B, ..., I]: y_b = x_b w_b^T + layer_bias, w_b = weight z_b +
    bias."""
    w = F.linear(z, weight, bias)
    if z.dim() == 1:
        return F.linear(x, w.view(-1, x.shape[-1]), layer_bias)
    y = torch.einsum("b...i,boi->b...o", x, w.unflatten(1, (-1, x.shape[-1])))
    return y if layer_bias is None else y + layer_bias


def hyper_conv2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with a generated kernel: x [B, I, H, W], z [K], weight [O I/groups R S, K], bias [O
    I/groups R S] or None, layer_bias [O] or None, kernel_size (R, S) -> [B, O, H', W']. z [B, K]: sample b
    has the kernel weight z_b + bias, and its channels are groups of one convolution."""
    w = F.linear(z, weight, bias).view(-1, x.shape[1] // groups, *kernel_size)
    if z.dim() == 1:
        return F.conv2d(x, w, layer_bias, stride, padding, dilation, groups)
    images = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(images, w, None, stride, padding, dilation, len(x) * groups)
    y = y.view(len(x), -1, *y.shape[2:])
    return y if layer_bias is None else y + layer_bias.view(-1, 1, 1)


def adamw_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, c: AdamWCoefficients) -> None:
    """One AdamW or Adam step in place, as `torch.optim` does it."""
    grad = grad + c.l2 * p
    exp_avg.add_((1 - c.beta1) * (grad - exp_avg))
    exp_avg_sq.mul_(c.beta2).add_((1 - c.beta2) * grad * grad)
    p.mul_(c.decay).sub_(c.step_size * exp_avg / (exp_avg_sq.sqrt() / c.bias_correction2_sqrt + c.eps))


def sgd_(p: Tensor, momentum_buffer: Tensor, grad: Tensor, c: SGDCoefficients) -> None:
    """One SGD step with momentum in place, as `torch.optim.SGD` does it."""
    grad = grad + c.l2 * p
    momentum_buffer.mul_(c.keep).add_(c.take * grad)
    p.sub_(c.lr * (c.gradient * grad + c.buffer * momentum_buffer))


def plain_sgd_(p: Tensor, grad: Tensor, c: SGDCoefficients) -> None:
    """One SGD step without momentum in place."""
    p.sub_(c.lr * (grad + c.l2 * p))


def update_(
    rule: Callable[..., None],
    p: Tensor,
    stored: Sequence[State],
    grad: Tensor,
    c: NamedTuple,
    seed: int | Tensor = 0,
    first: int = 0,
    skip: Tensor | None = None,
) -> None:
    """`rule(p, *states, grad, c)` in place, computed in the dtype of `grad`, with states stored as in
    `hyperfast.states`: plain, bfloat16 or 8 bits. The first state is signed, the second is not. Elements
    count from `first`, for their rounding. skip: nonzero leaves everything as it is."""
    written = [p, *(t for state in stored for t in (state if isinstance(state, EightBit) else (state,)))]
    before = [t.clone() for t in written] if skip is not None else []
    is_plain = len(stored) == 0 or states.storage_of(stored[0], p.dtype) == "plain"
    values = [states.decode(state, signed=i == 0).to(grad.dtype) for i, state in enumerate(stored)]
    new = p.to(grad.dtype)
    rule(new, *values, grad, c)
    random = None if is_plain else states.random_bits(seed, first, p.shape, p.device)
    p.copy_(new)
    for i, (state, value) in enumerate(zip(stored, values, strict=True)):
        if is_plain:
            state.copy_(value)
        else:
            states.encode_(state, value, i == 0, random)
    for tensor, unchanged in zip(written, before, strict=False):
        tensor.copy_(torch.where(skip != 0, unchanged, tensor))


def _row(kind: type, coefficients: Sequence[NamedTuple | None] | Tensor, i: int) -> NamedTuple | None:
    """Coefficients of layer i, of numbers or of tensors without dimensions."""
    return kind(*coefficients[i].unbind()) if isinstance(coefficients, Tensor) else coefficients[i]


def wide(t: Tensor) -> Tensor:
    """In the dtype that kernels compute in."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


@torch.no_grad()
def adamw_generate(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    biases: Sequence[Tensor],
    bias_exp_avgs: Sequence[State | None],
    bias_exp_avg_sqs: Sequence[State | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[AdamWCoefficients] | Tensor,
    bias_coefficients: Sequence[AdamWCoefficients] | Tensor,
    grad_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """AdamW or Adam on weight [N, K] with the gradient dw outer z and on bias [N] with dw, then the next
    weights [N] from `new_zs`.

    In place: weights, biases, their moments, `next_weights`. A bias whose moments are None is added but not
    trained. `zs` [K] are the embeddings the gradient was taken at, `new_zs` [K] those after their own update.
    Every dw is first multiplied by `grad_scale`. Moments are stored like their weight or, beside float32, in
    bfloat16 or 8 bits, rounded at random by `seeds`, one for each layer; half precision is computed in
    float32. Numbers may be tensors: coefficients float64 [L, fields], grad_scale of no dimensions, seeds
    int64 [L]. skip: a tensor of no dimensions; nonzero changes nothing but `next_weights`.
    """
    for i, (weight, bias, dw) in enumerate(zip(weights, biases, dws, strict=True)):
        g, seed = wide(dw) * grad_scale, 0 if seeds is None else seeds[i]
        grad, c = torch.outer(g, wide(zs[i])), _row(AdamWCoefficients, coefficients, i)
        update_(adamw_, weight, (exp_avgs[i], exp_avg_sqs[i]), grad, c, seed, 0, skip)
        m, v = bias_exp_avgs[i], bias_exp_avg_sqs[i]
        if m is not None and v is not None:
            c = _row(AdamWCoefficients, bias_coefficients, i)
            update_(adamw_, bias, (m, v), g, c, seed, weight.numel(), skip)
        next_weights[i].copy_(F.linear(new_zs[i], weight, bias))


@torch.no_grad()
def sgd_generate(
    weights: Sequence[Tensor],
    momentum_buffers: Sequence[State | None],
    biases: Sequence[Tensor],
    bias_momentum_buffers: Sequence[State | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[SGDCoefficients] | Tensor,
    bias_coefficients: Sequence[SGDCoefficients | None] | Tensor,
    grad_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    skip: Tensor | None = None,
    bias_is_trained: Sequence[bool] | None = None,
) -> None:
    """SGD as `adamw_generate` does AdamW. momentum_buffers: all None without momentum. A bias whose
    coefficients are None, or for which bias_is_trained is False, is added but not trained."""
    for i, (weight, bias, dw) in enumerate(zip(weights, biases, dws, strict=True)):
        g, seed = wide(dw) * grad_scale, 0 if seeds is None else seeds[i]
        row, bias_row = (_row(SGDCoefficients, c, i) for c in (coefficients, bias_coefficients))
        bias_row = bias_row if bias_is_trained is None or bias_is_trained[i] else None
        for p, buffer, grad, c, first in (
            (weight, momentum_buffers[i], torch.outer(g, wide(zs[i])), row, 0),
            (bias, bias_momentum_buffers[i], g, bias_row, weight.numel()),
        ):
            if c is not None:
                stored = () if buffer is None else (buffer,)
                update_(sgd_ if stored else plain_sgd_, p, stored, grad, c, seed, first, skip)
        next_weights[i].copy_(F.linear(new_zs[i], weight, bias))


def batch_norm_relu_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 2,
    residual: Tensor | None = None,
) -> Tensor:
    """max over windows of `pool` x `pool` of max(0, batch norm of x, plus residual): x [B, C, H, W] ->
    [B, C, H // pool, W // pool].

    The arguments before `pool` are those of `torch.nn.functional.batch_norm`; running statistics are updated
    in place in training. The maximum is taken before the ReLU: the same values and gradients, fewer ReLUs.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(F.max_pool2d(y, pool) if pool > 1 else y)


def batch_norm_relu_max_pool_backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, C, H, W], dweight [C] and dbias [C] of `batch_norm_relu_max_pool`.

    index: the winner of each window as its place in the window, row by row, or pool^2 where ReLU is off,
    uint8 like dy. statistics: mean and biased variance [2, C] where they do not depend on x; None: those of
    x. With g = dy at the winners, xhat = (x - mean) / sqrt(var + eps) and n = B H W: dbias = sum g, dweight =
    sum g xhat, dx = weight / sqrt(var + eps) (g - dbias / n - xhat dweight / n) (Ioffe and Szegedy, 2015),
    without the last two terms where statistics are given.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    places = torch.arange(pool * pool, dtype=torch.uint8, device=x.device).view(pool, pool)
    g = torch.where(index[..., None, None] == places, dy.to(dtype)[..., None, None], 0)
    B, C, rows, columns = index.shape
    g = g.transpose(3, 4).reshape(B, C, rows * pool, columns * pool)
    g = F.pad(g, (0, x.shape[3] - columns * pool, 0, x.shape[2] - rows * pool))
    if statistics is None:
        var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
    else:
        mean, var = statistics.to(dtype)
    inverse = (var + eps).rsqrt().view(-1, 1, 1)
    xhat = (x.to(dtype) - mean.view(-1, 1, 1)) * inverse
    dweight, dbias = (g * xhat).sum((0, 2, 3)), g.sum((0, 2, 3))
    if statistics is None:
        n = x.numel() // C
        g = g - dbias.view(-1, 1, 1) / n - xhat * dweight.view(-1, 1, 1) / n
    dx = g * inverse if weight is None else g * inverse * weight.to(dtype).view(-1, 1, 1)
    return dx.to(x.dtype), dweight, dbias


class Norms(NamedTuple):
    """Scales and offsets of the layer normalisations of an LSTM of n units: of its four gates [4n] and of its
    cell state [n]."""

    gates_weight: Tensor
    gates_bias: Tensor
    cell_weight: Tensor
    cell_bias: Tensor


class HyperCell(NamedTuple):
    """What modulates the rows of an LSTM of H units: the hyper LSTM of M units and the two linear maps from
    its output to the scales and offsets of the 4 H gates, by embeddings of Z numbers.

    weight_ih [4M, I + H]: what multiplies its input, x and after it h. weight_hh [4M, M], bias [4M]: as of
    any LSTM. z_weight [12Z, M], z_bias [12Z]: embeddings of three places (input path, recurrent path, bias),
    each for four gates (i, f, g, o). d_weight [12, H, Z]: from embedding to scale or offset, in the same
    order. norms: of the hyper LSTM, or None.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    z_weight: Tensor
    z_bias: Tensor
    d_weight: Tensor
    norms: Norms | None


class LSTMState(NamedTuple):
    """h [B, H] and c [B, H] of an LSTM; hyper_h and hyper_c [B, M] of its hyper LSTM, None without one."""

    h: Tensor
    c: Tensor
    hyper_h: Tensor | None = None
    hyper_c: Tensor | None = None


def map_state(state: LSTMState, change: Callable[[Tensor], Tensor]) -> LSTMState:
    """`change` of each tensor that `state` has."""
    return LSTMState(*(None if s is None else change(s) for s in state))


def philox(key: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    """Uniform integers below 2^32, int64 [len(rows), columns]: the first word of Philox 4x32-10 (Salmon,
    Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with counter (column, row,
    stream, 0) and the low and high half of `key`, int64 [1]."""
    low = 0xFFFFFFFF
    c0 = torch.arange(columns, device=rows.device).expand(len(rows), columns)
    c1 = (rows.long() & low)[:, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = key & low, key >> 32 & low

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # high and low half of 32 x 32 bits
        middle = (a >> 16) * b + ((a & 0xFFFF) * b >> 16)
        return middle >> 16, (a * b) & low

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high2, low2 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def dropout_scale(key: Tensor, rows: Tensor, columns: int, stream: int, dropout: float) -> Tensor:
    """What recurrent dropout multiplies by, 0 or 1 / (1 - dropout), float64 [len(rows), columns]: an element
    stays where its `philox` is at least dropout 2^32."""
    kept = philox(key, rows, columns, stream) >= int(dropout * 2**32)
    return kept.double() / (1 - dropout)


def _step_scale(key: Tensor | None, rows: Tensor, like: Tensor, stream: int, dropout: float) -> Tensor | None:
    """`dropout_scale` of a step's rows in `like`'s columns and dtype; None without dropout."""
    return dropout_scale(key, rows, like.shape[1], stream, dropout).to(like.dtype) if dropout else None


def modulation(z: Tensor, d_weight: Tensor) -> tuple[Tensor, ...]:
    """The scales d_x and d_h and offsets d_b [B, 4H] by the embeddings z [B, 12Z] and d_weight [12, H, Z]."""
    d = torch.einsum("bpz,phz->bph", z.unflatten(1, (12, -1)), d_weight)
    return d.unflatten(1, (3, 4)).flatten(2).unbind(1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each of x [B, ..., n] over its last dimension."""
    return F.layer_norm(x, x.shape[-1:], None, None, eps) * weight.view(x.shape[1:]) + bias.view(x.shape[1:])


def _lstm_step(
    gates: Tensor, c: Tensor, norms: Norms | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """h and c [B, n] from the gates before activation [B, 4n] and the last c; scale: `dropout_scale`."""
    gates = gates.view(len(gates), 4, -1)
    if norms is not None:
        gates = _layer_norm(gates, norms.gates_weight, norms.gates_bias, eps)
    i, f, g, o = gates.unbind(1)
    g = g.tanh() if scale is None else g.tanh() * scale
    c = f.sigmoid() * c + i.sigmoid() * g
    read = c if norms is None else _layer_norm(c, norms.cell_weight, norms.cell_bias, eps)
    return o.sigmoid() * read.tanh(), c


def lstm_step(
    x_gates: Tensor,
    hyper_x_gates: Tensor | None,
    state: LSTMState,
    weight_hh: Tensor,
    bias: Tensor,
    norms: Norms | None,
    hyper: HyperCell | None,
    rows: Tensor,
    key: Tensor | None,
    dropout: float,
    eps: float,
) -> LSTMState:
    """One time step of `lstm_steps`: x_gates [B, 4H], hyper_x_gates [B, 4M], rows [B]: the numbers of these
    rows among all N."""
    scale = _step_scale(key, rows, state.c, 0, dropout)
    h_gates = state.h @ weight_hh.mT
    if hyper is None:
        gates = x_gates + h_gates + bias
        return LSTMState(*_lstm_step(gates, state.c, norms, scale, eps))
    gates = hyper_x_gates + state.h @ _weight_xh(hyper, state.h).mT + state.hyper_h @ hyper.weight_hh.mT
    hyper_scale = _step_scale(key, rows, state.hyper_c, 1, dropout)
    hyper_h, hyper_c = _lstm_step(gates, state.hyper_c, hyper.norms, hyper_scale, eps)
    d_x, d_h, d_b = modulation(F.linear(hyper_h, hyper.z_weight, hyper.z_bias), hyper.d_weight)
    gates = d_x * x_gates + d_h * h_gates + d_b + bias
    return LSTMState(*_lstm_step(gates, state.c, norms, scale, eps), hyper_h, hyper_c)


def _weight_xh(hyper: HyperCell, h: Tensor) -> Tensor:
    """What multiplies h in the hyper LSTM [4M, H]."""
    return hyper.weight_ih[:, -h.shape[1] :]


def lstm_steps(
    x_gates: Tensor,
    hyper_x_gates: Tensor | None,
    state: LSTMState,
    weight_hh: Tensor,
    bias: Tensor,
    norms: Norms | None = None,
    hyper: HyperCell | None = None,
    batch_sizes: Tensor | None = None,
    key: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, LSTMState]:
    """`lstm` from the input's part of the gates on: x_gates [N, 4H] = x weight_ih^T, hyper_x_gates [N, 4M]
    the same for the hyper LSTM, its bias included (that of `hyper` is not read, and of its weight_ih the last
    H columns)."""
    N, B = len(x_gates), len(state.h)
    sizes = [B] * (N // B if B else 0) if batch_sizes is None else batch_sizes.tolist()
    outputs, ended, start = [], [], 0
    for size in sizes:
        if size < len(state.h):
            ended.append(map_state(state, lambda s, size=size: s[size:]))
            state = map_state(state, lambda s, size=size: s[:size])
        now = slice(start, start + size)
        rows = torch.arange(start, start + size, device=x_gates.device)
        hyper_x = None if hyper is None else hyper_x_gates[now]
        state = lstm_step(
            x_gates[now], hyper_x, state, weight_hh, bias, norms, hyper, rows, key, dropout, eps
        )
        outputs.append(state.h)
        start += size
    parts = zip(state, *reversed(ended), strict=True)
    last = LSTMState(*(None if own[0] is None else torch.cat(own) for own in parts))
    return torch.cat(outputs) if outputs else x_gates.new_empty(0, state.h.shape[1]), last


def lstm(
    x: Tensor,
    state: LSTMState,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    norms: Norms | None = None,
    hyper: HyperCell | None = None,
    batch_sizes: Tensor | None = None,
    key: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, LSTMState]:
    """One layer of an LSTM, or HyperLSTM, over a sequence: h of every step [N, H] and the last state.

    x [N, I]; weight_ih [4H, I], weight_hh [4H, H], bias [4H], gates in the order i, f, g, o. Rows are in the
    order of `PackedSequence.data`, step by step; batch_sizes int64 [T], on the CPU, counts them, falling;
    None: every step has B. The last state of a sequence is that of its own last step.

        gates = d_x * (weight_ih x) + d_h * (weight_hh h) + d_b + bias (without hyper: d_x = d_h = 1, d_b = 0)
        i, f, g, o = layer norm of each (where there are norms)
        c = sigmoid(f) c + sigmoid(i) dropout(tanh(g)),    h = sigmoid(o) tanh(layer norm of c)

    with d_x, d_h, d_b from the hyper LSTM, which reads x and h and is an LSTM of this kind itself (Ha, Dai
    and Le, "HyperNetworks", ICLR 2017, section 3.3 and appendix A.2; recurrent dropout of Semeniuta, Severyn
    and Barth, 2016, on the candidates alone, with a mask for every step). dropout: the share dropped, by
    `key` (`dropout_scale`, stream 0, the hyper LSTM 1).
    """
    hyper_x_gates = None
    if hyper is not None:
        hyper_x_gates = F.linear(x, hyper.weight_ih[:, : x.shape[1]], hyper.bias)
    weights = weight_hh, bias, norms, hyper
    return lstm_steps(F.linear(x, weight_ih), hyper_x_gates, state, *weights, batch_sizes, key, dropout, eps)


class LSTMGradients(NamedTuple):
    """What `lstm_backward` gives, of the quantity each is named after: x_gates and h_gates [N, 4H] (the same
    without hyper), hyper_gates [N, 4M], z [N, 12Z], state (the first one), bias [4H], d_weight [12, H, Z],
    norms and hyper_norms; None for what there is not."""

    x_gates: Tensor
    h_gates: Tensor
    hyper_gates: Tensor | None
    z: Tensor | None
    state: LSTMState
    bias: Tensor
    d_weight: Tensor | None
    norms: Norms | None
    hyper_norms: Norms | None


def _zeros(norms: Norms | None) -> Norms | None:
    return None if norms is None else Norms(*map(torch.zeros_like, norms))


def _add(totals: Norms | None, parts: Norms | None) -> None:
    for total, part in zip(totals or (), parts or (), strict=True):
        total.add_(part)


def _layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of `_layer_norm`, from x before it."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    inverse = (var + eps).rsqrt()
    xhat, g = (x - mean) * inverse, dy * weight.view(x.shape[1:])
    dx = inverse * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, (dy * xhat).sum(0).flatten(), dy.sum(0).flatten()


def _cell_backward(
    gates: Tensor,
    c_before: Tensor,
    c: Tensor,
    norms: Norms | None,
    scale: Tensor | None,
    eps: float,
    dh: Tensor,
    dc: Tensor,
) -> tuple[Tensor, Tensor, Norms | None]:
    """dgates [B, 4n] before normalisation, dc of the step before [B, n] and the norms' gradients, of
    `_lstm_step`; c: what it gave."""
    before = gates = gates.view(len(gates), 4, -1)
    read = c
    if norms is not None:
        gates = _layer_norm(gates, norms.gates_weight, norms.gates_bias, eps)
        read = _layer_norm(c, norms.cell_weight, norms.cell_bias, eps)
    i, f, o = gates[:, 0].sigmoid(), gates[:, 1].sigmoid(), gates[:, 3].sigmoid()
    g, read = gates[:, 2].tanh(), read.tanh()
    scale = 1 if scale is None else scale
    dread = dh * o * (1 - read * read)
    dnorms = None
    if norms is not None:
        dread, *dcell = _layer_norm_backward(dread, c, norms.cell_weight, eps)
    dc = dc + dread
    di, df = dc * g * scale * i * (1 - i), dc * c_before * f * (1 - f)
    dg, do = dc * i * scale * (1 - g * g), dh * read * o * (1 - o)
    dgates = torch.stack((di, df, dg, do), 1)
    if norms is not None:
        dgates, *dgates_norm = _layer_norm_backward(dgates, before, norms.gates_weight, eps)
        dnorms = Norms(*dgates_norm, *dcell)
    return dgates.flatten(1), dc * f, dnorms


def _modulation_backward(
    dgates: Tensor, x_gates: Tensor, h_gates: Tensor, z: Tensor, d_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx_gates, dh_gates [B, 4H], dz [B, 12Z] and dd_weight, of gates = d_x * x_gates + d_h * h_gates + d_b
    with the `modulation` by z."""
    d_x, d_h, _ = modulation(z, d_weight)
    dd = torch.cat((x_gates * dgates, h_gates * dgates, dgates), 1).view(len(z), 12, -1)
    dz = torch.einsum("bph,phz->bpz", dd, d_weight).flatten(1)
    dd_weight = torch.einsum("bph,bpz->phz", dd, z.view(len(z), 12, -1))
    return d_x * dgates, d_h * dgates, dz, dd_weight


def lstm_backward(
    batch_sizes: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    norms: Norms | None,
    hyper: HyperCell | None,
    key: Tensor | None,
    dropout: float,
    eps: float,
    x_gates: Tensor,
    c0: Tensor,
    hyper_c0: Tensor | None,
    c: Tensor,
    hyper_c: Tensor | None,
    h_gates: Tensor,
    hyper_gates: Tensor | None,
    z: Tensor | None,
    dh: Tensor,
    dlast: LSTMState,
) -> LSTMGradients:
    """The gradients of `lstm_steps` that need its steps in turn, from the last to the first; those of the
    matrices multiplied with h, hyper_h and x are products over all rows of what this gives.

    batch_sizes to eps as there. From every step: c [N, H], hyper_c [N, M],
    h_gates [N, 4H] = weight_hh h of the step before, hyper_gates [N, 4M] before normalisation, z [N, 12Z] =
    z_weight hyper_h + z_bias. dh [N, H]: gradient of the output; dlast: of the last state of each sequence.

        dc += what h = sigmoid(o) tanh(layer norm of c) gives;  dgates by i, f, g, o and their layer norm
        dx_gates = d_x * dgates,   dh_gates = d_h * dgates,   dd = (x_gates, h_gates, 1) * dgates
        dz = dd d_weight,   dd_weight += dd^T z,   dhyper_h += dz z_weight;  then dhyper_gates likewise
        dh of the step before = dh_gates weight_hh + dhyper_gates weight_xh,  dhyper_h likewise by weight_hh
    """
    dx_gates, dh_gates = torch.empty_like(x_gates), torch.empty_like(h_gates)
    dbias, dnorms = torch.zeros_like(bias), _zeros(norms)
    dstate = map_state(dlast, torch.clone)
    dhyper_gates = dz = dd_weight = dhyper_norms = None
    cs = torch.cat((c0, c))  # of the step before each
    if hyper is not None:
        dhyper_gates, dz, dd_weight = map(torch.zeros_like, (hyper_gates, z, hyper.d_weight))
        dhyper_norms, hyper_cs = _zeros(hyper.norms), torch.cat((hyper_c0, hyper_c))
    sizes, end = batch_sizes.tolist(), len(x_gates)
    for t in reversed(range(len(sizes))):
        size, start = sizes[t], end - sizes[t]
        now, rows = slice(start, end), torch.arange(start, end, device=c.device)
        first = start + len(c0) - sizes[t - 1] if t else 0
        before = slice(first, first + size)
        state = map_state(dstate, lambda s, size=size: s[:size])
        gates, scale = x_gates[now] + h_gates[now] + bias, _step_scale(key, rows, c, 0, dropout)
        if hyper is not None:
            d_x, d_h, d_b = modulation(z[now], hyper.d_weight)
            gates = d_x * x_gates[now] + d_h * h_gates[now] + d_b + bias
        state.h.add_(dh[now])  # of rows that end here it held what dlast says
        dgates, dc, parts = _cell_backward(gates, cs[before], c[now], norms, scale, eps, state.h, state.c)
        dbias += dgates.sum(0)
        _add(dnorms, parts)
        state.c.copy_(dc)
        dx_gates[now] = dh_gates[now] = dgates
        dh_by_hyper = 0
        if hyper is not None:
            parts = _modulation_backward(dgates, x_gates[now], h_gates[now], z[now], hyper.d_weight)
            dx_gates[now], dh_gates[now], dz[now], part = parts
            dd_weight += part
            state.hyper_h.add_(dz[now] @ hyper.z_weight)
            gates, scale = hyper_gates[now], _step_scale(key, rows, hyper_c, 1, dropout)
            dgates, dc, parts = _cell_backward(
                gates, hyper_cs[before], hyper_c[now], hyper.norms, scale, eps, state.hyper_h, state.hyper_c
            )
            _add(dhyper_norms, parts)
            dhyper_gates[now] = dgates
            state.hyper_h.copy_(dgates @ hyper.weight_hh)
            state.hyper_c.copy_(dc)
            dh_by_hyper = dgates @ _weight_xh(hyper, state.h)
        state.h.copy_(dh_gates[now] @ weight_hh + dh_by_hyper)
        end = start
    return LSTMGradients(dx_gates, dh_gates, dhyper_gates, dz, dstate, dbias, dd_weight, dnorms, dhyper_norms)
