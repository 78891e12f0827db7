"""The kernels of `generate_units`, forward and backward, against the reference in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.kernels import generate_units
from hyperfast.kernels.generate_units import MOST_TERMS, backward_launches, launches, run, run_backward
from hyperfast.ops.generate_units import Unit

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GAP = 3  # elements before and after a layer, which nobody may touch


class Case(NamedTuple):
    """R: rows of u in a unit."""

    shapes: list[tuple[int, ...]]
    unit: tuple[int, ...]
    R: int = 1
    D: int = 5
    bias: bool = True
    l2: float = 0.0
    last: bool = False
    without: tuple[int, ...] = ()  # layers that get no dw

    def sizes(self) -> tuple[int, int]:
        """P and C"""
        size = math.prod(self.unit)
        return sum(map(math.prod, self.shapes)) // size * self.R, size // self.R

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        """a, weight, bias, and the dws, in values whose sums do not cancel."""
        P, C = self.sizes()
        shapes = (P, self.D), (self.D, C), (C,)
        made = [(torch.randn(shape) + 0.5).to(device).to(dtype) for shape in shapes]
        return made if self.bias else [*made[:2], None]

    def dws(self, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        return [
            None if i in self.without else (torch.randn(shape) + 0.5).to(device).to(dtype)
            for i, shape in enumerate(self.shapes)
        ]


WIDE = [(4, 3, 3, 3), (8, 9, 3, 3), (4, 6, 3, 3)]  # units of (4, 3, 3, 3)
CASES = {
    "one of everything": Case([(1, 1)], (1, 1), D=1),
    "linear": Case([(6, 3), (2, 9), (4, 6)], (2, 3), D=17, l2=0.5),
    "rows of whole units": Case(WIDE, (4, 3, 3, 3), l2=0.1, without=(1,)),
    "rows of whole units, channels last": Case(WIDE, (4, 3, 3, 3), l2=0.1, last=True),
    "rows of output channels": Case(WIDE, (4, 3, 3, 3), R=2, bias=False),
    "rows of output channels, channels last": Case(
        WIDE, (4, 3, 3, 3), R=2, last=True, l2=0.2, without=(0, 2)
    ),
    "parts of output channels": Case(WIDE, (4, 3, 3, 3), R=9),
    "channels last, parts": Case(WIDE, (4, 3, 3, 3), R=9, last=True, l2=0.3),
    "no dw at all": Case(WIDE[:2], (4, 3, 3, 3), without=(0, 1), l2=0.3),
    "runs of 16": Case([(4, 16, 3, 3), (2, 32, 3, 3)], (2, 16, 3, 3), D=16, l2=0.1),
    "runs of 16, channels last": Case([(4, 16, 3, 3), (2, 32, 3, 3)], (2, 16, 3, 3), R=2, last=True),
    "1-D kernels": Case([(4, 4, 5), (2, 8, 5)], (2, 2, 5), R=4),
    "3-D kernels": Case([(3, 2, 2, 3, 2)], (1, 2, 2, 3, 2)),
    "more layers than a power of two": Case([(2, 1), (1, 3)] * 17, (1, 1), D=3),
    "two blocks of D, two of rows": Case([(2, 5)] * 65, (2, 5), D=65, l2=0.1),
    "three blocks of columns": Case([(5, 29)], (5, 29), D=2),
    "1x1, channels last": Case([(4, 6, 1, 1)], (2, 3, 1, 1), last=True),
}


def fenced(
    shape, dtype, device, shift: int, last: bool, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A tensor of `values` or NaN, `shift` elements behind a multiple of 16 bytes; the memory around it."""
    memory = torch.full((math.prod(shape) + 16 + GAP + shift,), -7.0, dtype=dtype, device=device)
    inside = memory[16 + shift : 16 + shift + math.prod(shape)]
    if last:
        tensor = inside.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        tensor = inside.view(shape)
    return tensor.fill_(torch.nan) if values is None else tensor.copy_(values), memory


def tiles(case: Case, shape: tuple[int, ...]) -> tuple[int, int]:
    return Unit.of(case.unit).tiles(shape)


def forward(case: Case, a, weight, bias, dtype: torch.dtype, shift: int = 0) -> list[Tensor]:
    made = [fenced(shape, dtype, a.device, shift, case.last) for shape in case.shapes]
    ws = [w for w, _ in made]
    rows = [(w.data_ptr(), *tiles(case, w.shape)) for w in ws]
    run(rows, a, weight, bias, Unit.of(case.unit), case.last, dtype)
    for w, memory in made:
        assert (memory == -7).sum() - (w == -7).sum() == len(memory) - w.numel()
    return ws


def backward(
    case: Case, a, weight, dws, ws, dtype: torch.dtype, shift: int = 0, needed=(True, True, True)
) -> list[Tensor | None]:
    """da, dweight, dbias"""
    shapes = a.shape, weight.shape, weight.shape[1:]
    out = [
        torch.full(shape, torch.nan, dtype=a.dtype, device=a.device) if need else None
        for shape, need in zip(shapes, needed, strict=True)
    ]
    kept, rows = [], []
    for dw, w in zip(dws, ws, strict=True):
        pair = [t if t is None else fenced(t.shape, dtype, a.device, shift, case.last, t)[0] for t in (dw, w)]
        kept.append(pair)
        addresses = [0 if t is None else t.data_ptr() for t in pair]
        rows.append((addresses[0], addresses[1] if case.l2 else 0, *tiles(case, w.shape)))
    run_backward(rows, case.l2, a, weight, *out, Unit.of(case.unit), case.last, dtype)
    return out


def expected(case: Case, a, weight, bias, dws, ws) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    made = reference.generate_units(a, weight, bias, case.shapes, case.unit)
    return made, reference.generate_units_backward(dws, ws, case.l2, a, weight, case.shapes, case.unit)


def check(case: Case, dtype: torch.dtype, device: torch.device, assert_accurate, shift: int = 0) -> None:
    tensors, dws = case.tensors(dtype, device), case.dws(dtype, device)
    ws = forward(case, *tensors, dtype, shift)
    gradients = backward(case, *tensors[:2], dws, ws, dtype, shift)
    on_cpu = [[None if t is None else t.cpu() for t in ts] for ts in (tensors, dws, ws)]
    double = [[None if t is None else t.double() for t in ts] for ts in on_cpu]
    wanted, exact = expected(case, *double[0], *double[1:])
    plain, rounded = expected(case, *on_cpu[0], *on_cpu[1:])
    assert_accurate([w.cpu() for w in ws], wanted, dtype, plain)
    for got, want, other in zip(gradients, exact, rounded, strict=True):
        assert_accurate(got.cpu(), want, dtype, other)


def with_dtypes() -> list:
    """Every case in every dtype, most of half precision slow."""
    made = []
    for i, name in enumerate(CASES):
        for j, dtype in enumerate(FLOATS):
            is_slow = j > 0 and i % 6 != j
            made.append(pytest.param(name, dtype, marks=pytest.mark.slow if is_slow else ()))
    return made


@pytest.mark.parametrize("name, dtype", with_dtypes(), ids=str)
def test_equals_reference(name, dtype, device, assert_accurate):
    check(CASES[name], dtype, device, assert_accurate)


@pytest.mark.parametrize("name", ["linear", "channels last, parts"])
def test_float64(name, device, assert_accurate):
    check(CASES[name], torch.float64, device, assert_accurate)


@pytest.mark.parametrize("name", ["rows of whole units", "runs of 16"])
def test_addresses_between_16_bytes(name, device, assert_accurate):
    check(CASES[name], torch.float32, device, assert_accurate, shift=1)


def test_sums_in_parts(device, assert_accurate):
    """More parts than the second launch takes at a time, in their order: the same bits again."""
    case = Case([(80, 1), (81, 1)], (1, 1), D=3, l2=0.1)
    check(case, torch.float32, device, assert_accurate)
    tensors, dws = case.tensors(torch.float32, device), case.dws(torch.float32, device)
    ws = forward(case, *tensors, torch.float32)
    every, again = (backward(case, *tensors[:2], dws, ws, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(every, again, strict=True))


def launches_of(case: Case, needed=(True, True, True), a_dtype=torch.float32, bias=True) -> list:
    """Forward and backward, to look at."""
    a, weight, bias = case.tensors(a_dtype, torch.device("cpu"))
    rows = [(16, *tiles(case, shape)) for shape in case.shapes]
    unit, out = Unit.of(case.unit), [t if n else None for t, n in zip((a, weight, bias), needed, strict=True)]
    made = list(launches(rows, a, weight, bias, unit, case.last, a_dtype))
    both = [(16, *row) for row in rows]
    return made + list(backward_launches(both, case.l2, a, weight, *out, unit, case.last, a_dtype))


def test_few_launches_and_short_sums():
    """One forward, whatever the layers; two backward; no sum of more than MOST_TERMS in one part."""
    case = Case([(50, 1)] * 300, (1, 1), D=3)
    forward, main, sums = launches_of(case)
    assert forward.grid[0] > 200 and sums.kernel is generate_units.generate_units_sum_kernel
    assert main.arguments["da_ptr"].numel() == 300 * 50 * 3  # one part: written where it belongs
    assert main.arguments["dweight_ptr"].numel() > 100 * 4  # dweight and dbias in parts
    assert len(launches_of(case, (True, False, False))) == 2
    assert launches_of(case, (False, False, False))[1].grid == (0,)
    _, main, _ = launches_of(Case([(200_000, 1)], (1, 1), D=1))
    assert main.arguments["dweight_chunk"] == MOST_TERMS


@pytest.mark.parametrize("name", ["rows of output channels, channels last", "two blocks of D, two of rows"])
def test_each_gradient_alone(name, device):
    case = CASES[name]._replace(bias=True)
    tensors, dws = case.tensors(torch.float32, device), case.dws(torch.float32, device)
    ws = forward(case, *tensors, torch.float32)
    every = backward(case, *tensors[:2], dws, ws, torch.float32)
    for i in range(3):
        alone = backward(case, *tensors[:2], dws, ws, torch.float32, needed=[j == i for j in range(3)])
        assert [t is None for t in alone] == [j != i for j in range(3)]
        torch.testing.assert_close(alone[i], every[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_layers_in_half_precision_beside_float32(dtype, device):
    """As under autocast: the product and its gradients in float32, what lies in the layers in half."""
    case = CASES["rows of whole units, channels last"]
    tensors, dws = case.tensors(torch.float32, device), case.dws(dtype, device)
    ws = forward(case, *tensors, dtype)
    gradients = backward(case, *tensors[:2], dws, ws, dtype)
    assert {t.dtype for t in gradients} == {torch.float32}
    double = [[None if t is None else t.cpu().double() for t in ts] for ts in (tensors, dws, ws)]
    wanted, exact = expected(case, *double[0], *double[1:])
    for w, want in zip(ws, wanted, strict=True):
        assert (w.cpu() - want).norm() <= 1e-2 * want.norm()
    for got, want in zip(gradients, exact, strict=True):
        assert (got.cpu() - want).norm() <= 1e-6 * want.norm()


def test_what_is_not_finite_stays_in_its_row_and_column(device):
    case = Case([(66, 1), (33, 1)], (33, 1), D=17)
    a, weight, bias = case.tensors(torch.float32, device)
    dws = case.dws(torch.float32, device)
    ws = forward(case, a, weight, bias, torch.float32)
    dws[0][40] = torch.inf  # row 1, column 7
    da, dweight, dbias = backward(case, a, weight, dws, ws, torch.float32)
    assert da.isfinite().all(1).tolist() == [True, False, True]
    assert dweight.isfinite().all(0).tolist() == [i != 7 for i in range(33)]
    assert dbias.isfinite().tolist() == [i != 7 for i in range(33)]
    a[2, 16], weight[16, 32] = torch.nan, torch.inf
    w = torch.cat(forward(case, a, weight, bias, torch.float32)).view(3, 33)
    assert w.isfinite().tolist() == [[c != 32 and p != 2 for c in range(33)] for p in range(3)]


def test_a_layer_without_dw_is_not_read(device):
    """Its address is 0: a read of it would end the process, or the context of the GPU."""
    case = CASES["no dw at all"]._replace(l2=0.0)
    a, weight, bias = case.tensors(torch.float32, device)
    ws = forward(case, a, weight, bias, torch.float32)
    for gradient in backward(case, a, weight, case.dws(torch.float32, device), ws, torch.float32):
        assert not gradient.any()


def test_an_address_between_elements_is_refused(device):
    a, weight = torch.ones(1, 1, device=device), torch.ones(1, 1, device=device)
    with pytest.raises(ValueError, match="no multiple of its elements' 4 bytes"):
        run([(18, 1, 1)], a, weight, None, (1, 1, 1), False, torch.float32)
    with pytest.raises(ValueError, match="no multiple of its elements' 4 bytes"):
        run_backward([(16, 18, 1, 1)], 0.1, a, weight, a, None, None, (1, 1, 1), False, torch.float32)


def test_units_that_span_more_than_32_bits():
    """A layer so wide counts in 64."""
    a, weight = torch.empty(1, 1, device="meta"), torch.empty(1, 1, device="meta")
    for across, kind in ((2**31 - 1, "int32"), (2**31, "int64")):
        (launch,) = launches([(16, across, across)], a, weight, None, (1, 1, 1), False, torch.float32)
        assert str(launch.arguments["INDEX"]) == kind


def test_float32_follows_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            made = launches_of(CASES["linear"])
            assert [launch.arguments.get("PRECISION", precision) for launch in made] == [precision] * len(
                made
            )
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are of a GPU")
def test_in_a_cuda_graph(device):
    """Forward and backward captured; a replay takes what is in the tensors then."""
    case = CASES["rows of whole units, channels last"]
    tensors, dws = case.tensors(torch.float32, device), case.dws(torch.float32, device)

    def step() -> list[Tensor]:
        ws = [
            torch.empty(s, device=device).contiguous(memory_format=torch.channels_last) for s in case.shapes
        ]
        run(
            [(w.data_ptr(), *tiles(case, w.shape)) for w in ws],
            *tensors,
            Unit.of(case.unit),
            True,
            torch.float32,
        )
        given = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in dws]
        rows = [
            (0 if dw is None else dw.data_ptr(), w.data_ptr(), *tiles(case, w.shape))
            for dw, w in zip(given, ws, strict=True)
        ]
        out = [torch.empty_like(t) for t in tensors]
        run_backward(rows, case.l2, *tensors[:2], *out, Unit.of(case.unit), True, torch.float32)
        return [*ws, *out]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    tensors[0].mul_(2)
    graph.replay()
    for got, want in zip(made, step(), strict=True):
        assert torch.equal(got, want)
