"""Layers, optimizer and gradient clipping as cases, beside what they stand in for in torch.

They end as their twin in torch does: equal within rounding, or with an error of the same type; where
hyperfast knows better, ValueError or TypeError."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator
from tests.fuzz.harness import Draw, Output, assert_right
from tests.fuzz.mutations import LAYOUTS, VALUES, fault, plain

Arguments = dict[str, Any]


def end_of(f: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return f(), None
    except Exception as error:
        return None, error


def assert_allowed(ours: Exception, theirs: Exception | None, valid: bool) -> None:
    """AssertionError unless `ours` is an error one may raise here."""
    assert not valid or theirs is not None, f"valid arguments were refused: {type(ours).__name__}: {ours}"
    expected = isinstance(ours, (ValueError, TypeError)) or type(ours) is type(theirs)
    assert expected, f"{type(ours).__name__}: {ours} (torch: {theirs!r})"


# ---- layers

LAYER_VALUES = (*(v for v in VALUES if not isinstance(v, int | Tensor)), -3, 0, 1, 3, "same", torch.int32)


def draw_common(draw: Draw) -> Arguments:
    return {
        "bias": draw.chance(0.7),
        "dtype": draw.choice((None, torch.float32, torch.float64, torch.float64, torch.bfloat16)),
        "z_dim": draw.choice((1, 3, 4, 16, 17, 33, 513)),
        "init": draw.choice((None, "report", "hyperfan", "he_bias")),
        "backend": draw.choice(("auto", "auto", "reference")),
    }


def draw_linear(draw: Draw) -> tuple[Arguments, tuple[int, ...]]:
    inputs, outputs = draw.choice((1, 2, 3, 17, 64)), draw.choice((1, 2, 5, 33))
    rows = [draw.choice((0, 1, 2, 3, 17)) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
    return {"in_features": inputs, "out_features": outputs} | draw_common(draw), (*rows, inputs)


def draw_conv2d(draw: Draw) -> tuple[Arguments, tuple[int, ...]]:
    groups, size = draw.choice((1, 1, 2, 3)), (draw.choice((1, 2, 3)), draw.choice((1, 3, 5)))
    arguments = {
        "in_channels": groups * draw.choice((1, 2, 5)),
        "out_channels": groups * draw.choice((1, 3, 4)),
        "kernel_size": draw.choice((size[0], size)),
        "groups": groups,
        "dilation": draw.choice((1, 2, (1, 2))),
        "padding": draw.choice((0, 1, (0, 2), "valid", "same")),
    }
    if arguments["padding"] != "same":
        arguments["stride"] = draw.choice((1, 2, (2, 1)))
    image = [draw.choice((5, 8, 9, 11)), draw.choice((9, 12))]
    batch = [draw.choice((0, 1, 2, 3))] if draw.chance(0.9) else []
    return arguments | draw_common(draw), (*batch, arguments["in_channels"], *image)


def layer_case(ours: type, theirs: type, draw_layer: Callable, draw: Draw) -> str:
    """Constructs and calls a layer and its twin in torch, with the same, sometimes faulty, arguments."""
    arguments, shape = draw_layer(draw)
    valid = True
    if draw.chance(0.25):
        valid = False
        arguments[draw.choice([*arguments, "device"])] = draw.choice(LAYER_VALUES)
    layer, error = end_of(lambda: ours(**arguments))
    torchs = {k: v for k, v in arguments.items() if k not in ("z_dim", "init", "backend")}
    twin, twin_error = end_of(lambda: theirs(**torchs))
    if error is not None:
        assert_allowed(error, twin_error, valid)
        return "refused"
    x = draw.normal(*shape, dtype=layer.generator.weight.dtype, scale=1.0)
    if twin_error is not None:  # torch looks at some arguments when it is constructed, we when we are called
        assert isinstance(end_of(lambda: layer(x))[1], (ValueError, TypeError)), (
            f"torch refuses: {twin_error}"
        )
        return "refused"
    if draw.chance(0.5):
        x = LAYOUTS[draw.choice(list(LAYOUTS))](draw, x)
    x = x.as_subclass(Tensor)
    if plain(x) and draw.chance(0.3):
        valid = False
        holder = {"x": x}
        fault(draw, holder)
        x = holder["x"]
        if isinstance(x, Tensor) and (x.layout == torch._mkldnn or x.is_nested):  # nothing to compare
            return "refused"
    return compare_layers(layer, twin, x, valid)


def compare_layers(layer: nn.Module, twin: nn.Module, x: Any, valid: bool) -> str:
    g = layer.generator
    with torch.no_grad():
        twin.weight.copy_(layer.generated_weight())
        if twin.bias is not None:
            twin.bias.copy_(layer.bias.uniform_(-1, 1) if layer.bias.is_floating_point() else layer.bias)
    made, error = end_of(lambda: layer(x))
    expected, twin_error = end_of(lambda: twin(x))
    if error is not None:
        assert_allowed(error, twin_error, valid)
        return "refused"
    assert twin_error is None, f"torch refuses: {twin_error}"
    assert made.shape == expected.shape and made.dtype == expected.dtype and made.device == expected.device
    if not made.is_meta and made.dtype.is_floating_point:
        weight, bias, z = (None if p is None else p.detach().double() for p in (g.weight, g.bias, g.z))
        options = (
            (layer.stride, layer.padding, layer.dilation, layer.groups)
            if x.dim() > 2 and hasattr(layer, "stride")
            else ()
        )
        f = F.conv2d if isinstance(layer, HyperConv2d) else F.linear
        layer_bias = None if layer.bias is None else layer.bias.detach().double()

        def exact(x, weight, bias, z, layer_bias):
            return f(x, F.linear(z, weight, bias).view(g.shapes[0]), layer_bias, *options)

        tensors = [x.detach().double(), weight, bias, z, layer_bias]
        scale = exact(*(None if t is None else t.abs() for t in tensors))
        terms = weight.shape[1] + 2 + g.shapes[0][1:].numel()
        assert_right(Output("y", made, exact(*tensors), scale, terms, made.dtype))
    return "right"


# ---- optimizer and clipping


def draw_model(draw: Draw) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = draw.choice((1, 3, 4))
    for _ in range(draw.choice((1, 2, 3))):
        outputs = draw.choice((1, 2, 5))
        if draw.chance(0.75):
            shape, K = (outputs, width), draw.choice((1, 2, 5, 16, 17))
            generator = LinearGenerator(shape, K, bias=draw.chance(0.7), init="hyperfan", dtype=torch.float64)
            layers.append(
                HyperLinear(width, outputs, draw.chance(0.7), generator=generator, dtype=torch.float64)
            )
        else:
            layers.append(nn.Linear(width, outputs, dtype=torch.float64))
        width = outputs
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw.normal(*p.shape, scale=1.0))
    return model


def models(draw: Draw) -> tuple[nn.Module, nn.Module]:
    """A model, factored or not, and its dense twin."""
    model = draw_model(draw)
    twin = copy.deepcopy(model)
    if draw.chance(0.8):
        hyperfast.factored_(model)
    return model, twin


def backward(draw: Draw, *both: nn.Module) -> None:
    """Gradients of one loss of both models; now and then of a layer left out, or not finite."""
    width = next(p for p in both[1][0].modules() if hasattr(p, "in_features")).in_features
    x, skip = draw.normal(4, width, scale=1.0), draw.chance(0.1)
    special = draw.choice((torch.nan, torch.inf)) if draw.chance(0.1) else 1.0
    for model in both:
        part = model[:1] if skip else model
        (torch.sin(part(x)).square().sum() * special).backward()


def assert_same_parameters(model: nn.Module, twin: nn.Module, rtol: float) -> None:
    ours, theirs = model.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=0.1 * rtol, equal_nan=True, msg=name)


BAD_OPTIONS = (*VALUES, -1.0, (0.9,), (0.9, 1.5), (0.9, "x"), (0.9, 0.99, 0.9))


def draw_options(draw: Draw, name: str) -> Arguments:
    rates = (0.0, 1e-4, 1e-3) if name == "SGD" else (0.0, 1e-3, 0.1)
    options = {"lr": draw.choice(rates), "weight_decay": draw.choice((0.0, 0.01, 1.0))}
    if name == "SGD":
        momentum = draw.choice((0.0, 0.5, 0.9))
        nesterov = momentum > 0 and draw.chance(0.3)
        dampening = 0.0 if nesterov else draw.choice((0.0, 0.5))
        return options | {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    betas = draw.choice(((0.9, 0.999), (0.0, 0.0), (0.5, 0.9)))
    eps = draw.choice((1e-5, 1e-3))  # smaller ones make signs of what only is rounding
    return options | {"betas": betas, "eps": eps}


def optimizer_case(name: str, draw: Draw) -> str:
    """Steps of an optimizer beside those of torch's of the same name, with its clipping, on the dense
    twin."""
    model, twin = models(draw)
    options, own = draw_options(draw, name), {"nonfinite": draw.choice(("raise", "skip"))}
    own["max_grad_norm"] = draw.choice((None, 1e-2, 1.0, 1e9))
    valid = True
    if draw.chance(0.25):
        valid = False
        target = draw.choice((options, own))
        target[draw.choice(list(target))] = draw.choice(BAD_OPTIONS)
    optimizer, error = end_of(lambda: getattr(hyperfast.optim, name)(model, **options, **own))
    torchs, torch_error = end_of(lambda: getattr(torch.optim, name)(twin.parameters(), **options))
    if error is not None:
        assert_allowed(error, torch_error, valid)
        return "refused"
    assert torch_error is None, f"torch refuses: {torch_error}"
    for _ in range(3 if valid else 1):  # any option may make it diverge
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        zero_grads(draw, optimizer, torchs)
        backward(draw, model, twin)
        _, error = end_of(optimizer.step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
        if error is not None or not norm.isfinite():
            if not (isinstance(error, FloatingPointError) and own["nonfinite"] == "raise"):
                assert error is None or not valid, f"{type(error).__name__}: {error}"
                assert error is None or isinstance(error, (ValueError, TypeError)), repr(error)
            after = (model.state_dict(), optimizer.state_dict()["state"])
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
            return "refused"
        if own["max_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(twin.parameters(), own["max_grad_norm"], norm)
        _, torch_error = end_of(torchs.step)
        finite = all(p.isfinite().all() for p in twin.parameters())
        if not valid and (torch_error is not None or not finite):
            return "right"
        assert torch_error is None, f"torch refuses: {torch_error}"
        assert_same_parameters(model, twin, 1e-8 if valid else 1e-5)  # float32 options are not valid
    return "right"


def zero_grads(draw: Draw, *optimizers: torch.optim.Optimizer) -> None:
    set_to_none = draw.chance(0.7)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=set_to_none)


def clip_case(draw: Draw) -> str:
    """hyperfast.optim.clip_grad_norm_ beside torch's on the dense twin."""
    model, twin = models(draw)
    backward(draw, model, twin)
    arguments: Arguments = {
        "max_norm": draw.choice((1e-3, 1.0, 1e9, 0.0, 2)),
        "norm_type": draw.choice((2.0, 1.0, 3, 0.5, float("inf"))),
        "error_if_nonfinite": draw.chance(0.2),
    }
    valid = True
    if draw.chance(0.25):
        valid = False
        arguments[draw.choice(list(arguments))] = draw.choice((*VALUES, -1.0, "inf", "2"))
    expected, torch_error = end_of(lambda: torch.nn.utils.clip_grad_norm_(twin.parameters(), **arguments))
    norm, error = end_of(lambda: hyperfast.optim.clip_grad_norm_(model, **arguments))
    if error is not None:
        assert_allowed(error, torch_error, valid)
        return "refused"
    assert torch_error is None, f"torch refuses: {torch_error}"
    torch.testing.assert_close(norm, expected, rtol=1e-9, atol=0, equal_nan=True, check_dtype=False)
    grads = dense_gradients(model)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12, equal_nan=True)
    return "right"


def dense_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by name, those of factored weights as dw outer z."""
    factors = {
        id(f.weight): f for m in model.modules() if isinstance(m, LinearGenerator) for f in m.factors()
    }
    grads = {}
    for name, p in model.named_parameters():
        f = factors.get(id(p))
        grads[name] = p.grad
        if f is not None and f.bias.grad is not None:
            grads[name] = torch.outer(f.bias.grad, f.z.detach())
    return grads


MODULES: dict[str, Callable[[Draw], str]] = {
    "HyperLinear": lambda draw: layer_case(HyperLinear, nn.Linear, draw_linear, draw),
    "HyperConv2d": lambda draw: layer_case(HyperConv2d, nn.Conv2d, draw_conv2d, draw),
    **{name: functools.partial(optimizer_case, name) for name in ("AdamW", "Adam", "SGD")},
    "clip_grad_norm_": clip_case,
}
