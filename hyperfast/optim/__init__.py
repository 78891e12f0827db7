"""Optimizers and gradient clipping that take factored gradients."""

from hyperfast.optim.adam import Adam, AdamW
from hyperfast.optim.clip import clip_grad_norm_
from hyperfast.optim.factored_optimizer import param_groups
from hyperfast.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "param_groups"]
