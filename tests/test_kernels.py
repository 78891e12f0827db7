"""The Triton kernels without a GPU: their tests under the interpreter, in a process of its own, and the ops
and optimizers on top of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # 3.6: loops with run-time bounds, NumPy 2.4
    pytest.skip(
        "the interpreter of this Triton is too old; on a GPU run tests/kernels", allow_module_level=True
    )
ROOT = Path(__file__).resolve().parents[1]


def run_interpreted(*arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPERFAST_ENGINE": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


@pytest.mark.timeout(600)
def test_under_the_interpreter():
    run_interpreted("tests/kernels")


NOT_OF_KERNELS = "not compile and not opcheck and not memory_of_the_op and not thread_count"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "file, tests",
    [
        ("ops/test_generate.py", f"{NOT_OF_KERNELS} and not test_values and not layers_in_one_call"),
        ("ops/test_generate_backward.py", "out_of_the_middle or no_layers or own_gradient or bad_input"),
        (
            "ops/test_adamw_generate.py",
            "not_trained_is_added or first_step_from_zero or guard_bytes or bumped",
        ),
        (
            "ops/test_generate_units.py",
            "test_accurate and dtype0 and (odd or rows_) and not has_rows or autocast and odd or strided"
            " or nothing_to_sum",
        ),
    ],
)
def test_ops_and_optimizers_on_interpreted_kernels(file, tests):
    run_interpreted(f"tests/{file}", "-k", tests)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "file, tests",
    [
        ("ops/test_generate.py", "test_values or layers_in_one_call"),
        ("ops/test_generate_backward.py", f"{NOT_OF_KERNELS} and not do_not_serve"),
        ("ops/test_generate_units.py", f"{NOT_OF_KERNELS} and not threads"),
        (
            "ops/test_lstm.py",
            "test_accurate or without_gradients or half_precision or autocast or some_results or only_what"
            " or no_steps",
        ),
        ("optim/test_adamw.py", "twenty_steps"),
        ("optim/test_adam_sgd.py", "twenty_steps"),
        ("test_states.py", "TestKernels and not thread_count or TestNumbersInTensors and auto"),
    ],
)
def test_all_sizes_on_interpreted_kernels(file, tests):
    run_interpreted(f"tests/{file}", "-k", tests)


@pytest.mark.timeout(600)
def test_batch_norm_on_interpreted_kernels():
    run_interpreted(
        "tests/ops/test_batch_norm_relu_max_pool.py",
        "tests/ops/test_memory.py",
        "tests/nn/test_batch_norm.py",
        "-k",
        "autograd_sees or needed or without_parameters or test_layouts or running_statistics_in or expanded"
        " or of_inference or (like_torch and momentum and 2-auto)",
    )


@pytest.mark.timeout(600)
def test_layers_on_interpreted_kernels():
    chosen = "middle or belong or only_one or factored_forms or autocast or leading or no_rows or no_images"
    run_interpreted("tests/ops/test_hyper_layers.py", "-k", chosen)


@pytest.mark.timeout(600)
def test_weights_for_each_sample_on_interpreted_kernels():
    chosen = "middle or no_samples or no_images or not_needed or touch or autocast"
    run_interpreted("tests/ops/test_per_sample.py", "-k", f"not chunks and ({chosen})")
