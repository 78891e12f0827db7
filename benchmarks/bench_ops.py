"""Every op against eager PyTorch and against torch.compile of its reference, in one process, interleaved.

Eight layers of together about 80 MB (K = 16: an eighth of `full`), so that no cache holds them.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine import COPY_BYTES, Copy, interleaved, median, paired_ratio
from hyperfast import ops, reference

ELEMENTS = 20_000_000  # generator weights of all layers together
LAYERS = 8
COEFFICIENTS = ops.AdamWCoefficients(1 - 1e-7, 1e-3, 0.9, 0.999, 0.5, 1e-8)


def layers(K: int) -> list[tuple[torch.Tensor, ...]]:
    """weight, exp_avg, exp_avg_sq [N, K], bias and its moments [N], dw [N], z, new_z [K], next weight [N] for
    each layer."""
    torch.manual_seed(0)
    N = ELEMENTS // LAYERS // K
    made = []
    for _ in range(LAYERS):
        matrices = torch.randn(N, K), torch.randn(N, K) * 1e-3, torch.rand(N, K) * 1e-6
        vectors = torch.randn(N), torch.randn(N) * 1e-3, torch.rand(N) * 1e-6, torch.randn(N)
        made.append((*matrices, *vectors, torch.randn(K), torch.randn(K), torch.empty(N)))
    return made


def columns(K: int) -> list[list[torch.Tensor]]:
    return [list(column) for column in zip(*layers(K), strict=True)]


def run(benchmark, report, name: str, K: int, functions: dict, size: int) -> None:
    """Times the functions and a copy in turns and reports ratios and the share of copy bandwidth."""
    copy = Copy()
    times = {}

    def rounds() -> None:
        times.update(interleaved({**functions, "copy": copy}, 9))

    benchmark.pedantic(rounds, rounds=1)
    share = size / median(times["hyperfast"]) / (COPY_BYTES / median(times["copy"]))
    ratios = {way: paired_ratio(times[way], times["hyperfast"]) for way in ("eager", "compiled")}
    row = [f"{1e3 * median(times['hyperfast']):.1f} ms", *(f"{ratio:.2f}" for ratio in ratios.values())]
    header = ["hyperfast", "eager / hyperfast", "compiled reference / hyperfast", "copy bandwidth"]
    report(f"{name}, K = {K}, 20 M weights, float32", header, [[*row, f"{100 * share:.0f} %"]])
    benchmark.extra_info |= {f"{way} / hyperfast": ratio for way, ratio in ratios.items()}
    benchmark.extra_info["copy bandwidth share"] = share


@pytest.mark.parametrize("K", [4, 16, 64])
def bench_generate(benchmark, report, K):
    weights, _, _, biases, _, _, _, zs, _, _ = columns(K)
    compiled = torch.compile(reference.generate, dynamic=False)
    functions = {
        "eager": lambda: reference.generate(weights, biases, zs),
        "compiled": lambda: compiled(weights, biases, zs),
        "hyperfast": lambda: ops.generate(weights, biases, zs),
    }
    with torch.no_grad():
        for a, b in zip(functions["eager"](), functions["hyperfast"](), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        run(benchmark, report, "generate", K, functions, 4 * ELEMENTS)


@pytest.mark.parametrize("K", [4, 16, 64])
def bench_generate_backward(benchmark, report, K):
    weights, _, _, _, _, _, dws, _, _, _ = columns(K)
    compiled = torch.compile(reference.generate_backward, dynamic=False)
    functions = {
        "eager": lambda: reference.generate_backward(weights, dws),
        "compiled": lambda: compiled(weights, dws),
        "hyperfast": lambda: ops.generate_backward(weights, dws),
    }
    for a, b in zip(functions["eager"]()[0], functions["hyperfast"]()[0], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-1)
    run(benchmark, report, "generate_backward", K, functions, 4 * ELEMENTS)


@pytest.mark.parametrize("K", [4, 16, 64])
def bench_adamw_generate(benchmark, report, K):
    states = {way: columns(K) for way in ("eager", "compiled", "hyperfast")}
    compiled = torch.compile(reference.adamw_generate, dynamic=False)
    rows = [COEFFICIENTS] * LAYERS
    functions = {
        "eager": lambda: reference.adamw_generate(*states["eager"], rows, rows),
        "compiled": lambda: compiled(*states["compiled"], rows, rows),
        "hyperfast": lambda: ops.adamw_generate(*states["hyperfast"], rows, rows),
    }
    for function in functions.values():
        function()
    for a, b in zip(states["eager"][0], states["hyperfast"][0], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    run(benchmark, report, "adamw_generate", K, functions, 24 * ELEMENTS)
