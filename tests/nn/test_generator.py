"""LinearGenerator: what it makes, and when the next weights the optimizer left are used or dropped."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import ops
from hyperfast.nn import (
    Generator,
    HyperLinear,
    LinearGenerator,
    generate_together,
    generated_l2_,
    penalize_l2,
)
from hyperfast.optim import AdamW

MARK = 7.0  # next weights are overwritten with it behind autograd's back: their use shows


def expected(g: LinearGenerator) -> torch.Tensor:
    return F.linear(g.z, g.weight, g.bias).view(g.shapes[0]).detach()


def stepped(dtype=torch.float32, bias=True) -> tuple[HyperLinear, AdamW]:
    """A layer in factored mode after a step, its next weights marked."""
    layer = HyperLinear(4, 3, generator=LinearGenerator((3, 4), 5, bias, dtype=dtype), dtype=dtype)
    hyperfast.factored_(layer)
    optimizer = AdamW(layer, lr=0.1)
    layer(torch.randn(2, 4, dtype=dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.generator.next_weight.data.fill_(MARK)
    return layer, optimizer


def uses_next_weights(layer: HyperLinear) -> bool:
    made = layer.generator()[0].detach()
    if bool((made == MARK).all()):
        return True
    torch.testing.assert_close(made, expected(layer.generator))
    return False


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward(bias, backend):
    g = LinearGenerator((3, 2, 5), 4, bias, backend=backend)
    (made,) = g()
    assert made.shape == (3, 2, 5) and [p.shape for p in g.parameters()][0] == (30, 4)
    torch.testing.assert_close(made, expected(g))


def test_another_embedding():
    g, z = LinearGenerator((3, 2), 4), torch.randn(4, requires_grad=True)
    (made,) = g(z)
    torch.testing.assert_close(made, F.linear(z, g.weight, g.bias).view(3, 2))
    made.sum().backward()
    assert g.z.grad is None and z.grad.shape == (4,)
    with pytest.raises(ValueError, match=r"z must be \[4\], got shape \[5\]"):
        g(torch.randn(5))
    with pytest.raises(ValueError, match="factored mode generates from its own z"):
        hyperfast.factored_(g)(z)


class Tenfold(LinearGenerator):
    def forward(self, z=None):
        return (10 * super().forward(z)[0],)


def test_a_forward_of_its_own_and_hooks_are_called():
    """Beside others made together, and on their own."""
    generators = LinearGenerator((2, 3), 4), Tenfold((2, 3), 4), LinearGenerator((2, 3), 4)
    plain, subclass, hooked = generators
    calls = []
    hooked.register_forward_hook(lambda module, args, made: calls.append(made))
    patched = LinearGenerator((2, 3), 4)
    patched.forward = lambda z=None: ("patched",)
    for a, b, c, d in (generate_together((*generators, patched)), [g() for g in (*generators, patched)]):
        torch.testing.assert_close(a[0], expected(plain))
        torch.testing.assert_close(b[0], 10 * expected(subclass))
        torch.testing.assert_close(c[0], expected(hooked))
        assert d == ("patched",)
    assert len(calls) == 2


def test_linear_generators_are_made_in_one_launch(monkeypatch):
    launches, generate = [], ops.generate
    monkeypatch.setattr(ops, "generate", lambda *a, **o: launches.append(len(a[0])) or generate(*a, **o))
    generate_together([LinearGenerator((2, 3), 4), Tenfold((2, 3), 4), LinearGenerator((4,), 2)])
    assert launches == [1, 2]


class Squared(Generator):
    """A generator as a user writes it: w = z z^T."""

    def __init__(self):
        super().__init__()
        self.shapes, self.z, self.backend = (torch.Size((3, 3)),), nn.Parameter(torch.randn(3)), "auto"

    def forward(self, z=None):
        z = self._check_z(z)
        return (penalize_l2(torch.outer(z, z), self.l2),)

    def embeddings(self):
        return (self.z.view(1, -1),)


def test_l2_of_a_generator_of_ones_own():
    g = generated_l2_(Squared(), 0.3)
    (got,) = torch.autograd.grad(g()[0].sum(), g.z)
    w = torch.outer(g.z, g.z)
    torch.testing.assert_close(got, torch.autograd.grad(w.sum() + 0.15 * w.square().sum(), g.z)[0])


def test_bad_sizes():
    for shape, K in (((), 4), ((3, 0), 4), ((3, 2), 0)):
        with pytest.raises(ValueError, match="at least 1"):
            LinearGenerator(shape, K)


def test_wrong_parameters_meet_a_clear_error():
    layer = HyperLinear(4, 3, z_dim=5)
    layer.generator.z = nn.Parameter(torch.randn(6))
    with pytest.raises(ValueError, match=r"z 0 must be .*\[5\].*\[6\]"):
        layer(torch.randn(2, 4))
    layer.generator.z = nn.Parameter(torch.randn(5, dtype=torch.float64))
    with pytest.raises(TypeError, match="z 0 must be torch.float32"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_next_weights_are_what_generate_makes(dtype, bias):
    layer, _ = stepped(dtype, bias)
    optimizer = AdamW(layer, lr=0.1)
    layer(torch.randn(2, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    left = layer.generator()[0].detach().clone()
    hyperfast.invalidate(layer)
    assert torch.equal(layer.generator()[0], left)
    assert not (left == MARK).any()


@pytest.mark.parametrize("bias", [False, True])
def test_next_weights_are_used(bias):
    layer, _ = stepped(bias=bias)
    assert uses_next_weights(layer)
    with torch.no_grad():
        assert uses_next_weights(layer)
    with torch.inference_mode():
        assert uses_next_weights(layer)
    layer.eval()
    assert uses_next_weights(layer)


def test_next_weights_carry_gradients():
    layer, _ = stepped()
    x, seed = torch.randn(2, 4), torch.randn(2, 3)
    layer(x).backward(seed)
    g, dw = layer.generator, (seed.t() @ x).reshape(-1)
    torch.testing.assert_close(g.bias.grad, dw)
    torch.testing.assert_close(g.z.grad, g.weight.detach().t() @ dw)


@torch.no_grad()
def half(t):
    t.mul_(0.5)


def replaced(layer, name):
    old = getattr(layer.generator, name)
    setattr(layer.generator, name, nn.Parameter(old.detach().clone() + 1))


def replaced_at_its_address(layer):
    """A new parameter over the memory of the old one, which dies."""
    memory = layer.generator.z.detach().numpy()
    layer.generator.z = nn.Parameter(torch.from_numpy(memory))
    memory += 1


def stepped_by(optimizer, only=None):
    for p in [only] if only is not None else optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


DROPS = {
    "weight in place": lambda layer: half(layer.generator.weight),
    "bias in place": lambda layer: half(layer.generator.bias),
    "z in place": lambda layer: half(layer.generator.z),
    "z through a view": lambda layer: half(layer.generator.z.view(1, 5)[:, 2:]),
    "a new weight": lambda layer: replaced(layer, "weight"),
    "a new bias": lambda layer: replaced(layer, "bias"),
    "a new z": lambda layer: replaced(layer, "z"),
    "a new z at its address": replaced_at_its_address,
    "z.data set": lambda layer: setattr(layer.generator.z, "data", torch.randn(5)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "load_state_dict, assign": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}, assign=True
    ),
    "load_state_dict of a part": lambda layer: layer.load_state_dict(
        {"generator.z": torch.randn(5)}, strict=False
    ),
    "double": lambda layer: layer.double(),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "invalidate": hyperfast.invalidate,
    "invalidate after a .data edit": lambda layer: (
        layer.generator.z.data.add_(1), hyperfast.invalidate(layer)
    ),
    "reset_parameters": lambda layer: layer.generator.reset_parameters(),
    "factored off": lambda layer: hyperfast.factored_(layer, False),
    "factored off and on": lambda layer: hyperfast.factored_(hyperfast.factored_(layer, False)),
    "another optimizer": lambda layer: stepped_by(torch.optim.SGD([layer.generator.z], lr=1.0)),
    "a fused optimizer": lambda layer: stepped_by(torch.optim.SGD([layer.generator.z], lr=1.0, fused=True)),
    "hyperfast's on a part": lambda layer: stepped_by(AdamW([layer.generator.z], lr=1.0)),
    "a step without dw": lambda layer: stepped_by(AdamW(layer, lr=1.0), only=layer.generator.z),
}  # fmt: skip


@pytest.mark.parametrize("how", DROPS)
def test_next_weights_are_not_used_after(how):
    layer, _ = stepped()
    DROPS[how](layer)
    assert not uses_next_weights(layer)


def test_copies_do_not_take_next_weights():
    layer, _ = stepped()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        copy.copy(layer.generator),
    ]
    for copied in copies:
        g = copied if isinstance(copied, LinearGenerator) else copied.generator
        assert g.next_weight is None
        torch.testing.assert_close(g()[0].detach(), expected(layer.generator))
    assert uses_next_weights(layer)  # the original still does


def test_next_weights_are_not_saved():
    layer, _ = stepped()
    names = {"generator.weight", "generator.bias", "generator.z", "bias"}
    assert set(layer.state_dict()) == names == {n for n, _ in layer.named_parameters()}
    assert list(layer.buffers()) == []


def test_functional_call_with_other_parameters():
    layer, _ = stepped()
    x = torch.randn(2, 4)
    others = {name: p.detach().clone() + 1 for name, p in layer.named_parameters()}
    got = torch.func.functional_call(layer, others, (x,))
    weight = F.linear(others["generator.z"], others["generator.weight"], others["generator.bias"]).view(3, 4)
    torch.testing.assert_close(got, F.linear(x, weight, others["bias"]))
    assert uses_next_weights(layer)
    only_z = torch.func.functional_call(layer, {"generator.z": others["generator.z"]}, (x,))
    g = layer.generator
    weight = F.linear(others["generator.z"], g.weight, g.bias).view(3, 4)
    torch.testing.assert_close(only_z, F.linear(x, weight, layer.bias))


def test_func_grad_and_ensembles():
    """grad through functional_call, and vmap over stacked models."""
    layers = [HyperLinear(4, 3, z_dim=5, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(2, 4, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(layers[0], parameters, (x,)).square().sum()

    parameters, _ = torch.func.stack_module_state(layers)
    grads = torch.func.vmap(torch.func.grad(loss), (0, None))(parameters, x)
    for i, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(grads[name][i], p.grad)


def test_func_grad_of_a_factored_layer_after_a_step():
    layer, _ = stepped(torch.float64)
    hyperfast.invalidate(layer)
    dense, x = hyperfast.factored_(copy.deepcopy(layer), False), torch.randn(2, 4, dtype=torch.float64)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    dense(x).square().sum().backward()
    for name, p in dense.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layer, _ = stepped(torch.float64)
    hyperfast.invalidate(layer)
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    plain(x).square().sum().backward()
    assert layer.generator.weight.grad is None
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad, rtol=1e-12)


def test_nothing_keeps_a_dead_model_alive():
    layer, optimizer = stepped()
    alive = weakref.ref(layer.generator)
    del layer, optimizer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_handing_dw_on_early_changes_no_value_and_no_gradient(l2, dtype):
    results = []
    for early in (False, True):
        torch.manual_seed(1)
        g = hyperfast.factored_(generated_l2_(LinearGenerator((5, 7), 3, init="hyperfan"), l2))
        g.early = early
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            (w,) = g()
            (twice,) = g()
        (w.float().sin() * twice.float()).sum().backward()
        with torch.no_grad():
            (evaluated,) = g()
        assert g.weight.grad is None and w.shape == (5, 7)
        g.l2 = 0.0  # second derivatives are without it (`generated_l2_`)
        parameters = g.weight, g.bias, g.z
        first = torch.autograd.grad(g()[0].sin().sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), parameters)
        results.append((w.detach(), g.bias.grad, g.z.grad, evaluated, *first, *second))
    for late, early in zip(*results, strict=True):
        assert late.dtype == early.dtype
        torch.testing.assert_close(early, late, rtol=1e-6, atol=1e-6)
