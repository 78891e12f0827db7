"""What the Triton kernels take of a GPU, compiled without one: python -m hyperfast.kernels.resources

One line for each example of each kernel and GPU: registers of a thread, bytes of its stack (spilled
registers: 0 is wanted), bytes of shared memory and threads of a block, and how many blocks fit a
multiprocessor.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import hyperfast.kernels
from hyperfast.kernels.launch import SHARED_LIMITS, Launch, Resources

REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes of each block


def examples() -> Iterator[tuple[str, str, Launch]]:
    """(module, name, launch) of every module of `hyperfast.kernels` that has examples."""
    for found in pkgutil.iter_modules(hyperfast.kernels.__path__):
        if found.name != "resources":
            module = importlib.import_module(f"hyperfast.kernels.{found.name}")
            for name, launch in getattr(module, "examples", list)():
                yield found.name, name, launch


def blocks_per_multiprocessor(resources: Resources, capability: int) -> int:
    """How many blocks fit by registers, shared memory and threads."""
    warps = resources.threads // 32
    of_warp = -(-resources.registers * 32 // 256) * 256  # registers are given out in units of 256
    shared = SHARED_LIMITS[capability] + RESERVED
    return min(
        REGISTERS // of_warp // warps,
        shared // (resources.shared + RESERVED),
        THREADS // resources.threads,
        BLOCKS,
    )


def main() -> None:
    """Prints the table."""
    columns = "{:<28} {:<44} {:>5} {:>9} {:>5} {:>7} {:>7} {:>9}"
    print(columns.format("kernel", "example", "sm", "registers", "stack", "shared", "threads", "blocks/SM"))
    for _, name, launch in examples():
        for capability in SHARED_LIMITS:
            r = launch.compile(capability)
            blocks = blocks_per_multiprocessor(r, capability)
            kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
            print(
                columns.format(kernel, name, capability, r.registers, r.stack, r.shared, r.threads, blocks),
                flush=True,
            )


if __name__ == "__main__":
    main()
