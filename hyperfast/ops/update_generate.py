"""`update_generate`: an optimizer's update of rank-one generator gradients and the next weights, in one pass.

The op behind `adamw_generate` and `sgd_generate`, and the checks they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _cpu,
    check_backend,
    check_dense,
    check_generators,
    check_like,
    check_memory,
    dtype_name,
    generator_engine,
    library,
)
from hyperfast.states import EightBit, State, num_scales, storage_of

# states and scales: the first state of all layers, then the second. Scales are empty unless states are in 8
# bits; the states of a bias that is not trained are empty tensors.
library.define(
    "update_generate(str rule, Tensor(a!)[] weights, Tensor(b!)[] states, Tensor(c!)[] scales, "
    "Tensor(d!)[] biases, Tensor(e!)[] bias_states, Tensor(f!)[] bias_scales, Tensor[] dws, Tensor[] zs, "
    "Tensor[] new_zs, Tensor(g!)[] next_weights, float[] coefficients, float[] bias_coefficients, "
    "bool[] bias_is_trained, float grad_scale, int[] seeds) -> ()"
)
ROWS = {"adam": reference.AdamWCoefficients, "sgd": reference.SGDCoefficients}


def _rows(rule: str, flat: Sequence[float]) -> list[NamedTuple]:
    kind = ROWS[rule]
    size = len(kind._fields)
    return [kind(*flat[i : i + size]) for i in range(0, len(flat), size)]


def _columns(tensors: list[Tensor], scales: list[Tensor], L: int) -> list[list[State]]:
    """One list over the layers for each state."""
    stored = [EightBit(*pair) for pair in zip(tensors, scales, strict=True)] if scales else tensors
    return [stored[i : i + L] for i in range(0, len(stored), L)]


@torch.library.impl(library, "update_generate", "CompositeExplicitAutograd")
def _update_reference(
    rule, weights, states, scales, biases, bias_states, bias_scales, dws, zs, new_zs, next_weights,
    coefficients, bias_coefficients, bias_is_trained, grad_scale, seeds,
):  # fmt: skip
    L = len(weights)
    columns, bias_columns = _columns(states, scales, L), _columns(bias_states, bias_scales, L)
    bias_columns = [[t if trained else None for t, trained in zip(column, bias_is_trained, strict=True)]
                    for column in bias_columns]  # fmt: skip
    rows, bias_rows = _rows(rule, coefficients), _rows(rule, bias_coefficients)
    arguments = (dws, zs, new_zs, next_weights, rows)
    if rule == "adam":
        reference.adamw_generate(
            weights, *columns, biases, *bias_columns, *arguments, bias_rows, grad_scale, seeds
        )
        return
    bias_rows = [row if trained else None for row, trained in zip(bias_rows, bias_is_trained, strict=True)]
    columns, bias_columns = columns or [[None] * L], bias_columns or [[None] * L]
    reference.sgd_generate(weights, *columns, biases, *bias_columns, *arguments, bias_rows, grad_scale, seeds)


@torch.library.impl(library, "update_generate", "CPU")
def _update_cpu(*args):
    (rule, weights, states, scales, biases, bias_states, bias_scales, dws, zs, new_zs, next_weights,
     coefficients, bias_coefficients, bias_is_trained, grad_scale, seeds) = args  # fmt: skip
    if generator_engine(weights) == "reference":
        return _update_reference(*args)
    dws, zs, new_zs = ([t.contiguous() for t in ts] for ts in (dws, zs, new_zs))
    L = len(weights)

    def addresses(tensors: list[Tensor], scales: list[Tensor], i: int) -> list[int]:
        """State and scales, twice; 0 for what is not there."""
        found = [0] * 4
        for j in range(len(tensors) // L):
            found[2 * j] = tensors[j * L + i].data_ptr()
            found[2 * j + 1] = scales[j * L + i].data_ptr() if scales else 0
        return found

    segments = [
        (
            weights[i].data_ptr(), *addresses(states, scales, i), biases[i].data_ptr(),
            *addresses(bias_states, bias_scales, i), dws[i].data_ptr(), zs[i].data_ptr(),
            new_zs[i].data_ptr(), next_weights[i].data_ptr(), *weights[i].shape, int(bias_is_trained[i]),
            seeds[i],
        )
        for i in range(L)
    ]  # fmt: skip
    storage = "8bit" if scales else storage_of(states[0], weights[0].dtype) if states else "plain"
    _cpu.update_generate(
        segments, _rows(rule, coefficients), _rows(rule, bias_coefficients), rule, storage, grad_scale,
        dtype_name(weights[0]), torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("hyperfast::update_generate", lib=library)
def _update_fake(*args):
    return None


class Update(NamedTuple):
    """What the public functions hand over; lists with one entry for each layer. names: of the states."""

    rule: str
    names: tuple[str, ...]
    weights: list[Tensor]
    states: list[list[State]]
    biases: list[Tensor]
    bias_states: list[list[State | None]]
    bias_is_trained: list[bool]
    dws: list[Tensor]
    zs: list[Tensor]
    new_zs: list[Tensor]
    next_weights: list[Tensor]
    coefficients: list[NamedTuple]
    bias_coefficients: list[NamedTuple | None]
    grad_scale: float
    seeds: list[int]


def update_generate(u: Update, backend: str) -> None:
    """Checks `u`, then updates in place. Raises ValueError or TypeError before anything is changed."""
    check_backend(backend)
    storage = _check(u)
    coefficients = _checked_rows("coefficients", u.coefficients, ROWS[u.rule])
    untrained = ROWS[u.rule](*[0.0] * len(ROWS[u.rule]._fields))
    bias_rows = [c if t else untrained for c, t in zip(u.bias_coefficients, u.bias_is_trained, strict=True)]
    bias_coefficients = _checked_rows("bias_coefficients", bias_rows, ROWS[u.rule])
    grad_scale, seeds = float(u.grad_scale), [int(seed) for seed in u.seeds]
    if not u.weights:
        return
    empty = u.weights[0].new_empty(0)
    nothing = EightBit(empty, empty) if storage == "8bit" else empty  # the op's lists hold no None

    def flat(columns: list[list[State | None]]) -> tuple[list[Tensor], list[Tensor]]:
        stored = [nothing if state is None else state for column in columns for state in column]
        if storage != "8bit":
            return stored, []
        return [state.codes for state in stored], [state.scales for state in stored]

    states, bias_states = flat(u.states), flat(u.bias_states)
    arguments = (
        u.rule, u.weights, *states, u.biases, *bias_states, u.dws, u.zs, u.new_zs, u.next_weights,
        coefficients, bias_coefficients, u.bias_is_trained, grad_scale, seeds,
    )  # fmt: skip
    with torch.no_grad():
        if backend == "reference":
            _update_reference(*arguments)
            return
        torch.ops.hyperfast.update_generate(*arguments)
        # raw kernels do not: autograd must notice that saved tensors were overwritten
        written = (u.weights, *states, u.biases, *bias_states, u.next_weights)
        torch.autograd.graph.increment_version([t for column in written for t in column if t is not empty])


def _checked_rows(name: str, rows: Sequence[Sequence[float]], kind: type) -> list[float]:
    """The numbers of `rows` one after another; ValueError or TypeError unless each row is a `kind`."""
    for i, row in enumerate(rows):
        if len(row) != len(kind._fields):
            raise ValueError(f"{name} {i} must be {len(kind._fields)} numbers, got {len(row)}")
    return [float(x) for row in rows for x in row]


def _check(u: Update) -> str:
    """ValueError or TypeError for anything native code must not see; returns how states are stored."""
    lists = {"weight": u.weights, "bias": u.biases, "next_weight": u.next_weights}
    read = {"dw": (u.dws, "N"), "z": (u.zs, "K"), "new_z": (u.new_zs, "K")}
    plain = {"bias": (u.biases, "N"), "next_weight": (u.next_weights, "N")}
    check_generators(u.weights, **plain, **read)
    counted = {"coefficients": u.coefficients, "bias_coefficients": u.bias_coefficients, "seeds": u.seeds}
    for name, column in counted.items():
        if len(column) != len(u.weights):
            raise ValueError(f"{len(u.weights)} weights but {len(column)} of {name}")
    storage, marker = "plain", {"adam": "bias_exp_avg", "sgd": "bias_coefficients"}[u.rule]
    for names, columns, letters in (
        (u.names, u.states, "NK"),
        ([f"bias_{name}" for name in u.names], u.bias_states, "N"),
    ):
        for name, column in zip(names, columns, strict=True):
            if len(column) != len(u.weights):
                raise ValueError(f"{len(u.weights)} weights but {len(column)} of {name}")
            for i, (state, weight) in enumerate(zip(column, u.weights, strict=True)):
                if letters == "N" and (state is None) == u.bias_is_trained[i]:
                    raise ValueError(f"{name} {i} must be None where {marker} {i} is, and only there")
                if state is None and letters == "N":
                    continue
                if (
                    column is columns[0]
                    and i == 0
                    and letters == "NK"
                    and isinstance(state, Tensor | EightBit)
                ):
                    storage = storage_of(state, weight.dtype)
                _check_state(f"{name} {i}", state, weight, weight.shape[: len(letters)], storage)
            lists[name] = column
    check_memory(_tensors(lists), _tensors({name: tensors for name, (tensors, _) in read.items()}))
    return storage


def _check_state(name: str, state: State, weight: Tensor, shape: Sequence[int], storage: str) -> None:
    wanted = EightBit if storage == "8bit" else Tensor
    if not isinstance(state, wanted):
        kind = "an EightBit" if storage == "8bit" else "a tensor"
        raise TypeError(f"{name} must be {kind} like the first state, got {type(state).__name__}")
    if storage == "8bit" and weight.dtype != torch.float32:
        raise TypeError(f"{name} is in 8 bits, which needs a float32 weight, got {weight.dtype}")
    for part in state if storage == "8bit" else (state,):
        check_dense(name, part)
    if storage == "8bit":
        check_like(f"codes of {name}", state.codes, weight, shape, torch.uint8)
        check_like(f"scales of {name}", state.scales, weight, [num_scales(shape)], torch.float32)
    else:
        check_like(name, state, weight, shape, torch.bfloat16 if storage == "bfloat16" else weight.dtype)


def _tensors(columns: dict[str, list[State | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, stored in columns.items():
        for i, state in enumerate(stored):
            for tensor in state if isinstance(state, EightBit) else (state,):
                if tensor is not None:
                    yield f"{name} {i}", tensor
