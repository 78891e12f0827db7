"""adamw_generate: the update from factored gradients, and the next weights."""

import math

import pytest
import torch

from hyperfast import ops, reference
from hyperfast.ops import AdamWCoefficients
from hyperfast.ops._library import _cpu

KS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 511, 512]
NS = [0, 1, 2, 3]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
NAMES = (
    "weights", "exp_avgs", "exp_avg_sqs", "biases", "bias_exp_avgs", "bias_exp_avg_sqs",
    "dws", "zs", "new_zs", "next_weights",
)  # fmt: skip
WRITTEN = NAMES[:6] + NAMES[9:]


def coefficients(step=3, lr=0.05, decay=0.1, betas=(0.9, 0.99)) -> AdamWCoefficients:
    """Large enough a step that errors of the update show beside the weights."""
    beta1, beta2 = betas
    return AdamWCoefficients(
        1 - lr * decay, lr / (1 - beta1**step), beta1, beta2, math.sqrt(1 - beta2**step), 1e-8
    )


def problem(sizes, dtype, trained_bias=lambda i: True) -> dict[str, list]:
    made: dict[str, list] = {name: [] for name in NAMES}
    for i, (n, k) in enumerate(sizes):
        bias_moments = (torch.randn(n) * 0.1, torch.rand(n) * 0.1) if trained_bias(i) else (None, None)
        tensors = (
            torch.randn(n, k), torch.randn(n, k) * 0.1, torch.rand(n, k) * 0.1, torch.randn(n), *bias_moments,
            torch.randn(n), torch.randn(k), torch.randn(k), torch.full((n,), float("nan")),
        )  # fmt: skip
        for name, tensor in zip(NAMES, tensors, strict=True):
            made[name].append(None if tensor is None else tensor.to(dtype))
    rows = [coefficients(step=i + 1) for i in range(len(sizes))]
    bias_rows = [coefficients(step=i + 2, lr=0.02, decay=0.0, betas=(0.8, 0.95)) for i in range(len(sizes))]
    return made | {"coefficients": rows, "bias_coefficients": bias_rows}


def copied(problem, dtype=None):
    def convert(t):
        return t.to(dtype=dtype, copy=True) if isinstance(t, torch.Tensor) else t

    return {name: [convert(t) for t in column] for name, column in problem.items()}


def in_rows(K: int) -> list[int]:
    """N around what one block and what one thread's share of blocks hold (csrc/cpu/kernels.h)."""
    rows = max(32, min(1024, 16384 // K // 32 * 32))
    return [rows - 1, rows, rows + 1, 8 * rows + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", KS)
def test_values_and_next_weights(K, dtype, assert_accurate):
    given = problem([(n, K) for n in NS + in_rows(K)], dtype, trained_bias=lambda i: i % 3 != 1)
    ours, exact, plain = copied(given), copied(given, torch.float64), copied(given)
    ops.adamw_generate(**ours, grad_scale=0.7)
    reference.adamw_generate(**exact, grad_scale=0.7)
    if dtype == torch.bfloat16:
        reference.adamw_generate(**plain, grad_scale=0.7)
    for name in WRITTEN:
        lists = ([t for t in run[name] if t is not None] for run in (ours, exact, plain))
        got, wanted, in_plain = lists
        assert_accurate(got, wanted, dtype, in_plain)
    for name in ("dws", "zs", "new_zs"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], given[name], strict=True))
    made = ops.generate(ours["weights"], ours["biases"], ours["new_zs"])
    assert all(torch.equal(a, b) for a, b in zip(made, ours["next_weights"], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_weights_bit_for_bit_over_many_sizes(dtype):
    """Every K to 80, where rows do not fill vectors in all possible ways."""
    ours = problem([(3 + k % 5, k) for k in range(1, 81)], dtype)
    for _ in range(3):
        ops.adamw_generate(**ours)
        made = ops.generate(ours["weights"], ours["biases"], ours["new_zs"])
        assert all(torch.equal(a, b) for a, b in zip(made, ours["next_weights"], strict=True))


def test_a_bias_that_is_not_trained_is_added():
    ours = problem([(7, 5)], torch.float64, trained_bias=lambda i: False)
    bias = ours["biases"][0].clone()
    ops.adamw_generate(**ours)
    assert torch.equal(ours["biases"][0], bias)
    torch.testing.assert_close(ours["next_weights"][0], ours["weights"][0] @ ours["new_zs"][0] + bias)


def test_first_step_from_zero_state_is_torchs(assert_accurate):
    """Ten steps against torch.optim.AdamW on the dense gradient."""
    N, K, lr = 33, 17, 0.05
    weight, bias, z = (torch.randn(s, dtype=torch.float64) for s in ((N, K), (N,), (K,)))
    state = [torch.zeros_like(t) for t in (weight, weight, bias, bias)]
    theirs = [torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())]
    optimizer = torch.optim.AdamW(theirs, lr=lr, weight_decay=0.1, eps=1e-8)
    for t in range(1, 11):
        dw = torch.randn(N, dtype=torch.float64)
        theirs[0].grad, theirs[1].grad = torch.outer(dw, z), dw.clone()
        optimizer.step()
        row = coefficients(t, lr, 0.1, (0.9, 0.999))
        ops.adamw_generate(
            [weight], state[:1], state[1:2], [bias], state[2:3], state[3:], [dw], [z], [z],
            [torch.empty_like(bias)], [row], [row],
        )  # fmt: skip
    assert_accurate([weight, bias], [p.detach() for p in theirs], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_independent_of_the_thread_count(dtype):
    given = problem([(20001, 5), (3, 512), (5000, 16)], dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = copied(given)
            ops.adamw_generate(**ours)
            results.append(ours)
    finally:
        torch.set_num_threads(before)
    for name in WRITTEN:
        assert all(torch.equal(a, b) for a, b in zip(results[0][name], results[1][name], strict=True)), name


def test_guard_bytes_around_every_tensor_stay():
    """Each tensor lies between NaNs that no store of a whole vector may overwrite."""
    given, frames = problem([(7, 13), (1, 1), (5, 33)], torch.float32), []

    def framed(t):
        frame = torch.full((t.numel() + 64,), float("nan"))
        frames.append((frame, t.numel()))
        inside = frame[32:-32].view(t.shape)
        return inside.copy_(t)

    ours = {
        name: [framed(t) if isinstance(t, torch.Tensor) else t for t in column]
        for name, column in given.items()
    }
    ops.adamw_generate(**ours)
    for frame, size in frames:
        assert frame[:32].isnan().all() and frame[-32:].isnan().all()
        assert frame[32 : 32 + size].isfinite().all()


def test_reference_backend_and_what_the_kernels_do_not_serve(monkeypatch):
    monkeypatch.setattr(_cpu, "update_generate", lambda *args: pytest.fail("native code was reached"))
    for dtype, K, backend in (
        (torch.float32, 5, "reference"),
        (torch.float32, 513, "auto"),
        (torch.float16, 5, "auto"),
    ):
        ours = problem([(6, K)], dtype)
        expected = copied(ours)
        ops.adamw_generate(**ours, backend=backend)
        reference.adamw_generate(**expected)
        assert all(torch.equal(ours[name][0], expected[name][0]) for name in WRITTEN)


def test_no_layers():
    ops.adamw_generate(*([] for _ in range(12)))


def test_versions_are_bumped():
    ours = problem([(6, 5)], torch.float32)
    before = {name: ours[name][0]._version for name in NAMES}
    ops.adamw_generate(**ours)
    assert {name for name in NAMES if ours[name][0]._version > before[name]} == set(WRITTEN)


def captured(monkeypatch, call) -> tuple:
    """The arguments with which `call` reaches the registered op."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.hyperfast, "update_generate", lambda *arguments: found.append(arguments))
        call()
    return found[0]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("untrained", [False, True], ids=["", "one bias not trained"])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(requires_grad, untrained, monkeypatch):
    ours = problem([(5, 3), (2, 4)], torch.float32, trained_bias=lambda i: i == 0 or not untrained)
    for name in ("weights", "biases", "zs"):
        ours[name] = [t.requires_grad_(requires_grad) for t in ours[name]]
    arguments = captured(monkeypatch, lambda: ops.adamw_generate(**ours))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.hyperfast.update_generate.default, arguments)


def first(name, change):
    def apply(p):
        p[name][0] = change(p[name][0])

    return apply


BAD = {
    "weight 1-d": (first("weights", lambda t: t[0]), ValueError, "weight 0"),
    "weight integer": (first("weights", lambda t: t.int()), TypeError, "weight 0 must be floating point"),
    "exp_avg shape": (first("exp_avgs", lambda t: t[:2]), ValueError, "exp_avg 0"),
    "exp_avg dtype": (first("exp_avgs", lambda t: t.double()), (TypeError, ValueError), "exp_avg 0"),
    "exp_avg_sq device": (first("exp_avg_sqs", lambda t: t.to("meta")), ValueError, "exp_avg_sq 0"),
    "bias shape": (first("biases", lambda t: t[:2]), ValueError, "bias 0"),
    "bias None": (first("biases", lambda t: None), (TypeError, ValueError), "bias 0"),
    "one bias moment": (first("bias_exp_avg_sqs", lambda t: None), ValueError, "bias_exp_avg_sq 0"),
    "the other bias moment": (first("bias_exp_avgs", lambda t: None), ValueError, "bias_exp_avg 0"),
    "weight None": (first("weights", lambda t: None), (TypeError, ValueError), "weight 0"),
    "exp_avg None": (first("exp_avgs", lambda t: None), (TypeError, ValueError), "exp_avg 0"),
    "dw None": (first("dws", lambda t: None), (TypeError, ValueError), "dw 0"),
    "z None": (first("zs", lambda t: None), (TypeError, ValueError), "z 0"),
    "new_z None": (first("new_zs", lambda t: None), (TypeError, ValueError), "new_z 0"),
    "next_weight None": (first("next_weights", lambda t: None), (TypeError, ValueError), "next_weight 0"),
    "dw dtype": (first("dws", lambda t: t.double()), TypeError, "dw 0"),
    "new_z shape": (first("new_zs", lambda t: t[:2]), ValueError, "new_z 0"),
    "next_weight shape": (first("next_weights", lambda t: t[:2]), ValueError, "next_weight 0"),
    "weight strides": (first("weights", lambda t: t.t().contiguous().t()), ValueError, "contiguous"),
    "next_weight strides": (first("next_weights", lambda t: t.repeat(2)[::2]), ValueError, "contiguous"),
    "fewer exp_avgs": (lambda p: p["exp_avgs"].pop(), ValueError, "2 weights but 1 of exp_avg"),
    "fewer dws": (lambda p: p["dws"].pop(), ValueError, "2 weights but 1 of dw"),
    "fewer coefficients": (lambda p: p["coefficients"].pop(), ValueError, "1 of coefficients"),
    "more bias_coefficients": (
        lambda p: p["bias_coefficients"].append(coefficients()), ValueError, "3 of bias_coefficients"
    ),
    "a weight twice": (lambda p: p["weights"].__setitem__(1, p["weights"][0][:4]), ValueError, "weight 1"),
    "weight is exp_avg": (lambda p: p["exp_avgs"].__setitem__(0, p["weights"][0]), ValueError, "exp_avg 0"),
    "next_weight is bias": (
        lambda p: p["next_weights"].__setitem__(0, p["biases"][0]), ValueError, "next_weight 0"
    ),
    "overlapping halves": (
        lambda p: (p["weights"].__setitem__(0, torch.zeros(9, 4)[:5]),
                   p["weights"].__setitem__(1, p["weights"][0]._base[4:8])),
        ValueError, "weight 1",
    ),
    "z is overwritten": (lambda p: p["biases"].__setitem__(1, p["zs"][1]), ValueError, "z 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, monkeypatch):
    monkeypatch.setattr(_cpu, "update_generate", lambda *args: pytest.fail("native code was reached"))
    change, error, message = BAD[case]
    ours = problem([(5, 4), (4, 4)], torch.float32)
    change(ours)
    before = copied(ours)
    with pytest.raises(error, match=message):
        ops.adamw_generate(**ours)
    for name in WRITTEN:
        for now, then in zip(ours[name], before[name], strict=True):
            if now is not None and now.device.type == "cpu":
                assert torch.equal(now.nan_to_num(), then.nan_to_num()), f"{name} was changed"
