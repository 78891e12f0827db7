"""The ways to do a training step of `full` on a GPU: forward, backward, clipping at norm 1, AdamW.

All start from the same weights and see the same batch; dropout is 0, so that all compute the same. Plain ones
know nothing of hyperfast; under autocast they generate in float32, as ours do: to cast a whole generator to
bfloat16 moves more than it saves. Whole steps in a CUDA graph are captured by what the training command uses
(`train.graph`), ours and PyTorch's alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from benchmarks.plain import SHAPES, PlainHyperNet
from benchmarks.ways import BATCH, RECIPE
from hyperfast import reference
from hyperfast.reference import AdamWCoefficients
from train.models import build_model

Step = Callable[[Tensor, Tensor], Tensor]  # images, labels -> loss; leaves no gradient behind
CLIP = 1.0


@dataclass(frozen=True)
class Way:
    """plain: PyTorch alone. as_written: float32, contiguous, the default AdamW; otherwise bfloat16 autocast,
    channels_last, the fused one. graph: the step is one CUDA graph. compile_mode: torch.compile's. alone:
    prepared when the others are ready, since it times kernels to choose among them."""

    label: str
    plain: bool = True
    as_written: bool = False
    graph: bool = True
    compile_mode: str = ""
    state_dtype: torch.dtype | str | None = None
    alone: bool = False


def _ours(label: str, **options) -> Way:
    return Way(label, plain=False, **options)


WAYS = {
    "eager": Way("PyTorch as users write it: float32 with TF32, default AdamW", as_written=True, graph=False),
    "fused": Way("bfloat16 autocast (generation in float32), channels_last, fused AdamW", graph=False),
    "graph": Way("the same in a CUDA graph"),
    "compiled": Way("the same, torch.compile, CUDA graph", compile_mode="default"),
    "autotuned": Way(
        "the same, torch.compile max-autotune, CUDA graph",
        compile_mode="max-autotune-no-cudagraphs",
        alone=True,
    ),
    "factored_reference": _ours(
        "torch.compile of our factored reference, CUDA graph", compile_mode="default"
    ),
    "hyperfast": _ours("hyperfast"),
    "hyperfast_compiled": _ours("hyperfast under torch.compile", compile_mode="default"),
    "hyperfast_bf16": _ours("hyperfast, bfloat16 states (different mathematics)", state_dtype=torch.bfloat16),
    "hyperfast_8bit": _ours("hyperfast, 8-bit states (different mathematics)", state_dtype="8bit"),
    "hyperfast_no_graph": _ours("hyperfast without a CUDA graph", graph=False),
}


@dataclass(frozen=True)
class Sizes:
    """Of the problem, smaller for tests; torch.compile's backend, "" to compile nothing."""

    batch: int = BATCH
    z_dim: int = 16
    compiler: str = "inductor"


def batches(name: str, device: torch.device, sizes: Sizes, count: int) -> list[tuple[Tensor, Tensor]]:
    """Images [B, 3, 32, 32] and labels, the same for all ways, the images in the way's layout."""
    torch.manual_seed(1)
    made = [(torch.randn(sizes.batch, 3, 32, 32), torch.randint(100, (sizes.batch,))) for _ in range(count)]
    return [(x.to(device, memory_format=_layout(WAYS[name])), y.to(device)) for x, y in made]


def build(name: str, device: torch.device, sizes: Sizes) -> tuple[nn.Module, Step]:
    """The network, without dropout, and its step."""
    way = WAYS[name]
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    plain = FloatGeneration(sizes.z_dim)
    plain.dropout.p = 0.0
    if name == "factored_reference":
        return _factored_reference(plain, way, device, sizes)
    if way.plain:
        model = plain.to(device, memory_format=_layout(way))
        optimizer = _stock_adamw(list(model.parameters()), way)
    else:
        model = build_model("full", fused=True, z_dim=sizes.z_dim)
        model.load_state_dict(plain.state_dict())
        model.dropout.p = 0.0
        model = model.to(device, memory_format=torch.channels_last)
        capturable = {"capturable": True, "nonfinite": "skip"} if way.graph else {}
        optimizer = hyperfast.optim.AdamW(
            model, **RECIPE, max_grad_norm=CLIP, state_dtype=way.state_dtype, **capturable
        )
    forward = _compiled(model, way, sizes)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = _loss(forward, x, y, way)
        loss.backward()
        if way.plain:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def _layout(way: Way) -> torch.memory_format:
    return torch.contiguous_format if way.as_written else torch.channels_last


def _compiled(function: Callable, way: Way, sizes: Sizes) -> Callable:
    if not (way.compile_mode and sizes.compiler):
        return function
    mode = {"mode": way.compile_mode} if sizes.compiler == "inductor" else {}
    return torch.compile(function, fullgraph=True, dynamic=False, backend=sizes.compiler, **mode)


def _stock_adamw(parameters: list[Tensor], way: Way) -> torch.optim.Optimizer:
    fused = {} if way.as_written else {"fused": True}
    return torch.optim.AdamW(parameters, **RECIPE, **fused, **({"capturable": True} if way.graph else {}))


def _loss(forward: Callable, x: Tensor, y: Tensor, way: Way) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=not way.as_written):
        logits = forward(x)
    return F.cross_entropy(logits.float(), y)


def choose_algorithms(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward and backward without an update, in which cuDNN times its algorithms for the shapes of the step:
    nothing else should be timed meanwhile."""
    _loss(model, x, y, WAYS[name]).backward()
    model.zero_grad()


class FloatGeneration(PlainHyperNet):
    """Generates in float32, also under autocast."""

    def generate(self, name: str) -> Tensor:
        with torch.autocast(self.get_parameter(f"{name}_bias").device.type, enabled=False):
            return super().generate(name)


class _GivenWeights(PlainHyperNet):
    """Uses `given`, name -> generated weights [N], instead of generating."""

    given: dict[str, Tensor]

    def generate(self, name: str) -> Tensor:
        return self.given[name].view(SHAPES[name])

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for w in self.given.values():
            w.grad = None


def _factored_reference(
    plain: PlainHyperNet, way: Way, device: torch.device, sizes: Sizes
) -> tuple[nn.Module, Step]:
    """What the compiler makes of our mathematics: generated weights are leaves, dw is their gradient, and
    `hyperfast.reference` does the rest."""
    model = _GivenWeights(sizes.z_dim)
    model.dropout.p = 0.0
    model.load_state_dict(plain.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    layers = [model.get_submodule(f"hyper_{name}") for name in SHAPES]
    weights, biases = ([getattr(layer, part).data for layer in layers] for part in ("weight", "bias"))
    zs = [model.get_parameter(f"z_signal_{name}") for name in SHAPES]
    flat_zs = [z.data.view(-1) for z in zs]
    moments = [[torch.zeros_like(t) for t in ts] for ts in (weights, weights, biases, biases)]
    ws = [w.requires_grad_() for w in reference.generate(weights, biases, flat_zs)]
    model.given = dict(zip(SHAPES, ws, strict=True))
    generators = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in generators]
    optimizer = _stock_adamw(rest, way)
    steps = torch.zeros((), dtype=torch.float64, device=device)
    forward, first = _compiled(model, way, sizes), _compiled(_gradients, way, sizes)
    update = _compiled(_updated, way, sizes)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = _loss(forward, x, y, way)
        loss.backward()
        with torch.no_grad():
            dws = [w.grad for w in ws]
            others = [p.grad for p in rest if p.grad is not None]
            dzs, scale = first(weights, dws, flat_zs, others)
            for z, dz in zip(zs, dzs, strict=True):
                z.grad = dz.view_as(z)
            torch._foreach_mul_([p.grad for p in rest], scale)
            old_zs = torch._foreach_add(flat_zs, 0.0)
            optimizer.step()
            update(weights, *moments[:2], biases, *moments[2:], dws, old_zs, flat_zs, ws, scale, steps)
        model.zero_grad()
        return loss.detach()

    return model, step


def _gradients(weights, dws, zs, others) -> tuple[list[Tensor], Tensor]:
    """dz, and what clips the norm of all gradients to CLIP."""
    dzs, squared = reference.generate_backward(weights, dws)
    z_squared = torch.stack([z.square().sum() for z in zs])
    rest = torch.stack([t.square().sum() for t in (*dzs, *others)])
    norm = ((squared * (1 + z_squared)).sum() + rest.sum()).sqrt()
    return dzs, (CLIP / (norm + 1e-6)).clamp(max=1.0).float()


def _updated(weights, m, v, biases, bias_m, bias_v, dws, zs, new_zs, ws, scale, steps) -> None:
    """AdamW on dw outer z, and the weights of the next forward."""
    steps.add_(1)
    lr, (beta1, beta2), decay = RECIPE["lr"], RECIPE["betas"], RECIPE["weight_decay"]
    one = torch.ones_like(steps)
    row = AdamWCoefficients(
        one * (1 - lr * decay), lr / (1 - beta1**steps), one * beta1, one * beta2, (1 - beta2**steps).sqrt(),
        one * RECIPE["eps"], one * 0.0,
    )  # fmt: skip
    rows = torch.stack(row).expand(len(weights), -1)
    reference.adamw_generate(
        weights, m, v, biases, bias_m, bias_v, dws, zs, new_zs, ws, rows, rows, scale, None
    )
