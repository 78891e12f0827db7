"""Runs cases: `python -m tests.fuzz.run OP SEED [END]`; a failing case names the command that repeats it."""

from __future__ import annotations

import faulthandler
import sys
from collections import Counter
from collections.abc import Callable

from torch import Tensor

from tests.fuzz.harness import Draw, assert_right
from tests.fuzz.lstm import LSTM_OPS
from tests.fuzz.modules import MODULES
from tests.fuzz.network_ops import NETWORK_OPS
from tests.fuzz.ops import GENERATOR_OPS

OPS = {**GENERATOR_OPS, **NETWORK_OPS, **LSTM_OPS}

CASES: dict[str, Callable[[Draw], str]] = {**OPS, **MODULES}


def run(name: str, seeds: range, announce: bool = False) -> Counter:
    """How the cases ended, by count. AssertionError with the seed, from what happened, for the first that
    fails."""
    ends: Counter = Counter()
    for seed in seeds:
        if announce:  # what stands last when the process dies is the case that killed it
            print(f"{name} {seed}", file=sys.stderr, flush=True)
        try:
            ends[CASES[name](Draw(name, seed))] += 1
        except Exception as error:
            command = f"python -m tests.fuzz.run {name} {seed}"
            raise AssertionError(f"{type(error).__name__}: {error}\nrepeat it alone: {command}") from error
    return ends


def kernel_outputs(count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(what a kernel made, scale of its bound) in `count` valid cases of every op, all that are finite."""
    made = {}
    for name, case in OPS.items():
        for seed in range(count):
            for out in case.valid(Draw(name, seed)):
                if out.computed is None and out.got.numel():
                    assert_right(out)
                    made[f"{name} {seed}: {out.name}"] = (out.got.detach(), out.scale)
    return made


if __name__ == "__main__":
    faulthandler.enable()
    first = int(sys.argv[2])
    last = int(sys.argv[3]) if len(sys.argv) > 3 else first + 1
    print(dict(run(sys.argv[1], range(first, last), announce=True)))
