"""Text from a character language model, one character after the other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train.text import Vocabulary

PRIME_STEPS = 256  # of the prime text at a time: memory does not grow with it


def sample(
    model: nn.Module,
    vocabulary: Vocabulary,
    length: int,
    prime: str = "",
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """`length` characters that go on from `prime`, each as soon as it is drawn; an endless text needs no more
    memory than a short one.

    model: (tokens [1, T] int64, state or None) -> (logits [1, T, V], state); it runs where its parameters
    are, in evaluation mode, without gradients. Without a prime text the first character of the vocabulary,
    a line's end as a rule, goes before. Characters are drawn from softmax(logits / temperature), with 0 the
    likeliest one is taken; on the CPU, by a generator of their own: a seed gives the same text on every
    device, but for rounding.

    Raises, before the first character, DataError for a prime text with characters that the vocabulary does
    not have and ValueError for a negative or infinite temperature and a length below 0; later ValueError for
    logits that are not finite.
    """
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    prime_tokens = vocabulary.encode(prime or vocabulary.to_list()[0], "the prime text").long()
    return _sample(model, vocabulary, length, prime_tokens, temperature, seed)


@torch.no_grad()
def _sample(
    model: nn.Module, vocabulary: Vocabulary, length: int, prime: Tensor, temperature: float, seed: int
) -> Iterator[str]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    characters = vocabulary.to_list()
    with evaluation_mode(model):
        state = None
        for part in prime.split(PRIME_STEPS):
            logits, state = model(part[None].to(device), state)
        for i in range(length):
            token = _draw(logits[0, -1].double().cpu(), temperature, generator)
            yield characters[token]
            if i + 1 < length:
                logits, state = model(token.view(1, 1).to(device), state)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token, int64 [], from logits [V]."""
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite: it has diverged, or its weights are damaged")
    if temperature == 0:
        return logits.argmax()
    # the largest is 0 before it is divided: no temperature is too small
    probabilities = ((logits - logits.max()) / temperature).softmax(0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
