"""Every instruction set computes the same: each in its own process, chosen by HYPERFAST_ISA."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperfast import ops, reference
from hyperfast.ops._library import _cpu

ROOT = Path(__file__).resolve().parents[1]
KS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 511, 512]
DTYPES = ["float32", "float64", "bfloat16"]

# Runs all ops on seeded inputs, checks next weights, threads and gradients, and saves inputs and results.
SCRIPT = """
import sys, torch
from hyperfast import ops
from hyperfast.ops._library import _cpu
from tests.ops import test_batch_norm_relu_max_pool as batch_norm
isa, path, ks = sys.argv[1], sys.argv[2], [int(k) for k in sys.argv[3].split(",")]
assert _cpu.isa() == isa, _cpu.isa()
row = ops.AdamWCoefficients(0.99, 0.05, 0.9, 0.99, 0.3, 1e-8)
results = {}
for dtype in ("float32", "float64", "bfloat16"):
    g = torch.Generator().manual_seed(1)
    def rand(*shape, normal=True):
        t = torch.randn(shape, generator=g) if normal else torch.rand(shape, generator=g)
        return t.to(getattr(torch, dtype))
    sizes = [(n, k) for k in ks for n in (1, 37, max(1, 16384 // k) + 1)]
    columns = [[rand(n, k), rand(n), rand(k), rand(n)] for n, k in sizes]
    weights, biases, zs, dws = ([c[i] for c in columns] for i in range(4))
    made = ops.generate(weights, biases, zs)
    dzs, norms = ops.generate_backward(weights, dws)
    m, v = [rand(*w.shape) for w in weights], [rand(*w.shape, normal=False) for w in weights]
    bm, bv = [rand(*b.shape) for b in biases], [rand(*b.shape, normal=False) for b in biases]
    new_zs = [rand(*z.shape) for z in zs]
    before = [[t.clone() for t in c] for c in (weights, m, v, biases, bm, bv, dws, zs, new_zs)]
    w = [torch.full_like(b, float("nan")) for b in biases]
    ops.adamw_generate(weights, m, v, biases, bm, bv, dws, zs, new_zs, w, [row] * len(w), [row] * len(w), 0.5)
    again = ops.generate(weights, biases, new_zs)
    assert all(torch.equal(a, b) for a, b in zip(w, again)), "next weights are not what generate makes"
    after = [weights, m, v, biases, bm, bv, w]
    results[dtype] = dict(before=before, made=list(made), dzs=dzs, norms=norms, after=after)
    results[dtype]["batch_norm"] = batch_norm.every_result(getattr(torch, dtype))
weight, bias, z = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (6,), (5,)))
assert torch.autograd.gradcheck(lambda *t: ops.generate(*([x] for x in t)), (weight, bias, z))
from tests.fuzz.run import kernel_outputs
results["random"] = kernel_outputs(100)
torch.save(results, path)
"""


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, isa, *arguments]
    environment = os.environ | {"HYPERFAST_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    found = {}
    for isa in _cpu.isas():
        path = tmp_path_factory.mktemp(isa) / "results.pt"
        done = run(isa, str(path), ",".join(map(str, KS)))
        assert done.returncode == 0, done.stderr[-8000:]
        found[isa] = torch.load(path)
    return found


def test_scalar_is_always_there():
    assert _cpu.isas()[0] == "scalar" and _cpu.isa() in _cpu.isas()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _cpu.isas())
def test_results(isa, dtype, results, assert_accurate):
    got, torch_dtype = results[isa][dtype], getattr(torch, dtype)
    assert all(
        torch.equal(a, b)
        for x, y in zip(got["before"], results["scalar"][dtype]["before"], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    exact, plain = expected(got["before"], torch.float64), expected(got["before"], torch_dtype)
    assert_accurate(got["made"], exact["made"], torch_dtype, plain["made"])
    assert_accurate(got["dzs"], exact["dzs"], torch_dtype, plain["dzs"])
    torch.testing.assert_close(got["norms"], exact["norms"], rtol=1e-13, atol=0)
    for ours, theirs, simple in zip(got["after"], exact["after"], plain["after"], strict=True):
        assert_accurate(ours, theirs, torch_dtype, simple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _cpu.isas())
def test_batch_norm(isa, dtype, results):
    tolerance = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2}[dtype]
    made = zip(results[isa][dtype]["batch_norm"], results["scalar"][dtype]["batch_norm"], strict=True)
    for ours, scalar in made:
        for a, b in zip(ours, scalar, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Random cases: RMS(difference from scalar) / RMS(sums of absolute values), about a unit in the last place.
AGREEMENT = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


@pytest.mark.parametrize("isa", _cpu.isas()[1:])
def test_random_cases_agree(isa, results):
    ours, scalar = results[isa]["random"], results["scalar"]["random"]
    assert list(ours) == list(scalar) and len(ours) > 300
    for name, (made, scale) in ours.items():
        difference = made.double() - scalar[name][0].double()
        assert rms(difference) <= AGREEMENT[made.dtype] * rms(scale), name


def rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()


def expected(before, dtype) -> dict:
    weights, m, v, biases, bm, bv, dws, zs, new_zs = ([t.to(dtype, copy=True) for t in c] for c in before)
    row = ops.AdamWCoefficients(0.99, 0.05, 0.9, 0.99, 0.3, 1e-8)
    made = reference.generate(weights, biases, zs)
    dzs, norms = reference.generate_backward(weights, dws)
    w, rows = [torch.empty_like(b) for b in biases], [row] * len(biases)
    reference.adamw_generate(weights, m, v, biases, bm, bv, dws, zs, new_zs, w, rows, rows, 0.5)
    return {"made": made, "dzs": dzs, "norms": norms, "after": [weights, m, v, biases, bm, bv, w]}


def test_an_unknown_instruction_set_is_one_clear_error():
    done = run("mmx", "unused", "1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "HYPERFAST_ISA=mmx is not available here; choose one of scalar" in last


def test_one_openmp_runtime_is_mapped():
    """Two of them cost 500x on alternating calls."""
    script = "import torch, hyperfast, json; print(json.dumps(open('/proc/self/maps').read()))"
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    paths = set(re.findall(r"/\S*lib(?:g|i)?omp\S*\.so\S*", json.loads(done.stdout)))
    assert len({Path(p).resolve() for p in paths}) == 1, paths
