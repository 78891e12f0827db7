"""Analyses of gradients, on models whose answer is known and against plain PyTorch on all others."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import hyperfast
from hyperfast import analysis
from hyperfast.analysis.batches import on_device
from tests.analysis_models import MODELS, Net, everything, hyper

A = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
A = A @ A.T


class Quadratic(nn.Module):
    """c^2 / 2 p^T A p for the batch c, with p in two parameters; its gradient is c^2 A p."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.rest = nn.ParameterDict({"second": nn.Parameter(torch.randn(3, 1, dtype=torch.float64))})

    @property
    def p(self):
        return torch.cat([self.first, self.rest["second"].view(-1)])

    def forward(self, c):
        return c.square() / 2 * self.p @ A @ self.p


def value(output, target):
    return output


def scales(*numbers):
    return [(torch.tensor(c, dtype=torch.float64), None) for c in numbers]


def close(a, b):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_predictiveness_of_a_quadratic():
    model, c = Quadratic(), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    found = analysis.gradient_predictiveness(model, scales(*c.tolist()), value, step=0.3, limit=3)
    g = [n**2 * (A @ model.p.detach()) for n in c[:3]]
    after = [a - 0.3 * n**2 * (A @ a) for n, a in zip(c, g, strict=False)]
    close(found.norms, [a.norm() for a in g])
    close(found.changes, [0.3 * n**2 * (A @ a).norm() for n, a in zip(c, g, strict=False)])
    close(found.cosines, [F.cosine_similarity(a, b, dim=0) for a, b in zip(g, after, strict=True)])
    close(found.ratios, found.changes / found.norms)
    assert found.batches == 3 and found.step == 0.3


def test_predictiveness_where_nothing_changes():
    """A loss linear in the parameters has one gradient everywhere; without any there is no direction."""
    model = nn.Linear(3, 2, dtype=torch.float64)
    batches = [(torch.randn(4, 3, dtype=torch.float64), None)]
    found = analysis.gradient_predictiveness(model, batches, lambda y, _: y.sum())
    close(found.changes, [0.0])
    close(found.cosines, [1.0])
    found = analysis.gradient_predictiveness(model, batches, lambda y, _: 0 * y.sum())
    assert found.norms == found.changes == found.cosines == 0 and found.ratios.isnan()


def test_largest_difference_of_a_quadratic():
    model = Quadratic()
    found = analysis.max_gradient_difference(model, *scales(2.0), value)
    g = 4 * A @ model.p.detach()
    u = torch.cat([F.normalize(part, dim=0) for part in (g[:2], g[2:])])
    close(found.distances, torch.linspace(0, 0.5, 10, dtype=torch.float64))
    close(found.differences, found.distances * (4 * A @ u).abs().max())
    close(found.average, found.differences.mean())
    close(found.farthest, 0.5 * (4 * A @ u).abs().max())
    assert found.batches == 1 and found.differences[0] == 0


def test_largest_difference_does_not_move_a_parameter_without_gradient():
    class AtRest(Quadratic):
        def forward(self, c):
            return super().forward(c) + self.rest["zero"].square().sum()

    model = AtRest()
    model.rest["zero"] = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model.rest["unused"] = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    found = analysis.max_gradient_difference(model, *scales(1.0), value, distances=[0.5, 0.1])
    model.forward = super(AtRest, model).forward
    close(
        found.differences,
        analysis.max_gradient_difference(model, *scales(1.0), value, [0.5, 0.1]).differences,
    )
    close(found.farthest, found.differences[0])


def test_smoothness_of_least_squares():
    """1 / 2B |x W^T - y|^2 has the gradient (x W^T - y)^T x / B."""
    model = nn.Linear(7, 3, bias=False)
    x, y = torch.randn(2, 6, 7), torch.randn(2, 6, 3)

    def loss(output, target):
        return (output - target).square().sum() / (2 * len(output))

    found = analysis.gradient_smoothness(
        model.double(), [*zip(x.double(), y.double(), strict=True)], loss, seed=3
    )
    generator = torch.Generator().manual_seed(3)
    W = model.weight.detach()
    for i in range(2):
        e = (0.01 * torch.randn(6, 7, generator=generator)).double()
        g, noisy = ((v @ W.T - y[i].double()).T @ v / 6 for v in (x[i].double(), x[i].double() + e))
        close(found.changes[i], (noisy - g).norm())
        close(found.noise_norms[i], e.norm(dim=1).mean())
    close(found.ratios, found.changes / found.noise_norms)
    close(found.average, found.ratios.mean())
    assert found.batches == 2 and (found.noise, found.seed) == (0.01, 3)


def test_smoothness_of_a_linear_loss_is_that_of_the_mean_noise():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False)).double()
    arguments = [(torch.randn(5, 3, 2, 2).double(), None)], lambda y, _: y.mean()
    found = analysis.gradient_smoothness(model, *arguments, noise=0.5, seed=8)
    e = 0.5 * torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(8)).double().flatten(1)
    close(found.average, e.mean(0).norm() / e.norm(dim=1).mean())
    assert analysis.gradient_smoothness(model, *arguments, noise=0.5).average != found.average


class Known(nn.Module):
    """A loss whose gradients are the given numbers."""

    def __init__(self, **gradients):
        super().__init__()
        self.layer, self.gradients = nn.Module(), gradients
        for name, g in gradients.items():
            setattr(self.layer, name, nn.Parameter(torch.zeros(len(g), dtype=torch.float64)))

    def forward(self, factor):
        terms = (
            getattr(self.layer, n) @ torch.tensor(g, dtype=torch.float64) for n, g in self.gradients.items()
        )
        return factor * sum(terms)


def test_health_of_known_gradients():
    model = Known(a=[0.0, 5e-8, -1e-7, 3e-7, 1.0, -2.0], b=[math.nan, math.inf, 0.5, -0.5])
    found = analysis.gradient_health(model, scales(1.0, 0.1), value)
    assert found.names == ("layer.a", "layer.b") and found.sizes == (6, 4) and found.batches == 2
    assert found.below.tolist() == [2 + 4, 0]  # the second: 0, 5e-9, 1e-8, 3e-8
    found = analysis.gradient_health(model, scales(1.0), value)
    assert found.below.tolist() == [2, 0] and found.above.tolist() == [1, 2]  # at a threshold is neither
    assert (found.vanishing_share, found.exploding_share) == (0.2, 0.3)
    found = analysis.gradient_health(model, scales(1.0), value, vanishing=2e-7, exploding=0.4, limit=None)
    assert found.below.tolist() == [3, 0] and found.above.tolist() == [2, 4]


def test_health_of_norms():
    found = analysis.gradient_health(Known(a=[3.0], b=[0.0, 4.0]), scales(1.0, 3.0), value)
    close(found.norms, torch.tensor([[3.0, 4.0], [9.0, 12.0]], dtype=torch.float64))
    assert found.layer_norms() == {"layer": 10.0}
    assert [row["norm"] for row in found.rows()] == [6.0, 8.0]


def test_health_without_any_gradient():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].unused = nn.Linear(2, 2)
    found = analysis.gradient_health(model, [(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))])
    assert found.vanishing_share == 1 and found.exploding_share == 0 and not found.norms.any()
    assert found.layer_norms() == {"0": 0.0, "0.unused": 0.0, "1": 0.0}


# -- any model -----------------------------------------------------------------------------------


def image_batches(count=3, dtype=torch.float32):
    return [(torch.randn(6, 3, 6, 6, dtype=dtype), torch.randint(3, (6,))) for _ in range(count)]


def stepped(model, step, batch):
    """Gradients before and after a step of plain SGD in place, of the model's copy, by parameter."""
    twin = hyperfast.factored_(copy.deepcopy(model), False)
    learned = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    found = []
    for _ in range(2):
        twin.zero_grad()
        F.cross_entropy(twin(batch[0]), batch[1]).backward()
        found.append(torch.cat([p.grad.flatten() for p in learned.values()]))
        with torch.no_grad():
            for p in learned.values():
                p.sub_(step * p.grad)
    return learned, *found


KINDS = MODELS | {
    "two_layer": lambda: hyper("two_layer", hidden_dim=5),
    "chunked": lambda: hyper("chunked", chunk_size=10),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_backward(kind, training):
    model = KINDS[kind]().double().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = image_batches(2, torch.float64)
    found = analysis.gradient_predictiveness(model, batches, step=0.2)
    for i, batch in enumerate(batches):
        learned, g, after = stepped(model, 0.2, batch)
        close(found.norms[i], g.norm())
        close(found.changes[i], (after - g).norm())
        close(found.cosines[i], F.cosine_similarity(g, after, dim=0))
    health = analysis.gradient_health(model, batches[-1:])
    assert health.names == tuple(learned)
    assert health.below.sum() == (g.abs() < 1e-7).sum() and health.above.sum() == (g.abs() > 1).sum()


def test_a_shared_weight_counts_once_and_frozen_ones_not_at_all():
    names = analysis.gradient_health(Net(), image_batches(1)).names
    assert "first.weight" in names and "second.weight" not in names and "head.weight" not in names


def test_activation_checkpoints_meet_the_moved_parameters():
    class Checkpointed(Net):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model, batches = Net().double().eval(), image_batches(1, torch.float64)
    twin = Checkpointed().double().eval()
    twin.load_state_dict(model.state_dict())
    a, b = (analysis.gradient_predictiveness(m, batches, step=1.0) for m in (model, twin))
    close(a.changes, b.changes)
    assert a.changes > 0.01


class Cubic(nn.Module):
    """(a + b)^3, whose gradients in a and b are one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return (x + self.a + self.b).pow(3).sum()


def test_steps_go_down_the_gradient():
    batch = torch.zeros(2, dtype=torch.float64), None
    down = 0.3 / math.sqrt(2)  # of every number
    found = analysis.max_gradient_difference(Cubic(), batch, value, distances=[0.3])
    close(found.differences, [12 - 3 * (2 - 2 * down) ** 2])
    found = analysis.gradient_predictiveness(Cubic(), [batch], value, step=0.01)
    close(found.norms, [12.0 * 2])  # 3 (a + b)^2 for each of four
    close(found.changes, [2 * (12 - 3 * (2 - 0.24) ** 2)])


class Dropped(nn.Module):
    """With a loss linear in the parameters only the masks can change its gradient."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 2, bias=False))

    def forward(self, x):
        return self.net(x)


def test_dropout_makes_no_difference_within_a_batch_and_one_between_them():
    x, mean = torch.randn(4, 40), lambda y, _: y.mean()
    found = analysis.gradient_predictiveness(Dropped(), [(x, None)] * 2, mean)
    assert not found.changes.any() and found.norms[0] != found.norms[1]
    assert not analysis.max_gradient_difference(Dropped(), (x, None), mean).differences.any()
    smooth = analysis.gradient_smoothness(Dropped(), [(x, None)] * 2, mean)
    assert (smooth.ratios <= 2).all() and smooth.ratios[0] != smooth.ratios[1]  # |mask e| <= 2 |e|
    torch.manual_seed(7)
    first = analysis.gradient_health(Dropped(), [(x, None)] * 2, mean).norms
    torch.manual_seed(7)
    assert torch.equal(first, analysis.gradient_health(Dropped(), [(x, None)] * 2, mean).norms)


def test_buffers_are_those_of_the_model_for_every_gradient():
    """A normalisation by a moving average would have another after each pass."""

    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("other", torch.ones(()))

        def forward(self, x):
            self.scale.mul_(2)
            self.other = self.other * 3
            return self.linear(x) * (self.scale + self.other)

    model, batches = Moving(), [(torch.randn(4, 3), None)] * 2
    found = analysis.gradient_predictiveness(model, batches, lambda y, _: y.mean())
    assert not found.changes.any() and found.norms[0] == found.norms[1]
    assert model.scale == model.other == 1


# -- what is left behind -------------------------------------------------------------------------

ANALYSES = {
    "predictiveness": analysis.gradient_predictiveness,
    "difference": lambda m, b, *loss: analysis.max_gradient_difference(m, next(iter(b)), *loss),
    "smoothness": analysis.gradient_smoothness,
    "health": analysis.gradient_health,
}


def prepared(kind):
    """With gradients, modes and next weights of a training."""
    model = MODELS[kind]()
    (model if kind == "plain" else model.module).norm.eval()
    optimizer = hyperfast.optim.SGD(model, lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3, 6, 6)).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_left_as_it_was(kind, name):
    model, batches = prepared(kind), image_batches(2)
    with torch.inference_mode():
        made_there = image_batches(2)
    before, versions = everything(model), [p._version for p in model.parameters()]
    ANALYSES[name](model, batches)
    with torch.inference_mode():
        ANALYSES[name](model, made_there)
        with pytest.raises(ZeroDivisionError):
            ANALYSES[name](model, batches, failing_second_time(forward=True))
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        ANALYSES[name](model, batches, failing_second_time(forward=False))
    assert [p._version for p in model.parameters()] == versions  # not even written
    assert everything(model) == before


def failing_second_time(forward):
    """A cross-entropy that fails in its second forward, or backward."""
    calls = []

    def fail(_):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    def loss(output, target):
        if forward:
            fail(output)
        else:
            output.register_hook(fail)
        return F.cross_entropy(output, target)

    return loss


def test_batches_beyond_the_limit_are_not_taken():
    batches = iter(image_batches(3))
    for name in ("predictiveness", "smoothness"):
        assert ANALYSES[name](Net(), batches, limit=1).batches == 1
    assert len(list(batches)) == 1


def test_tables_and_rows():
    model, batches = Net(), image_batches(2)
    found = {name: run(model, batches) for name, run in ANALYSES.items()}
    assert [row["batch"] for row in found["predictiveness"].rows()] == [0, 1]
    assert found["predictiveness"].rows()[1]["ratio"] == found["predictiveness"].ratios[1]
    assert set(found["smoothness"].rows()[0]) == {"batch", "change", "noise_norm", "ratio"}
    assert len(found["difference"].rows()) == 10
    assert len(found["health"].rows()) == len(found["health"].names)
    for result in found.values():
        header, rule, *rows = result.to_markdown().splitlines()
        assert f"{result.batches} batch" in header and rows
        assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert f"{found['health'].vanishing_share:.2%}" in found["health"].to_markdown().splitlines()[-1]


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "at least one batch, got none", lambda m, b: analysis.gradient_health(m, [])),
        (ValueError, "limit must be at least 1, got 0", lambda m, b: analysis.gradient_health(m, b, limit=0)),
        (
            ValueError,
            r"one number, got \[6\]",
            lambda m, b: analysis.gradient_health(m, b, lambda y, t: y[:, 0]),
        ),
        (ValueError, "one number, got float", lambda m, b: analysis.gradient_health(m, b, lambda y, t: 0.5)),
        (ValueError, "distances", lambda m, b: analysis.max_gradient_difference(m, b[0], distances=[])),
        (ValueError, "noise must be above 0", lambda m, b: analysis.gradient_smoothness(m, b, noise=0.0)),
        (TypeError, "torch.int64", lambda m, b: analysis.gradient_smoothness(m, [(b[0][1], b[0][1])])),
        (TypeError, "got list", lambda m, b: analysis.gradient_smoothness(m, [([b[0][0]], b[0][1])])),
    ],
)
def test_refused(error, words, call):
    with pytest.raises(error, match=words):
        call(Net(), image_batches(1))


def training(function):
    def run(model, batches, loss=F.cross_entropy):
        def sgd(_, lr):
            return hyperfast.optim.SGD(model, lr=lr)

        return function(model, batches, optimizer=sgd, loss=loss, steps=4)

    return run


TRAINING = {"range": training(analysis.lr_range_test), "landscape": training(analysis.loss_landscape)}
ALL = ANALYSES | TRAINING | {"activations": analysis.activation_statistics}


@pytest.mark.parametrize("name", ALL)
def test_refused_by_all(name):
    run, (batch,) = ALL[name], image_batches(1)
    single = batch[0] if name == "difference" else batch  # [(x, y)] is meant
    with pytest.raises(ValueError, match=r"must be a pair \(inputs, targets\), .* got Tensor"):
        run(Net(), [single] if name == "difference" else single)
    with pytest.raises(ValueError, match="must be a pair .* got 3 parts"):
        run(Net(), [(*batch, None)])
    if name != "activations":
        with pytest.raises(ValueError, match=r"one number, got \[6\]"):
            run(Net(), [batch], lambda y, t: y[:, 0])
        with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
            run(Net().requires_grad_(False), [batch])


# -- compiled models and other devices -----------------------------------------------------------


@pytest.mark.parametrize("name", ANALYSES)
def test_a_compiled_model_runs_eagerly(name):
    """Under the names of the plain one."""
    model, batches, ran = Net(), image_batches(2), []

    def backend(graph, inputs):
        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    rows = ANALYSES[name](model, batches).rows()
    compiled = torch.compile(model, backend=backend)
    assert ANALYSES[name](compiled, batches).rows() == rows and not ran
    compiled(batches[0][0])
    assert ran


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_copies_away_from_the_cpu_do_not_wait(device, monkeypatch):
    to, seen = torch.Tensor.to, []

    def spy(tensor, *args, **options):
        seen.append(options["non_blocking"])
        return to(tensor, *args, **options)

    model, batch = nn.Linear(2, 2, device=device), (torch.zeros(3, 2), torch.zeros(3))
    monkeypatch.setattr(torch.Tensor, "to", spy)
    moved = on_device(model, batch)
    assert [t.device.type for t in moved] == [device] * 2 and seen == [device != "cpu"] * 2


def test_noise_is_that_which_was_added():
    """Of bfloat16 inputs around 100 a little noise changes nothing, and some of it changes much."""
    model, targets = Net().bfloat16(), torch.arange(6) % 3
    inputs = torch.full((6, 3, 6, 6), 100.0, dtype=torch.bfloat16)
    found = analysis.gradient_smoothness(model, [(inputs, targets)], noise=0.2)
    drawn = 0.2 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    added = (inputs + drawn.bfloat16()).double() - inputs.double()
    close(found.noise_norms, [added.flatten(1).norm(dim=1).mean()])
    assert abs(found.noise_norms / drawn.flatten(1).norm(dim=1).mean() - 1) > 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_a_gpu_with_batches_on_the_cpu(kind, name):
    model = MODELS[kind]().cuda().train()
    batches = [(x.pin_memory(), y) for x, y in image_batches(2)]
    model(batches[0][0].cuda()).sum().backward()

    def state():
        named = [*model.named_parameters(), *model.named_buffers()]
        tensors = {n: (t.data_ptr(), t.detach().cpu().numpy().tobytes()) for n, t in named}
        gradients = {n: t.grad.cpu().numpy().tobytes() for n, t in named if t.grad is not None}
        modes = [m.training for m in model.modules()]
        return tensors, gradients, modes, torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()

    before = state()
    found = ALL[name](model, batches)
    assert found.rows() and state() == before
    tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    assert all(t.device.type == "cpu" for t in tensors)
