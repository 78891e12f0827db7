"""Every example of every Triton kernel, compiled for GPUs that are not there: registers, shared memory, how
wide its loads are. In a process without the interpreter."""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from hyperfast.kernels.launch import INTERPRETED, SHARED_LIMITS  # noqa: E402
from hyperfast.kernels.resources import examples  # noqa: E402

if INTERPRETED:
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)
EXAMPLES = list(examples())
DEFAULT = 2  # examples of a kernel in the default run


def parameters() -> list:
    """Examples by kernel: the first ones always, all of them under `slow`."""
    seen: dict[str, int] = {}
    made = []
    for module, name, launch in EXAMPLES:
        kernel = launch.kernel.fn.__name__
        seen[kernel] = seen.get(kernel, 0) + 1
        marks = [] if seen[kernel] <= DEFAULT else [pytest.mark.slow]
        made.append(pytest.param(module, launch, id=f"{kernel}, {name}", marks=marks))
    return made


@pytest.mark.parametrize("capability", SHARED_LIMITS)
@pytest.mark.parametrize("module, launch", parameters())
def test_no_spills_and_shared_memory_that_fits(module, launch, capability):
    found = launch.compile(capability)
    assert found.stack == 0, f"{found.stack} bytes of registers spilled"
    assert found.shared <= SHARED_LIMITS[capability]
    assert 0 < found.registers <= 255


def launch_of(module: str, name: str, kernel: str = ""):
    return next(
        launch
        for m, n, launch in EXAMPLES
        if (m, n) == (module, name) and kernel in launch.kernel.fn.__name__
    )


def test_a_repeated_launch_passes_all_that_the_compiled_kernel_takes(monkeypatch):
    """In the kernel's order, tensors as addresses, the given integers changed and nothing else."""

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, stream: made.append((grid, arguments, stream))

    made, launch = [], launch_of("lstm", "LSTM 512, fp16", "fwd")
    monkeypatch.setattr(type(launch.kernel), "warmup", lambda *_, **__: Compiled())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    call = launch.repeated("rows", "start")
    call((3, 1, 1), 10, 20)
    call((2, 1, 1), 9, 30)
    assert [(grid, stream) for grid, _, stream in made] == [((3, 1, 1), 7), ((2, 1, 1), 7)]
    wanted = dict(launch.arguments)
    for (_, arguments, _), rows, start in zip(made, (10, 9), (20, 30), strict=True):
        found = dict(zip(launch.kernel.arg_names, arguments, strict=True))
        assert (found.pop("rows"), found.pop("start")) == (rows, start)
        for name, value in found.items():
            tensor = isinstance(wanted[name], torch.Tensor)
            assert value == (wanted[name].data_ptr() if tensor else wanted[name])


@pytest.mark.parametrize(
    "module, name, loads, stores",
    [
        ("generate", "full, float32", {"v4.b32": 4}, {}),
        ("generate_backward", "full, float32", {"v4.b32": 4}, {}),
        ("update_generate", "full, AdamW, float32", {"v4.b32": 6}, {"v4.b32": 6}),
        ("update_generate", "full, AdamW, 8-bit states", {"v4.b32": 2, "b32": 4}, {"v4.b32": 2, "b32": 4}),
    ],
)
def test_streams_are_read_and_written_in_wide_accesses(module, name, loads, stores):
    """16 bytes of the weight and of what lies beside it, asked for before anything is stored."""
    ptx = launch_of(module, name).compile(90).ptx
    for kind, wanted in (("ld", loads), ("st", stores)):
        for width, count in wanted.items():
            found = re.findall(rf"{kind}\.global\.L1::evict_first\S*?\.{re.escape(width)}\b", ptx)
            exact = [f for f in found if ("v4" in f) == ("v4" in width)]
            assert len(exact) >= count, f"{kind} {width}: {len(exact)} of {count}"
    lines = [line for line in ptx.splitlines() if "evict_first" in line]
    first_store = next((i for i, line in enumerate(lines) if "st.global" in line), len(lines))
    assert sum("ld.global" in line for line in lines[:first_store]) >= sum(loads.values())


def layout_of_row_sums(ttgir: str) -> str:
    """How the array that the last sum along K adds lies over registers, lanes and warps, along K."""
    reduce = [m.start() for m in re.finditer(r'"tt\.reduce"\([^)]*\) <\{axis = 1', ttgir)]
    kinds = [re.search(r"\}\) : \(tensor<\S+x(f32|f64), (#\w+)>\)", ttgir[i:]) for i in reduce]
    name = next(kind[2] for kind in kinds if kind is not None)
    layout = re.search(re.escape(name) + r" = #ttg.blocked<\{(.*)\}>", ttgir)[1]
    return re.findall(r"(\w+) = \[\d+, (\d+)\]", layout)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("K", [16, 512, *(pytest.param(K, marks=pytest.mark.slow) for K in (1, 3, 17, 100))])
def test_next_weights_are_added_up_as_generate_does(K, dtype):
    """The same order of sums, on which next weights being those of `generate` rests, and no fused
    multiply-add, which would round where only one of the two does."""
    from hyperfast.kernels import generate, update_generate

    device, address = torch.device("cpu"), 16
    rows, seeds = torch.zeros(1, 7, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    numbers = (rows, rows, "adam", "plain", rows[0, 0], seeds, None, dtype, device)
    *_, update = update_generate.launches([(*[address] * 14, 4099, K, 1)], *numbers)
    (plain,) = generate.launches([(*[address] * 4, 4099, K)], dtype, device)
    ours, theirs = update.compile(90), plain.compile(90)
    assert layout_of_row_sums(ours.ttgir) == layout_of_row_sums(theirs.ttgir)
    assert "fma.rn.f32" not in ours.ptx and "fma.rn.f32" not in theirs.ptx


@pytest.mark.parametrize("capability", SHARED_LIMITS)
@pytest.mark.parametrize("name", ["full, AdamW, float32", "full, AdamW, bfloat16 states"])
def test_all_have_loaded_a_bias_before_any_thread_stores_it(name, capability):
    """A tile of it has fewer elements than threads, so several threads load each: the interpreter cannot
    see that a late one would read what another has updated."""
    ptx = launch_of("update_generate", name).compile(capability).ptx
    first_store = ptx.index("st.global")
    barrier = ptx.rindex("bar.sync", 0, first_store)
    later = re.findall(r"ld\.global\S*", ptx[barrier:first_store])
    assert all(load.endswith(".b64") for load in later), later  # coefficients


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("embeddings, float32", {"st.global.v4.b32": 4, "fma.rn.f32": 256}),
        ("embeddings, bfloat16, channels_last", {"st.global.v4.b32": 2, "wgmma.mma_async": 1}),
    ],
)
def test_units_leave_in_16_bytes(name, wanted):
    """Straight into the layers, whose addresses come out of a table; half precision on tensor cores."""
    ptx = launch_of("generate_units", name, "fwd").compile(90).ptx
    assert all(ptx.count(instruction) >= count for instruction, count in wanted.items())
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(".v4." in store for store in stores), stores


def test_gradients_of_units_are_read_ahead_in_16_bytes():
    ptx = launch_of("generate_units", "embeddings, float32", "bwd").compile(90).ptx
    copies = [line for line in ptx.splitlines() if "cp.async.c" in line]
    assert sum(", 0x10, " in line for line in copies) >= 12
