"""`update_generate`: an optimizer's update of rank-one generator gradients and the next weights, in one pass.

The op behind `adamw_generate` and `sgd_generate`, and the checks they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _cpu,
    _cuda,
    check_backend,
    check_dense,
    check_generators,
    check_like,
    check_memory,
    dtype_name,
    generator_engine,
    library,
    to_device,
    triton_kernels,
)
from hyperfast.states import EightBit, State, num_scales, storage_of

# states and scales: the first state of all layers, then the second. Scales are empty unless states are in 8
# bits; the states of a bias that is not trained are empty tensors. Whatever changes from step to step is a
# tensor on the weights' device, so that a CUDA graph can hold the step: coefficients and bias_coefficients
# float64 [L, fields of the NamedTuple], grad_scale float64 [], seeds int64 [L] of 32 bits, skip float32
# [] (not zero: only next_weights are written, from the weights as they are).
library.define(
    "update_generate(str rule, Tensor(a!)[] weights, Tensor(b!)[] states, Tensor(c!)[] scales, "
    "Tensor(d!)[] biases, Tensor(e!)[] bias_states, Tensor(f!)[] bias_scales, Tensor[] dws, Tensor[] zs, "
    "Tensor[] new_zs, Tensor(g!)[] next_weights, Tensor coefficients, Tensor bias_coefficients, "
    "bool[] bias_is_trained, Tensor grad_scale, Tensor seeds, Tensor? skip) -> ()"
)
ROWS = {"adam": reference.AdamWCoefficients, "sgd": reference.SGDCoefficients}


def _columns(tensors: list[Tensor], scales: list[Tensor], L: int) -> list[list[State]]:
    """One list over the layers for each state."""
    stored = [EightBit(*pair) for pair in zip(tensors, scales, strict=True)] if scales else tensors
    return [stored[i : i + L] for i in range(0, len(stored), L)]


@torch.library.impl(library, "update_generate", "CompositeExplicitAutograd")
def _update_reference(
    rule, weights, states, scales, biases, bias_states, bias_scales, dws, zs, new_zs, next_weights,
    coefficients, bias_coefficients, bias_is_trained, grad_scale, seeds, skip,
):  # fmt: skip
    L = len(weights)
    columns, bias_columns = _columns(states, scales, L), _columns(bias_states, bias_scales, L)
    bias_columns = [[t if trained else None for t, trained in zip(column, bias_is_trained, strict=True)]
                    for column in bias_columns]  # fmt: skip
    numbers = (coefficients, bias_coefficients, grad_scale, seeds, skip)
    arguments = (dws, zs, new_zs, next_weights, *numbers)
    if rule == "adam":
        reference.adamw_generate(weights, *columns, biases, *bias_columns, *arguments)
        return
    columns, bias_columns = columns or [[None] * L], bias_columns or [[None] * L]
    reference.sgd_generate(weights, *columns, biases, *bias_columns, *arguments, bias_is_trained)


@torch.library.impl(library, "update_generate", "CPU")
@torch.library.impl(library, "update_generate", "CUDA")
def _update_native(*args):
    (rule, weights, states, scales, biases, bias_states, bias_scales, dws, zs, new_zs, next_weights,
     coefficients, bias_coefficients, bias_is_trained, grad_scale, seeds, skip) = args  # fmt: skip
    engine = generator_engine(weights, cuda="update_generate")
    if engine == "reference":
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

    table = [
        (
            weights[i].data_ptr(), *addresses(states, scales, i), biases[i].data_ptr(),
            *addresses(bias_states, bias_scales, i), dws[i].data_ptr(), zs[i].data_ptr(),
            new_zs[i].data_ptr(), next_weights[i].data_ptr(), *weights[i].shape, int(bias_is_trained[i]),
        )
        for i in range(L)
    ]  # fmt: skip
    storage = "8bit" if scales else storage_of(states[0], weights[0].dtype) if states else "plain"
    numbers = [t.contiguous() for t in (coefficients, bias_coefficients, grad_scale, seeds)]
    {"cpu": _on_cpu, "triton": _on_triton, "cuda": _on_cuda}[engine](
        table, rule, storage, *numbers, skip, weights[0]
    )


def _on_cpu(table, rule, storage, coefficients, bias_coefficients, grad_scale, seeds, skip, weight) -> None:
    dtype, threads = dtype_name(weight), torch.get_num_threads()
    if skip is not None and skip.item() != 0:
        rows = [(row[0], row[5], row[12], row[13], row[14], row[15]) for row in table]
        _cpu.generate(rows, dtype, threads)
        return
    rows = [(*row, seed) for row, seed in zip(table, seeds.tolist(), strict=True)]
    _cpu.update_generate(
        rows, coefficients.tolist(), bias_coefficients.tolist(), rule, storage, grad_scale.item(), dtype,
        threads,
    )  # fmt: skip


def _on_triton(table, rule, storage, coefficients, bias_coefficients, grad_scale, seeds, skip, weight):
    triton_kernels("update_generate").run(
        table, coefficients, bias_coefficients, rule, storage, grad_scale, seeds, skip, weight.dtype,
        weight.device,
    )  # fmt: skip


def _on_cuda(table, rule, storage, coefficients, bias_coefficients, grad_scale, seeds, skip, weight) -> None:
    with torch.cuda.device(weight.device):
        _cuda.update_generate(
            table, coefficients.data_ptr(), bias_coefficients.data_ptr(), rule, storage,
            grad_scale.data_ptr(), seeds.data_ptr(), 0 if skip is None else skip.data_ptr(),
            dtype_name(weight), torch.cuda.current_stream().cuda_stream,
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
    coefficients: list[NamedTuple] | Tensor
    bias_coefficients: list[NamedTuple | None] | Tensor
    grad_scale: float | Tensor
    seeds: list[int] | Tensor | None
    skip: Tensor | None


def listed(numbers: Iterable | None) -> list | Tensor | None:
    """A list, but a tensor or None as it is."""
    return numbers if numbers is None or isinstance(numbers, Tensor) else list(numbers)


def update_generate(u: Update, backend: str) -> None:
    """Checks `u`, then updates in place. Raises ValueError or TypeError before anything is changed."""
    check_backend(backend)
    storage = _check(u)
    numbers = _numbers(u)
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
        u.rule,
        u.weights,
        *states,
        u.biases,
        *bias_states,
        u.dws,
        u.zs,
        u.new_zs,
        u.next_weights,
        *numbers,
    )
    with torch.no_grad():
        if backend == "reference":
            _update_reference(*arguments)
            return
        torch.ops.hyperfast.update_generate(*arguments)
        # raw kernels do not: autograd must notice that saved tensors were overwritten
        written = (u.weights, *states, u.biases, *bias_states, u.next_weights)
        torch.autograd.graph.increment_version([t for column in written for t in column if t is not empty])


def _numbers(u: Update) -> tuple:
    """The op's arguments from coefficients on; ValueError or TypeError for what is not of its shape."""
    kind, L = ROWS[u.rule], len(u.weights)
    device = u.weights[0].device if L else torch.device("cpu")
    untrained = kind(*[0.0] * len(kind._fields))
    bias_rows = u.bias_coefficients
    if not isinstance(bias_rows, Tensor):
        bias_rows = [c if t else untrained for c, t in zip(bias_rows, u.bias_is_trained, strict=True)]
    coefficients = _table("coefficients", u.coefficients, kind, L, device)
    bias_coefficients = _table("bias_coefficients", bias_rows, kind, L, device)
    scale = u.grad_scale if isinstance(u.grad_scale, Tensor) else float(u.grad_scale)
    grad_scale = _numeric("grad_scale", scale, torch.float64, [], device)
    seeds = [0] * L if u.seeds is None else u.seeds
    seeds = seeds if isinstance(seeds, Tensor) else [int(seed) for seed in seeds]
    seeds = _numeric("seeds", seeds, torch.int64, [L], device)
    skip = None if u.skip is None else _numeric("skip", u.skip, torch.float32, [], device)
    return coefficients, bias_coefficients, list(u.bias_is_trained), grad_scale, seeds, skip


def _table(name: str, rows: Sequence[Sequence[float]] | Tensor, kind: type, L: int, device: torch.device):
    """float64 [L, fields of `kind`]."""
    fields = len(kind._fields)
    if not isinstance(rows, Tensor):
        for i, row in enumerate(rows):
            if len(row) != fields:
                raise ValueError(f"{name} {i} must be {fields} numbers, got {len(row)}")
        rows = [[float(x) for x in row] for row in rows]
        return _numeric(name, rows, torch.float64, [L, fields] if L else [0], device)
    return _numeric(name, rows, torch.float64, [L, fields], device)


def _numeric(name: str, value, dtype: torch.dtype, shape: list[int], device: torch.device) -> Tensor:
    """`value` as a tensor on `device`. A tensor must be there already, of that shape; a float may be another
    float."""
    if not isinstance(value, Tensor):
        return to_device(value, dtype, device)
    if list(value.shape) != shape:
        raise ValueError(f"{name} must be {shape} as a tensor, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the weights, got {value.device}")
    if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point and not shape):
        raise TypeError(f"{name} must be {dtype} as a tensor, got {value.dtype}")
    return value.to(dtype)


def _check(u: Update) -> str:
    """ValueError or TypeError for anything native code must not see; returns how states are stored."""
    lists = {"weight": u.weights, "bias": u.biases, "next_weight": u.next_weights}
    read = {"dw": (u.dws, "N"), "z": (u.zs, "K"), "new_z": (u.new_zs, "K")}
    plain = {"bias": (u.biases, "N"), "next_weight": (u.next_weights, "N")}
    check_generators(u.weights, **plain, **read)
    counted = {"coefficients": u.coefficients, "bias_coefficients": u.bias_coefficients, "seeds": u.seeds}
    counted["bias_is_trained"] = u.bias_is_trained
    for name, column in counted.items():
        if isinstance(column, list) and len(column) != len(u.weights):
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
