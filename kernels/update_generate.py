"""update_generate: an optimizer's update from the gradient dw outer z, and the next weights, in one pass.

Floor for each float32 generator weight: 8 bytes (read, written) and 8 for each float32 state, 4 for each
bfloat16, 2 for each 8-bit one: 24 with AdamW, 28 with generate_backward. The gradient is formed in
registers and the next forward reads no generator: w is bit for bit what generate would return after the
update (rows.py).

A program updates one tile of one layer, a launch all layers of one K. Everything a tile needs is asked for
before its first use and before anything is stored: with AdamW six float4 for each thread. A multiprocessor
of an H100 has room for five or six programs of 128 threads with 80 to 90 registers: over 60 KB in flight,
where 18 KB (3.35 TB/s times 0.7 us, over 132) hide the latency. Sixteen elements a thread took 150
registers and left room for 256 threads. All streams are cut alike, four elements of a float32 weight for a
thread beside the four of each state, hence 16, 8 or 4 bytes an access. Weight and states are read and
written once a step, `full` has twenty times the L2 cache of them: their lines are the first to leave it,
which keeps dw, w and what the main network reads. Tile and warps await a measurement on a GPU.

8-bit states share scales in groups of rows that lie within a tile; their largest values go through shared
memory, a float for each row. Where a tile has fewer rows than share a scale of the bias (K > 32), biases
take a small launch of their own before.

Coefficients, grad_scale, seeds and skip are read from memory, so that a CUDA graph holds the step;
differences and inverses of coefficients are formed in float64. Exact states (float32, float64, those of
half-precision weights) take IEEE's square root and quotient; beside stochastically rounded ones the fast
ones do, within two units of the last place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast import reference
from hyperfast.kernels.launch import TRITON_TYPES, Launch, compute_type
from hyperfast.kernels.rows import by_layout, row_sums, row_tile, tile
from hyperfast.kernels.segments import check_aligned, find_segment, pointer, segments
from hyperfast.kernels.state_storage import load_state, random_bits, store_state
from hyperfast.states import rows_per_scale

ELEMENTS, WARPS = 1024, 4  # of a tile, 8 for each thread
FIELDS = {"adam": len(reference.AdamWCoefficients._fields), "sgd": len(reference.SGDCoefficients._fields)}
STATE_SIZE = {"bfloat16": 2, "8bit": 1}  # bytes


@triton.jit
def adam(p, m, v, g, c_ptr, EXACT: tl.constexpr):
    """(p, m, v) after a step; c_ptr: a row of AdamWCoefficients."""
    COMPUTE: tl.constexpr = p.dtype
    decay, step_size = tl.load(c_ptr).to(COMPUTE), tl.load(c_ptr + 1).to(COMPUTE)
    beta2 = tl.load(c_ptr + 3)
    one_minus_beta1, one_minus_beta2 = (1.0 - tl.load(c_ptr + 2)).to(COMPUTE), (1.0 - beta2).to(COMPUTE)
    inverse_correction2 = (1.0 / tl.load(c_ptr + 4)).to(COMPUTE)
    eps, l2 = tl.load(c_ptr + 5).to(COMPUTE), tl.load(c_ptr + 6).to(COMPUTE)

    g += l2 * p
    m += one_minus_beta1 * (g - m)
    v = beta2.to(COMPUTE) * v + one_minus_beta2 * g * g
    if EXACT and COMPUTE == tl.float32:
        move = tl.div_rn(step_size * m, tl.sqrt_rn(v) * inverse_correction2 + eps)
    else:
        move = step_size * m / (tl.sqrt(v) * inverse_correction2 + eps)
    return decay * p - move, m, v


@triton.jit
def sgd(p, buffer, g, c_ptr, MOMENTUM: tl.constexpr):
    """(p, buffer) after a step; c_ptr: a row of SGDCoefficients."""
    COMPUTE: tl.constexpr = p.dtype
    lr, l2 = tl.load(c_ptr).to(COMPUTE), tl.load(c_ptr + 1).to(COMPUTE)
    g += l2 * p
    if MOMENTUM:
        keep, take = tl.load(c_ptr + 2).to(COMPUTE), tl.load(c_ptr + 3).to(COMPUTE)
        gradient, of_buffer = tl.load(c_ptr + 4).to(COMPUTE), tl.load(c_ptr + 5).to(COMPUTE)
        buffer = keep * buffer + take * g
        g = gradient * g + of_buffer * buffer
    return p - lr * g, buffer


@triton.jit
def updated(p, s0, s1, g, c_ptr, STATES: tl.constexpr, EXACT: tl.constexpr):
    """Parameter and states after a step."""
    if STATES == 2:
        p, s0, s1 = adam(p, s0, s1, g, c_ptr, EXACT)
    else:
        p, s0 = sgd(p, s0, g, c_ptr, STATES == 1)
    return p, s0, s1


@triton.jit
def load_parameter(
    row_ptr, field: tl.constexpr, first, offs, mask, in_states, STATES: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    MULTIPLE: tl.constexpr, STATE_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """A tile of a parameter and its two states, whose addresses are five fields of the row; zeros for the
    states that the rule has not. in_states [BLOCK_N]: which rows have any."""
    ptr = pointer(row_ptr, field, DTYPE, MULTIPLE) + first * K
    p = tl.load(ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
    s0 = tl.zeros(offs.shape, COMPUTE)
    s1 = tl.zeros(offs.shape, COMPUTE)
    mask_states = mask & (in_states[:, None] if len(offs.shape) == 2 else in_states)
    if STATES > 0:
        s0 = load_state(
            row_ptr, field + 1, first, offs, mask_states, in_states, True, K, GROUP, STORAGE, DTYPE, COMPUTE,
            STATE_MULTIPLE,
        )  # fmt: skip
    if STATES > 1:
        s1 = load_state(
            row_ptr, field + 3, first, offs, mask_states, in_states, False, K, GROUP, STORAGE, DTYPE,
            COMPUTE, STATE_MULTIPLE,
        )  # fmt: skip
    return p, s0, s1


@triton.jit
def store_parameter(
    row_ptr, field: tl.constexpr, first, offs, mask, rows, p, s0, s1, seed, counted_from,
    STATES: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr, STATE_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The way back. counted_from: number of the tile's first element, for its rounding."""
    ptr = pointer(row_ptr, field, DTYPE, MULTIPLE) + first * K
    tl.store(ptr + offs, p.to(DTYPE), mask=mask, eviction_policy="evict_first")
    random = random_bits(seed, counted_from.to(tl.uint32) + offs.to(tl.uint32))
    if STATES > 0:
        store_state(
            row_ptr, field + 1, first, offs, mask, rows, s0, random, True, K, GROUP, STORAGE, DTYPE,
            STATE_MULTIPLE,
        )  # fmt: skip
    if STATES > 1:
        store_state(
            row_ptr, field + 3, first, offs, mask, rows, s1, random, False, K, GROUP, STORAGE, DTYPE,
            STATE_MULTIPLE,
        )  # fmt: skip


@triton.jit
def step_of_layer(row_ptr, grad_scale_ptr, seeds_ptr, skip_ptr, COMPUTE: tl.constexpr):
    """(N, rows to update: none of a skipped step, rows of a bias to update, layer, seed, grad_scale)"""
    N, layer = tl.load(row_ptr + 14), tl.load(row_ptr + 16)
    updated_rows = N
    if skip_ptr is not None:
        updated_rows = tl.where(tl.load(skip_ptr) == 0, N, 0)
    trained_rows = tl.where(tl.load(row_ptr + 15) != 0, updated_rows, 0)
    seed = tl.load(seeds_ptr + layer).to(tl.uint32)
    return N, updated_rows, trained_rows, layer, seed, tl.load(grad_scale_ptr).to(COMPUTE)


@triton.jit
def update_generate_kernel(
    rows_ptr,
    starts_ptr,
    L,
    coefficients_ptr,
    bias_coefficients_ptr,
    grad_scale_ptr,
    seeds_ptr,
    skip_ptr,
    BLOCK_L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    FIELDS: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS_GROUP: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    STATE_MULTIPLE: tl.constexpr,
):
    """WITH_BIAS False: biases are added as they are."""
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 17, BLOCK_L)
    N, updated_rows, trained_rows, layer, seed, grad_scale = step_of_layer(
        row_ptr, grad_scale_ptr, seeds_ptr, skip_ptr, COMPUTE
    )
    EXACT: tl.constexpr = STORAGE == "plain"
    first = block.to(tl.int64) * BLOCK_N
    offs, mask = row_tile(N - first, K, BLOCK_K, BLOCK_N)
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_n, in_k = offs_n < N - first, offs_k < K

    p, s0, s1 = load_parameter(
        row_ptr, 0, first, offs, mask, in_n, STATES, K, GROUP, STORAGE, DTYPE, COMPUTE, MULTIPLE,
        STATE_MULTIPLE,
    )  # fmt: skip
    in_trained = offs_n < trained_rows - first
    b, b0, b1 = load_parameter(
        row_ptr, 5, first, offs_n, in_n, in_trained, STATES if WITH_BIAS else 0, 1, BIAS_GROUP, STORAGE,
        DTYPE, COMPUTE, 1, 1,
    )  # fmt: skip
    g = tl.load(pointer(row_ptr, 10, DTYPE) + first + offs_n, mask=in_n, other=0.0).to(COMPUTE) * grad_scale
    z = tl.load(pointer(row_ptr, 11, DTYPE) + offs_k, mask=in_k, other=0.0).to(COMPUTE)
    new_z = tl.load(pointer(row_ptr, 12, DTYPE) + offs_k, mask=in_k, other=0.0).to(COMPUTE)

    # A tile of a bias has fewer elements than threads: all load it, some store it. None may before all have.
    tl.debug_barrier()
    if updated_rows > 0:
        c_ptr = coefficients_ptr + layer * FIELDS
        p, s0, s1 = updated(p, s0, s1, g[:, None] * z[None, :], c_ptr, STATES, EXACT)
        p = p.to(DTYPE).to(COMPUTE)  # generate will read it so
        store_parameter(
            row_ptr, 0, first, offs, mask, N - first, p, s0, s1, seed, first * K, STATES, K, GROUP, STORAGE,
            DTYPE, MULTIPLE, STATE_MULTIPLE,
        )  # fmt: skip
    w = row_sums(p, new_z)
    if WITH_BIAS:
        if trained_rows > 0:
            c_ptr = bias_coefficients_ptr + layer * FIELDS
            b, b0, b1 = updated(b, b0, b1, g, c_ptr, STATES, EXACT)
            b = b.to(DTYPE).to(COMPUTE)
            store_parameter(
                row_ptr, 5, first, offs_n, in_n, N - first, b, b0, b1, seed, N * K + first, STATES, 1,
                BIAS_GROUP, STORAGE, DTYPE, 1, 1,
            )  # fmt: skip
    tl.store(pointer(row_ptr, 13, DTYPE) + first + offs_n, (w + b).to(DTYPE), mask=in_n)


@triton.jit
def update_generate_bias_kernel(
    rows_ptr,
    starts_ptr,
    L,
    bias_coefficients_ptr,
    grad_scale_ptr,
    seeds_ptr,
    skip_ptr,
    BLOCK_L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    FIELDS: tl.constexpr,
    STORAGE: tl.constexpr,
    BIAS_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The biases by themselves, where fewer rows than share a scale make a tile of the weight."""
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 17, BLOCK_L)
    N, _, trained_rows, layer, seed, grad_scale = step_of_layer(
        row_ptr, grad_scale_ptr, seeds_ptr, skip_ptr, COMPUTE
    )
    first = block.to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < trained_rows - first
    b, b0, b1 = load_parameter(
        row_ptr, 5, first, offs_n, mask, mask, STATES, 1, BIAS_GROUP, STORAGE, DTYPE, COMPUTE, 1, 1
    )
    g = tl.load(pointer(row_ptr, 10, DTYPE) + first + offs_n, mask=mask, other=0.0).to(COMPUTE) * grad_scale
    c_ptr = bias_coefficients_ptr + layer * FIELDS
    b, b0, b1 = updated(b, b0, b1, g, c_ptr, STATES, STORAGE == "plain")
    store_parameter(
        row_ptr, 5, first, offs_n, mask, trained_rows - first, b, b0, b1, seed, N * K + first, STATES, 1,
        BIAS_GROUP, STORAGE, DTYPE, 1, 1,
    )  # fmt: skip


class _Group(NamedTuple):
    """Layers that share a launch. multiples: of the addresses of weights and of states."""

    K: int
    multiples: tuple[int, int]


def _groups(table: Sequence[tuple[int, ...]], multiple: int) -> dict[_Group, list[tuple[int, ...]]]:
    """Rows of the kernels: those of the table without K, but with the number of their layer. multiple: bytes
    of a state beside 16 bytes of the weight."""
    ordered = [(*row[:14], row[16], layer, row[14], row[15]) for layer, row in enumerate(table)]
    found: dict[_Group, list[tuple[int, ...]]] = {}
    for (K, is_aligned), rows in by_layout(ordered).items():
        for row in rows:
            vectors = is_aligned and row[1] % multiple == 0 and row[3] % multiple == 0
            group = _Group(K, (16 if is_aligned else 1, multiple if vectors else 1))
            found.setdefault(group, []).append((*row[:14], row[16], row[14], row[15]))
    return found


def launches(
    table: Sequence[tuple[int, ...]],
    coefficients: Tensor,
    bias_coefficients: Tensor,
    rule: str,
    storage: str,
    grad_scale: Tensor,
    seeds: Tensor,
    skip: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Launch]:
    """table: (weight [N, K], state, its scales, second state, its scales, bias [N], its four, dw [N], z [K],
    new z [K], next weights [N], N, K, whether the bias is trained) for each layer, addresses of contiguous
    memory on `device`, 0 for what is not there. rule: "adam" or "sgd"; storage: "plain", "bfloat16" or
    "8bit", beside float32 only. coefficients, bias_coefficients: float64 [L, fields of the rule's row];
    grad_scale: float64 []; seeds: int64 [L] of 32 bits; skip: float32 [], where it is not 0 only the next
    weights are written. ValueError for an address between elements and for low-precision states beside other
    dtypes."""
    if storage != "plain" and dtype != torch.float32:
        raise ValueError(f"states are stored as {storage} beside float32 weights only, got {dtype}")
    size = dtype.itemsize
    state_size = STATE_SIZE.get(storage, size)
    for fields, of_element in (((0, 5, 10, 11, 12, 13), size), ((1, 3, 6, 8), state_size), ((2, 4, 7, 9), 4)):
        check_aligned((row[field] for row in table for field in fields), of_element)
    states = 2 if rule == "adam" else int(any(row[1] for row in table))
    numbers = {"bias_coefficients_ptr": bias_coefficients, "grad_scale_ptr": grad_scale}
    numbers |= {"seeds_ptr": seeds, "skip_ptr": skip}
    common = {"STATES": states, "FIELDS": FIELDS[rule], "STORAGE": storage, "BIAS_GROUP": rows_per_scale(1)}
    common |= {"DTYPE": TRITON_TYPES[dtype], "COMPUTE": compute_type(dtype)}
    for (K, multiples), rows in _groups(table, 16 // size * state_size).items():
        shape = tile(K, ELEMENTS)
        with_bias = storage != "8bit" or shape["BLOCK_N"] >= rows_per_scale(1)
        if not with_bias:
            made = segments(rows, [triton.cdiv(row[14], ELEMENTS) for row in rows], device)
            arguments = made.arguments() | numbers | common | {"K": K, "BLOCK_N": ELEMENTS}
            yield Launch(update_generate_bias_kernel, (made.blocks,), arguments, WARPS, fp_fusion=False)
        made = segments(rows, [triton.cdiv(row[14], shape["BLOCK_N"]) for row in rows], device)
        constants = common | shape | {"GROUP": rows_per_scale(K), "WITH_BIAS": with_bias}
        constants |= {"MULTIPLE": multiples[0], "STATE_MULTIPLE": multiples[1]}
        arguments = made.arguments() | numbers | {"coefficients_ptr": coefficients} | constants
        yield Launch(update_generate_kernel, (made.blocks,), arguments, WARPS, fp_fusion=False)


def run(*arguments) -> None:
    """Updates in place and fills next weights; arguments of `launches`."""
    for launch in launches(*arguments):
        launch.run()


def examples() -> list[tuple[str, Launch]]:
    """Named launches to compile without a GPU: `full` first."""
    found = []
    for name, rule, storage, N, K, dtype, address in (
        ("full, AdamW, float32", "adam", "plain", 1_179_648, 16, torch.float32, 16),
        ("full, AdamW, 8-bit states", "adam", "8bit", 1_179_648, 16, torch.float32, 16),
        ("full, AdamW, bfloat16 states", "adam", "bfloat16", 1_179_648, 16, torch.float32, 16),
        ("K 16, AdamW, bfloat16", "adam", "plain", 4099, 16, torch.bfloat16, 16),
        ("K 16, SGD with momentum, float32", "sgd", "plain", 4099, 16, torch.float32, 16),
        ("K 512, AdamW, 8-bit states", "adam", "8bit", 4099, 512, torch.float32, 16),
        ("K 17, AdamW, 8-bit states, misaligned", "adam", "8bit", 4099, 17, torch.float32, 4),
        ("K 100, AdamW, float64", "adam", "plain", 4099, 100, torch.float64, 16),
    ):
        rows, bias_rows = (torch.zeros(8, FIELDS[rule], dtype=torch.float64) for _ in range(2))
        scale, seeds, skip = (
            torch.ones((), dtype=torch.float64),
            torch.zeros(8, dtype=torch.int64),
            torch.zeros(()),
        )
        table = [(*[address] * 14, N, K, 1)] * 8
        made = launches(table, rows, bias_rows, rule, storage, scale, seeds, skip, dtype, torch.device("cpu"))
        found += [(name, launch) for launch in made]
    return found
