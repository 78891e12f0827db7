"""The ways to do the same step, each run in a process of its own (`benchmarks.workers`).

whole        a training step of `full`: forward, backward, clipping at norm 1, AdamW; batch 64, float32
whole_bf16   the same under bfloat16 autocast
part         what the generators cost in it: generate, backward from given dw, clipping, AdamW
pooled       its five batch norm -> ReLU -> max pool (the fifth without), forward and backward, channels_last
wrn          a training step of the hyper WRN-40-1: forward, backward, Adam; batch 32, float32

eager                as users write it: PlainHyperNet, default AdamW
channels_last        the same in channels_last with fused AdamW
compiled             channels_last under torch.compile (whole: the model; part: generation)
..._tuned            with the allocator of `python -m train.cifar100`: keeps freed memory, asks for huge pages
factored_reference   hyperfast.reference, factored, under torch.compile: the compiler's version of our kernels
hyperfast            factored gradients and fused kernels, channels_last, the tuned allocator
hyperfast_compiled   the same under torch.compile (whole only)
..._untuned          with the allocator as it is
batched              wrn: all kernels in two products, plain PyTorch
loop                 wrn: a kernel for each embedding by itself, as the public code does, default Adam
plain                wrn: the plain twin, all else as hyperfast
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from benchmarks.plain import SHAPES, PlainHyperNet, PlainHyperWideResNet
from train.models import build_model
from train.models.full import CHANNELS
from train.models.wrn import build_wrn

RECIPE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
BATCH = 64
WHOLE = (
    "eager",
    "channels_last",
    "compiled",
    "channels_last_tuned",
    "compiled_tuned",
    "hyperfast",
    "hyperfast_compiled",
)
WHOLE_BF16 = ("eager", "channels_last", "compiled", "channels_last_tuned", "compiled_tuned", "hyperfast")
POOLED = ("eager", "compiled", "hyperfast_untuned", "eager_tuned", "compiled_tuned", "hyperfast")
WRN = ("loop", "loop_channels_last_tuned", "batched_tuned", "batched_compiled_tuned", "plain", "hyperfast")
WRN_BATCH = 32
PART = ("eager", "channels_last", "channels_last_tuned", "compiled_tuned", "factored_reference", "hyperfast")


def tuned_allocator(way: str) -> bool:
    """Whether `way` runs with an allocator that keeps freed memory and asks for huge pages."""
    return way.endswith("_tuned") or way in ("hyperfast", "hyperfast_compiled", "factored_reference", "plain")


def _plain() -> PlainHyperNet:
    torch.manual_seed(0)
    return PlainHyperNet()


def _fused() -> nn.Module:
    model = build_model("full", fused=True)
    model.load_state_dict(_plain().state_dict())
    return model


def _stock_adamw(model: nn.Module, way: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **RECIPE, fused=None if way == "eager" else True)


def whole(way: str, bf16: bool = False) -> Callable[[], Tensor]:
    """A function that does one training step, under bfloat16 autocast or in float32, and returns the loss."""
    fused = way.startswith("hyperfast")
    model = _fused() if fused else _plain()
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))
    if way != "eager":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = (
        hyperfast.optim.AdamW(model, **RECIPE, max_grad_norm=1.0) if fused else _stock_adamw(model, way)
    )
    forward = model
    if "compiled" in way:
        torch._inductor.config.fallback_random = (
            True  # the same dropout masks as eager, to compare the losses
        )
        forward = torch.compile(model)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        if not fused:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def whole_bf16(way: str) -> Callable[[], Tensor]:
    return whole(way, bf16=True)


def _given_dws() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(math.prod(shape)) * 1e-3 for shape in SHAPES.values()]


def part(way: str) -> Callable[[], Tensor]:
    """A function that does the generators' share of a step and returns the sum of the generated weights."""
    if way == "factored_reference":
        return _part_factored_reference()
    dws = _given_dws()
    if way == "hyperfast":
        layers = [layer for _, layer in hyperfast.nn.hyper_layers(_fused())]
        generators = nn.ModuleList(layer.generator for layer in layers)
        optimizer = hyperfast.optim.AdamW(generators, **RECIPE, max_grad_norm=1.0)

        def generate() -> list[Tensor]:
            return [w.view(-1) for (w,) in hyperfast.nn.generate_together(generators)]
    else:
        model = _plain()
        generators = nn.ParameterList(
            p for n, p in model.named_parameters() if n.startswith(("z_signal", "hyper"))
        )
        optimizer = _stock_adamw(generators, way)

        def generate() -> list[Tensor]:
            return [model.generate(name).view(-1) for name in SHAPES]

        if "compiled" in way:
            generate = torch.compile(generate)

    def step() -> Tensor:
        optimizer.zero_grad()
        ws = generate()
        torch.autograd.backward(ws, dws)
        if way != "hyperfast":
            nn.utils.clip_grad_norm_(generators.parameters(), 1.0)
        optimizer.step()
        return sum(w.detach().sum() for w in ws)

    return step


def _part_factored_reference() -> Callable[[], Tensor]:
    """dz, norm in closed form, AdamW on dw outer z and next weights: hyperfast.reference compiled."""
    dws = _given_dws()
    generators = [g for _, g in hyperfast.nn.named_generators(_fused())]
    weights, biases, zs = ([getattr(g, name).data for g in generators] for name in ("weight", "bias", "z"))
    moments = [
        [torch.zeros_like(t) for t in tensors] for tensors in (weights, weights, biases, biases, zs, zs)
    ]
    next_weights = hyperfast.reference.generate(weights, biases, zs)
    backward = torch.compile(hyperfast.reference.generate_backward)
    update = torch.compile(hyperfast.reference.adamw_generate)
    step_tensor = torch.tensor(0.0)
    rows = hyperfast.ops.AdamWCoefficients

    def step() -> Tensor:
        ws = [w.clone() for w in next_weights]
        dzs, squared = backward(weights, dws)
        z_squared = torch.stack([z.square().sum() for z in zs])
        norm = float(
            (squared * (1 + z_squared) + torch.stack([dz.square().sum() for dz in dzs])).sum().sqrt()
        )
        scale = min(1.0, 1.0 / (norm + 1e-6))
        step_tensor.add_(1)
        t = float(step_tensor)
        # the coefficients change every step: as tensors, so that the compiler does not specialise on them
        c = rows(
            *(
                torch.tensor(v)
                for v in (1 - 1e-3 * 1e-4, 1e-3 / (1 - 0.9**t), 0.9, 0.999, math.sqrt(1 - 0.999**t), 1e-8)
            )
        )
        new_zs = [z.clone() for z in zs]
        for z, m, v, dz in zip(new_zs, moments[4], moments[5], dzs, strict=True):
            hyperfast.reference.adamw_(z, m, v, dz * scale, rows(*(float(x) for x in c)))
        coefficients = [c] * len(weights)
        update(weights, moments[0], moments[1], biases, moments[2], moments[3], dws, zs, new_zs, next_weights,
               coefficients, coefficients, torch.tensor(scale))  # fmt: skip
        for z, new in zip(zs, new_zs, strict=True):
            z.copy_(new)
        return sum(w.sum() for w in ws)

    return step


def pooled_layers(way: str) -> list[nn.Module]:
    """Batch norm, ReLU and pool after each conv of `full`."""
    layers: list[nn.Module] = []
    for i, channels in enumerate(CHANNELS[1:]):
        pool = 2 if i < 4 else 1
        if way.startswith("hyperfast"):
            layers.append(hyperfast.nn.BatchNormReLUMaxPool2d(channels, pool))
        else:
            layers.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(pool)))
            if pool == 1:
                del layers[-1][2]
    return layers


def pooled_tensors(batch: int = BATCH, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """x and dy of each layer, channels_last; options: device and dtype."""
    torch.manual_seed(3)
    made, size = [], 32
    for i, channels in enumerate(CHANNELS[1:]):
        x, size = torch.randn(batch, channels, size, size, **options), size // (2 if i < 4 else 1)
        made.append((x, torch.randn(batch, channels, size, size, **options)))
    layout = torch.channels_last
    return [(x.to(memory_format=layout).requires_grad_(), dy.to(memory_format=layout)) for x, dy in made]


def pooled_bytes(tensors: list[tuple[Tensor, Tensor]]) -> int:
    """The floor of all layers. Forward: x read twice, y and a byte for each output written. Backward: x, dy
    and the bytes read twice, dx written."""
    return sum(5 * x.nbytes + 3 * (dy.nbytes + dy.numel()) for x, dy in tensors)


def pooled(way: str) -> Callable[[], Tensor]:
    """A function that does all five forward, then backward, and returns the sum of the gradients of the
    weights."""
    layers, tensors = pooled_layers(way), pooled_tensors()
    if "compiled" in way:
        layers = [torch.compile(layer, dynamic=False) for layer in layers]
    parameters = [list(layer.parameters()) for layer in layers]

    def step() -> Tensor:
        made = [layer(x) for layer, (x, _) in zip(layers, tensors, strict=True)]
        total = torch.zeros(())
        for i in reversed(range(len(made))):
            x, dy = tensors[i]
            _, dweight, _ = torch.autograd.grad(made.pop(), [x, *parameters[i]], dy)
            total += dweight.sum()
        return total

    return step


def wrn(way: str) -> Callable[[], Tensor]:
    """A function that does one training step of the hyper WRN-40-1, or its plain twin, and returns the
    loss."""
    torch.manual_seed(0)
    loop = PlainHyperWideResNet()
    if way.startswith("loop"):
        model: nn.Module = loop
    else:
        name = "wrn_40_1" if way == "plain" else "hyper_wrn_40_1"
        model = build_wrn(name, fused=not way.startswith("batched"))
        if way != "plain":
            model.load_state_dict(loop.state_dict())
    torch.manual_seed(1)
    x, y = torch.randn(WRN_BATCH, 3, 32, 32), torch.randint(10, (WRN_BATCH,))
    options = {"lr": 2e-3, "weight_decay": 5e-4}
    if way != "loop":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if way in ("plain", "hyperfast"):
        optimizer = hyperfast.optim.Adam(model, **options, max_grad_norm=100.0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), **options, fused=None if way == "loop" else True)
    forward = torch.compile(model) if "compiled" in way else model

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
