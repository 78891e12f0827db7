"""What the machine is and can do: the roofs that every time is held against."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarks.gpu.record import Context
from benchmarks.gpu.timing import Copy, graphs_in_turns
from benchmarks.machine import median
from hyperfast import info

NODES = 1000  # of the graph whose nodes do next to nothing
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "TF32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def describe(device: torch.device) -> dict[str, str]:
    """Names and versions, by what they are of."""
    found = info.collect()
    names = {"GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none"}
    names |= {"driver": _driver(), "torch": f"{found['torch']} (CUDA {torch.version.cuda})"}
    names |= {"triton": str(found["triton"]), "nvcc": str(found["cuda"].get("nvcc", "not built with nvcc"))}
    return names | {"python": found["python"]}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or f"nvidia-smi: {done.stderr.strip()[:80]}"


def matrix_rates(device: torch.device, size: int, rounds: int) -> dict[str, float]:
    """Floating-point operations a second of a size^3 product of random matrices, by precision."""
    rates = {}
    before = torch.get_float32_matmul_precision()
    for name, (dtype, precision) in PRECISIONS.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = graphs_in_turns({name: lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, rounds)
        rates[name] = 2 * size**3 / median(times[name])
    torch.set_float32_matmul_precision(before)
    return rates


def seconds_of_a_node(device: torch.device, rounds: int) -> float:
    """Of a CUDA graph, where the node is a kernel with one element."""
    one = torch.zeros((), device=device)

    def nodes() -> None:
        for _ in range(NODES):
            one.add_(1)

    return median(graphs_in_turns({"nodes": nodes}, device, rounds)["nodes"]) / NODES


def measure(context: Context, device: torch.device, copied: int, size: int, rounds: int) -> None:
    """Copies of `copied` bytes, products of size^3."""
    copy = Copy(device, copied)
    bandwidth = copy.moved / median(graphs_in_turns({"copy": copy}, device, rounds)["copy"])
    context.fact(copy_bytes_per_second=bandwidth)
    rates = matrix_rates(device, size, max(rounds // 3, 1))
    node = seconds_of_a_node(device, max(rounds // 3, 1))
    context.fact(operations_per_second=rates, seconds_of_a_graph_node=node)
    products = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.items())
    context.line(
        f"copy {bandwidth / 1e9:.0f} GB/s (bytes read + written); a kernel in a graph {1e6 * node:.2f} us"
    )
    context.line(f"products of {size}^3, TFLOP/s: {products}")
    rows = [[f"copy of {copied >> 20} MiB, bytes read and written", f"{bandwidth / 1e9:.0f} GB/s"]]
    rows += [[f"{size}^3 product, {name}", f"{rate / 1e12:.1f} TFLOP/s"] for name, rate in rates.items()]
    rows.append([f"kernel with one element, one of {NODES} in a CUDA graph", f"{1e6 * node:.2f} us"])
    context.table("What the machine can do", ["what", "median"], rows)


def run(context: Context) -> None:
    device = torch.device("cuda")
    context.fact(machine=describe(device))
    measure(context, device, copied=1 << 30, size=8192, rounds=30)
