"""hyperfast.analysis: trainings whose losses are known, or made again by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import analysis
from tests.analysis_models import MODELS, everything


class Point(nn.Module):
    """Parameters x, which are the output: with `quadratic` SGD on L x^2 / 2 has known losses."""

    def __init__(self, *x):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x, dtype=torch.float64))

    def forward(self, _):
        return self.x


def quadratic(x, curvature):
    return (curvature * x * x).sum() / 2


def of_curvature(L, count=1):
    return [(torch.zeros(1), torch.tensor(L, dtype=torch.float64))] * count


def network():
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def batches_of(count=4, size=6):
    return [(torch.randn(size, 5), torch.randint(3, (size,))) for _ in range(count)]


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


# -- learning rate range test --------------------------------------------------------------------


@pytest.mark.parametrize("L", [0.5, 4.0])
def test_range_test_on_a_quadratic(L):
    result = analysis.lr_range_test(
        Point(3.0), of_curvature(L), loss=quadratic, low=1e-3, high=100, steps=150, smoothing=1
    )
    rates, losses = result.rates, result.losses
    x = 3.0 * torch.cat([torch.ones(1, dtype=torch.float64), 1 - L * rates[:-1]]).cumprod(0)
    torch.testing.assert_close(losses, L * x**2 / 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(rates[1:] / rates[:-1], torch.full_like(rates[1:], 1e5 ** (1 / 149)))
    assert torch.equal(result.smoothed, losses) and result.batches == len(rates) < 150
    # |1 - L rate| > 1 from 2 / L on: the loss grows, and goes beyond the first at last
    bottom = rates.tolist().index(result.lowest)
    assert rates[bottom - 1] < 2 / L <= result.lowest
    assert result.diverged == rates[-1] > 2 / L and losses[-1] > losses[0] > losses[-2]
    # steepest descent of the known losses over the logarithm of the rate
    slopes = losses[2:] - losses[:-2]
    assert result.suggestion == rates[1:-1][slopes[: bottom - 1].argmin()] < 1 / L


def test_smoothing_is_the_corrected_running_average():
    result = analysis.lr_range_test(
        Point(3.0), of_curvature(1.0), loss=quadratic, low=0.01, high=1, steps=20, smoothing=0.3
    )
    weights = 0.7 ** torch.arange(20, dtype=torch.float64)
    for i in range(20):
        w = weights[: i + 1].flip(0)
        average = (w * result.losses[: i + 1]).sum() / w.sum()
        assert result.smoothed[i].item() == pytest.approx(average.item(), rel=1e-12)
    assert result.diverged is None and result.rates[-1].item() == pytest.approx(1)


def noisy(x, target):
    return quadratic(x, 1.0) + target  # the gradient is that without noise


def test_the_suggestion_neither_lags_nor_follows_noise():
    options = {"low": 1e-5, "high": 10, "steps": 120}
    exact = analysis.lr_range_test(Point(3.0), of_curvature(1.0), loss=quadratic, smoothing=1, **options)
    smooth = analysis.lr_range_test(Point(3.0), of_curvature(1.0), loss=quadratic, **options)
    assert exact.suggestion / 2 < smooth.suggestion < 2 * exact.suggestion < smooth.lowest / 4
    noise = [(torch.zeros(1), torch.rand((), dtype=torch.float64)) for _ in range(120)]
    found = analysis.lr_range_test(Point(3.0), noise, loss=noisy, **options)
    assert exact.suggestion / 2 < found.suggestion < 2 * exact.suggestion


def test_a_loss_that_is_not_finite_ends_the_test():
    bad = [*of_curvature(1.0, 4), (torch.zeros(1), torch.tensor(math.nan))]
    result = analysis.lr_range_test(Point(1.0), bad, loss=quadratic, low=0.01, high=0.1, steps=50)
    assert len(result.losses) == 5 and result.losses[-1] == result.smoothed[-1] == math.inf
    assert result.diverged == result.rates[-1] and result.losses[:4].isfinite().all()
    assert result.suggestion in result.rates[1:3].tolist() and result.lowest == result.rates[3]


def test_no_suggestion_where_nothing_falls():
    at_minimum = analysis.lr_range_test(Point(0.0), of_curvature(1.0), loss=quadratic, steps=10)
    assert at_minimum.suggestion is None and at_minimum.diverged is None
    assert at_minimum.lowest == at_minimum.rates[0] and "| none |" in at_minimum.to_markdown()
    short = analysis.lr_range_test(Point(1.0), of_curvature(1.0), loss=quadratic, steps=2)
    assert short.suggestion is None


def test_range_test_is_the_training_loop():
    """Momentum carries over, batches begin again, and it is training mode."""
    model, batches, made = network().eval(), batches_of(), []

    def two_groups(parameters, lr):
        made.append(len(parameters))
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 3 * lr}]
        return torch.optim.SGD(groups, lr, momentum=0.9)

    twin = copy.deepcopy(model).train()
    state = torch.get_rng_state()
    result = analysis.lr_range_test(model, batches, two_groups, low=1e-3, high=0.1, steps=10)
    assert torch.equal(torch.get_rng_state(), state) and made == [6]
    optimizer, losses = two_groups(list(twin.parameters()), 1.0), []
    for i, rate in enumerate(result.rates.tolist()):
        inputs, targets = batches[i % 4]
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 3 * rate
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-5)


def test_an_iterator_ends_the_test_early():
    result = analysis.lr_range_test(network(), iter(batches_of(3)), steps=10)
    assert result.batches == 3


def test_range_test_of_a_hypernetwork_in_factored_mode():
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    model = hyperfast.factored_(hyperfast.hyperize(plain, z_dim=2, init="hyperfan"))
    inputs, targets = batches_of(1)[0]
    before, state = model(inputs).detach(), copy.deepcopy(model.state_dict())
    result = analysis.lr_range_test(
        model, [(inputs, targets)], lambda _, lr: hyperfast.optim.AdamW(model, lr=lr), steps=20, high=0.1
    )
    assert result.losses[-1] < result.losses[0]
    assert torch.equal(model(inputs), before)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_rows_of_the_range_test():
    result = analysis.lr_range_test(Point(3.0), of_curvature(1.0), loss=quadratic, steps=7, high=0.5)
    rows, text = result.rows(), result.to_markdown()
    assert len(rows) == 7 and list(rows[0]) == ["step", "rate", "loss", "smoothed"]
    assert rows[0]["loss"] == 4.5 and [row["step"] for row in rows] == list(range(7))
    assert "1e-07 to 0.5 in 7 steps" in text


# -- loss landscape ------------------------------------------------------------------------------


def test_landscape_of_a_quadratic():
    L, rates, steps = 2.0, (0.1, 0.5, 0.9, 1.5), 12
    model = Point(3.0)
    result = analysis.loss_landscape(model, of_curvature(L), rates, loss=quadratic, steps=steps)
    contraction = 1 - L * torch.tensor(rates, dtype=torch.float64)
    expected = L * 9 / 2 * contraction.unsqueeze(1) ** (2 * torch.arange(steps))
    torch.testing.assert_close(result.losses, expected)
    low, high = result.band()
    assert torch.equal(high, result.losses[3]) and low[1:].abs().max() < 1e-25  # 0.5 = 1 / L: in one step
    assert result.width == pytest.approx((expected.amax(0) - expected.amin(0)).mean().item())
    assert result.batches == steps and result.rates == rates and not result.diverged
    assert model.x.item() == 3 and model.x.grad is None


def test_trainings_that_diverge_stop():
    rates = (0.1, 1e160, 1e200)
    result = analysis.loss_landscape(Point(1.0), of_curvature(1.0), rates, loss=quadratic, steps=5)
    assert result.losses.isfinite().sum(1).tolist() == [5, 1, 1] and result.diverged == {1e160: 1, 1e200: 1}
    low, high = result.band()
    assert torch.equal(low, high) and torch.equal(low, result.losses[0]) and result.width == math.inf
    assert (
        "mean width inf" in result.to_markdown()
        and "| 1e+160 | 0.5 | 0.5 | inf | 1 |" in result.to_markdown()
    )
    none = analysis.loss_landscape(Point(1.0), of_curvature(1.0), rates[1:], loss=quadratic, steps=5)
    assert none.band()[0].isnan().tolist() == [False, True, True, True, True] and none.width == math.inf


def test_all_rates_have_the_same_start_batches_and_random_numbers():
    torch.manual_seed(3)
    model = network()
    data = torch.utils.data.TensorDataset(torch.randn(24, 5), torch.randint(3, (24,)))
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)  # another order in every epoch
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    # of nearly equal rates: dropout and order would tell them apart
    result = analysis.loss_landscape(model, loader, (0.01, 0.010001), momentum, steps=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(result.losses[0], result.losses[1], rtol=1e-3, atol=0)
    assert torch.equal(result.losses[0, :1], result.losses[1, :1])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    # and a training does not depend on what was trained before it
    single = analysis.loss_landscape(model, loader, (0.010001,), momentum, steps=10)
    assert torch.equal(single.losses[0], result.losses[1])


def test_landscape_is_the_training_loop():
    model, batches = network(), batches_of()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    result = analysis.loss_landscape(model, iter(batches), (0.05, 0.1), momentum, steps=9)
    assert result.batches == 4
    torch.set_rng_state(state)
    optimizer = momentum(twin.parameters(), 0.1)
    for i, (inputs, targets) in enumerate(batches):
        loss = F.cross_entropy(twin(inputs), targets)
        assert loss.item() == result.losses[1, i]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_stays_as_it_was(kind):
    model = MODELS[kind]().eval()
    images, targets = torch.randn(4, 3, 6, 6), torch.randint(3, (4,))
    output = model(images)
    output.sum().backward()
    before = everything(model)

    def adamw(_, lr):
        return hyperfast.optim.AdamW(model, lr=lr)

    for function in (analysis.lr_range_test, analysis.loss_landscape):
        result = function(model, [(images, targets)], optimizer=adamw, steps=4)
        assert result.losses.isfinite().all() and result.losses.unique().numel() > 1
        with pytest.raises(RuntimeError):
            function(model, [(images, targets), (images[:, :1], targets)], optimizer=adamw)
    assert everything(model) == before and torch.equal(model(images), output)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [analysis.lr_range_test, analysis.loss_landscape])
def test_trainings_whatever_the_caller_does(mode, function):
    model, batches = Point(1.0), of_curvature(1.0)
    expected = function(model, batches, loss=quadratic, steps=3)
    with mode():
        found = function(model, batches, loss=quadratic, steps=3)
    assert torch.equal(found.losses, expected.losses)
    assert found != expected  # by identity: tensors have no truth
    assert len({found, expected}) == 2


def test_rows_of_the_landscape():
    result = analysis.loss_landscape(Point(1.0), of_curvature(1.0), (0.1, 0.5), loss=quadratic, steps=3)
    rows = result.rows()
    assert list(rows[0]) == ["step", "loss_0.1", "loss_0.5", "low", "high"] and len(rows) == 3
    assert rows[0] == {"step": 0, "loss_0.1": 0.5, "loss_0.5": 0.5, "low": 0.5, "high": 0.5}


def test_bad_input():
    model, batches = Point(1.0), of_curvature(1.0)
    for options in ({"steps": 1}, {"low": 0}, {"low": 2, "high": 1}, {"smoothing": 0}, {"smoothing": 1.5}):
        with pytest.raises(ValueError, match="steps must be at least 2"):
            analysis.lr_range_test(model, batches, loss=quadratic, **options)
    for options in ({"steps": 0}, {"rates": ()}, {"rates": (0.1, 0.1)}):
        with pytest.raises(ValueError, match="rates must be given and different"):
            analysis.loss_landscape(model, batches, loss=quadratic, **options)
    for function in (analysis.lr_range_test, analysis.loss_landscape):
        with pytest.raises(ValueError, match="at least one batch"):
            function(model, [], loss=quadratic)
