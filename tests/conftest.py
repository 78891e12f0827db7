"""What the tests share: the error bounds, and plain PyTorch twins of models with generated weights."""

import copy
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import HyperLayer, HyperModule
from hyperfast.ops._library import _cpu
from tests.cuda_emulator.kernels import cuda_kernels  # noqa: F401  a fixture

# RMS(error) / RMS(reference in float64). float64: the reference rounds as much.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-14}
# Half precision: at most this many times the error of the same expression in plain PyTorch at that precision.
HALF_FACTOR = 2.0
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # converts to bfloat16 by cutting off


def rms(tensors: Sequence[Tensor]) -> float:
    """Root mean square over all elements of `tensors`."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]).square().mean().sqrt().item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


@pytest.fixture
def poison():
    """Memory that torch hands out uninitialised holds NaN, so that an element nobody writes is noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_accurate() -> Callable:
    """check(actual, expected float64, dtype, plain): tensors, or lists of tensors that are pooled.

    plain: the same expression in plain PyTorch at that precision, needed for half precision only.
    """

    def check(actual, expected, dtype: torch.dtype, plain=None) -> None:
        actual, expected = ([t] if isinstance(t, Tensor) else list(t) for t in (actual, expected))
        assert [t.shape for t in actual] == [t.shape for t in expected]
        assert all(t.dtype == dtype for t in actual)
        scale = rms(expected) or 1.0
        error = rms([a.double() - e for a, e in zip(actual, expected, strict=True)]) / scale
        bound = BOUNDS.get(dtype)
        if bound is not None and _cpu.isa() != _cpu.isas()[-1]:  # narrower vectors: more terms in each lane
            bound *= 2
        if bound is None:
            plain = [plain] if isinstance(plain, Tensor) else list(plain)
            factor = HALF_FACTOR * (3 if INTERPRETED and dtype == torch.bfloat16 else 1)
            bound = factor * rms([p.double() - e for p, e in zip(plain, expected, strict=True)]) / scale
        assert error <= bound, f"RMS error {error:.2e}, bound {bound:.2e}"

    return check


def parameter_like(p: nn.Parameter | None) -> nn.Parameter | None:
    return None if p is None else nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)


class PlainGenerator(nn.Module):
    """The linear generator as anybody would write it; parameter names of `LinearGenerator`."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.shape = generator.shapes[0]
        for name in ("weight", "bias", "z"):
            self.register_parameter(name, parameter_like(getattr(generator, name)))

    def forward(self) -> Tensor:
        return F.linear(self.z, self.weight, self.bias).view(self.shape)


class PlainLayer(nn.Module):
    """A linear or convolution layer on a `PlainGenerator`; parameter names and order of `HyperLayer`."""

    def __init__(self, layer: nn.Module, generator: PlainGenerator):
        super().__init__()
        self.generator = generator
        self.register_parameter("bias", parameter_like(layer.bias))
        self.options = ()
        if len(generator.shape) == 4:
            self.options = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        function = F.conv2d if self.options else F.linear
        return function(x, self.generator(), self.bias, *self.options)


class PlainHyperModule(nn.Module):
    """A `HyperModule` of linear generators: a network whose weights stand in its place by functional_call."""

    def __init__(self, module: nn.Module, generators: dict[str, PlainGenerator], targets: Sequence):
        super().__init__()
        self.module, self.generators, self.targets = module, nn.ModuleDict(generators), targets

    def forward(self, *args):
        made = {}
        for generator, (names,) in zip(self.generators.values(), self.targets, strict=True):
            made |= dict.fromkeys(names, generator())
        return torch.func.functional_call(self.module, made, args)


@pytest.fixture
def plain_twin() -> Callable[[nn.Module], nn.Module]:
    """twin(model): a copy in plain PyTorch, with the same parameter names in the same order."""

    def twin(model: nn.Module) -> nn.Module:
        generators: dict[int, PlainGenerator] = {}
        replaced: dict[int, nn.Module] = {}
        for host in reversed(list(model.modules())):  # from the inside out
            if isinstance(host, HyperLayer):
                g = host.generator
                generator = generators.setdefault(id(g), PlainGenerator(g))
                replaced[id(host)] = PlainLayer(host, generator)
            elif isinstance(host, HyperModule):
                plain = {name: PlainGenerator(g) for name, g in host.generators.items()}
                module = copy.deepcopy(host.module, replaced)
                replaced[id(host)] = PlainHyperModule(module, plain, host.targets)
        return copy.deepcopy(model, replaced)

    return twin


@pytest.fixture
def assert_equal_parameters() -> Callable:
    """check(model, twin, tolerance): every parameter and buffer of twin's state dict, absolute tolerance."""

    def check(model: nn.Module, twin: nn.Module, tolerance: float) -> None:
        ours, theirs = model.state_dict(), twin.state_dict()
        assert list(ours) == list(theirs)
        for name, expected in theirs.items():
            difference = (ours[name].double() - expected.double()).abs().max().item()
            assert difference <= tolerance, f"{name} differs by {difference:.2e}"

    return check
