"""A model stays as it is, whatever is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """On leaving, by an error too, `model` and the random numbers are as they were on entering.

    Put back: values and memory of parameters and buffers (BatchNorm's running statistics and counts among
    them), `.grad` (the same tensors), `requires_grad`, every attribute of every module (its training flag,
    and which tensor is which parameter), and the state of the random number generators of the CPU and of the
    model's devices. Within it `.grad` is None everywhere, the gradients of before are put aside, and
    gradients are recorded even where the caller is in `torch.no_grad` or `torch.inference_mode`.

    Takes one copy of parameters and buffers. Raises TypeError for a model with parts of TorchScript, whose
    attributes are out of reach. What nobody changed is not written: a graph of before stays
    good for its backward, and next weights of generators stay current. Not put back: what attributes hold
    inside, as the entries of a list, hooks, and a CUDA graph of a training step, which is to be captured
    again where parameters were changed.
    """
    scripted = next(
        (name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None
    )
    if scripted is not None:
        where = f"its module {scripted!r}" if scripted else "it"
        raise TypeError(f"model must be made of plain modules, {where} is a torch.jit.ScriptModule")
    with ExitStack() as stack:  # leaves from the last to the first, all of it whatever fails on the way
        stack.enter_context(torch.inference_mode(False))  # torch.no_grad ends with it
        stack.enter_context(same_random_numbers(model))
        owns = [own for m in model.modules() for own in (vars(m), m._parameters, m._buffers, m._modules)]
        for own in owns:
            stack.callback(_put_back, own, dict(own))
        for tensor in {id(t): t for t in _tensors(model)}.values():
            kept = _Kept(tensor)
            stack.callback(kept.put_back)
            kept.put_gradient_aside()
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """What is drawn within it, on the CPU and the model's devices, is drawn again after it."""
    devices: dict[str, set[int]] = {"cuda": set()}
    for t in _tensors(model):
        if t.device.type not in ("cpu", "meta"):
            devices.setdefault(t.device.type, set()).add(t.device.index)
    with ExitStack() as stack:
        for kind, indices in devices.items():  # with each kind goes the CPU
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        yield


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Within it no part of `model` runs compiled: compiled code calls no hooks that came after it, and would
    be compiled again for parameters in other places."""
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _put_back(own: dict[str, Any], was: dict[str, Any]) -> None:
    own.clear()
    own.update(was)


class _Kept:
    """A tensor and what it was."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.memory = tensor.detach()
        self.values = self.memory.clone()
        self.version = _version(tensor)
        self.requires_grad = tensor.requires_grad
        self.gradient = tensor.grad if tensor.is_leaf else None

    def put_gradient_aside(self) -> None:
        if self.gradient is not None:
            self.tensor.grad = None

    def put_back(self) -> None:
        t = self.tensor
        if _place(t) != _place(self.memory):  # by module.to() or .data
            t.data = self.memory
        if _version(t) != self.version or not torch.equal(t, self.values):
            with torch.inference_mode(t.is_inference()), torch.no_grad():
                t.copy_(self.values)
        if t.requires_grad != self.requires_grad:
            t.requires_grad_(self.requires_grad)
        if t.is_leaf:
            t.grad = self.gradient


def _place(t: Tensor) -> tuple:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
