"""`python -m benchmarks.gpu --out DIR`: see the package. Exit status 0 if every part worked or had nothing to
do, 1 if one did not, 2 for wrong options or where there is no GPU."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.parts import PARTS, Outcome, Part, run_in_process


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.gpu", description="Build, test and measure on one GPU.")
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (%(default)s)")
    p.add_argument(
        "--parts", type=chosen, default=PARTS, metavar="A,B", help="only these, in the usual order"
    )
    p.add_argument("--data", type=Path, help="folder with CIFAR-100; otherwise HYPERFAST_DATA")
    p.add_argument("--list", action="store_true", help="name the parts and end")
    return p


def chosen(names: str) -> tuple[Part, ...]:
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in {part.name for part in PARTS}]:
        known = ", ".join(part.name for part in PARTS)
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(unknown)}; there are {known}")
    return tuple(part for part in PARTS if part.name in wanted)


def run_parts(parts: Sequence[Part], out: Path, data: Path | None) -> list[Outcome]:
    """One after the other, each with a line on stderr; after each, what is known so far is written."""
    outcomes = []
    for part in parts:
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        outcomes.append(run_in_process(part, out, data))
        report.write(outcomes, out)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = parser()
    args = options.parse_args(arguments)
    if args.list:
        for part in PARTS:
            print(f"{part.name:<10}{part.seconds:4.0f} s  {part.what}")
        return 0
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.error(f"--out {args.out}: {error.strerror or error}")
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work is ended too
    outcomes = run_parts(args.parts, out, args.data and args.data.resolve())
    print("\n".join(report.terminal_lines(outcomes, out, report.MOST_LINES - len(args.parts))), flush=True)
    return 1 if any(outcome.status in ("failed", "timeout") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
