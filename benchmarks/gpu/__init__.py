"""The proof on a GPU in one command: `python -m benchmarks.gpu --out DIR`, under 9 minutes, without network.

Builds, tests, looks for races, measures what the machine can do, times the ops and the whole training step
against PyTorch, and trains. Each part is a process of its own with a time limit; one that fails leaves the
others alone. Nothing here is a gate on a time: a goal that is not reached is said, the exit status is of
what did not work.
"""
