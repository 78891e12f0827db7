"""Optimizers and gradient clipping that take factored gradients."""

from hyperfast.optim.adamw import AdamW, param_groups
from hyperfast.optim.clip import clip_grad_norm_

__all__ = ["AdamW", "clip_grad_norm_", "param_groups"]
