"""train/generate_text.py with models whose next character is known."""

import itertools
import math

import pytest
import torch
from torch import nn

from train.data import DataError
from train.generate_text import PRIME_STEPS, sample
from train.text import Vocabulary

ABC = Vocabulary(list("\nabc"))


class Counter(nn.Module):
    """The likeliest next token is the sum of all tokens so far, modulo V: it takes a state to know it. The
    others' logits are 1 lower for each step away."""

    def __init__(self, V=4):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.V, self.steps, self.modes = V, [], set()

    def forward(self, tokens, state=None):
        assert tokens.dtype == torch.int64 and len(tokens) == 1 and tokens.shape[1] > 0
        assert not torch.is_grad_enabled()
        self.steps.append(tokens.shape[1])
        self.modes.add(self.training)
        sums = tokens.cumsum(1) + (0 if state is None else state)
        distance = (torch.arange(self.V) - sums[..., None]) % self.V
        return 5 - self.scale * distance.float(), sums[:, -1:]


def expected(prime, length):
    tokens = ABC.encode(prime).tolist()
    for _ in range(length):
        tokens.append(sum(tokens) % 4)
    return ABC.decode(tokens)[len(prime) :]


@pytest.mark.parametrize("prime", ["a", "ab", "cab\n", "b" + "a" * PRIME_STEPS])
def test_goes_on_from_the_prime_text_with_its_state(prime):
    model = Counter()
    text = "".join(sample(model, ABC, 9, prime, temperature=0))
    assert text == expected(prime, 9) and len(text) == 9
    assert sum(model.steps) == len(prime) + 8 and max(model.steps) <= PRIME_STEPS


def test_without_a_prime_text():
    assert list(sample(Counter(), Vocabulary(list("bac")), 3, temperature=0)) == list("bbb")


def test_no_step_more_than_asked_for():
    model = Counter()
    assert list(sample(model, ABC, 0, "abc")) == [] and model.steps == [3]
    characters = sample(Counter(), ABC, 10**9, "a")
    assert all(len(c) == 1 for c in itertools.islice(characters, 5))


def test_each_character_comes_as_it_is_drawn():
    model = Counter()
    characters = sample(model, ABC, 5, "ab")
    assert model.steps == []
    next(characters)
    assert model.steps == [2]
    next(characters)
    assert model.steps == [2, 1]


def test_seed():
    def text(seed):
        return "".join(sample(Counter(), ABC, 60, "a", seed=seed))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature(temperature):
    """The distance of what is drawn from the likeliest has the probabilities of the softmax."""
    n = 1500
    tokens = ABC.encode("a" + "".join(sample(Counter(), ABC, n, "a", temperature, seed=3))).long()
    distance = (tokens[1:] - tokens.cumsum(0)[:-1]) % 4
    found = distance.bincount(minlength=4) / n
    wanted = (-torch.arange(4) / temperature).softmax(0)
    assert (found - wanted).abs().max() < 4 * math.sqrt(0.25 / n)


def test_small_temperature_is_the_likeliest():
    texts = {"".join(sample(Counter(), ABC, 30, "b", t)) for t in (0, 1e-3, 1e-300, 5e-324)}
    assert texts == {expected("b", 30)}


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_wrong_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .* got {temperature}"):
        sample(Counter(), ABC, 3, "a", temperature)


def test_wrong_prime_text_and_length_before_the_first_character():
    with pytest.raises(DataError, match=r"the prime text: 1 of 2 characters .*'x' \(position 1\)"):
        sample(Counter(), ABC, 3, "ax")
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        sample(Counter(), ABC, -1, "a")


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_model(temperature, value):
    model = Counter()
    nn.init.constant_(model.scale, value)
    with pytest.raises(ValueError, match="not finite"):
        next(sample(model, ABC, 3, "a", temperature))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_while_it_runs(training):
    model = Counter().train(training)
    characters = sample(model, ABC, 3, "a")
    next(characters)
    assert model.modes == {False} and not model.training
    characters.close()
    assert model.training == training
    list(sample(model, ABC, 3, "a"))
    assert model.training == training and model.modes == {False}
    assert torch.is_grad_enabled()
