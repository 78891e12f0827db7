"""BatchNormReLUMaxPool2d against nn.BatchNorm2d -> nn.ReLU -> nn.MaxPool2d."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperfast.nn import BatchNormReLUMaxPool2d
from train.models import build_model

OPTIONS = {
    "default": {},
    "eps and momentum": {"eps": 0.1, "momentum": 0.7},
    "cumulative average": {"momentum": None},
    "no parameters": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False},
}


class Plain(nn.Module):
    """What users write."""

    def __init__(self, norm: nn.BatchNorm2d, pool: int):
        super().__init__()
        self.norm, self.pool = norm, pool

    def forward(self, x):
        return nn.functional.max_pool2d(torch.relu(self.norm(x)), self.pool)


def images(dtype=torch.float64):
    return torch.randn(3, 5, 7, 6, dtype=dtype).to(memory_format=torch.channels_last)


def pair(pool=2, dtype=torch.float64, **options):
    ours = BatchNormReLUMaxPool2d(5, pool, dtype=dtype, **options)
    options.pop("backend", None)
    theirs = nn.BatchNorm2d(5, dtype=dtype, **options)
    if ours.affine:
        nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, Plain(theirs, pool)


def train_and_evaluate(model, batches):
    """Outputs and input gradients of training on `batches`, then of an evaluation of the first."""
    found = []
    for mode, x in [(True, x) for x in batches] + [(False, batches[0])]:
        x = x.detach().clone().requires_grad_()
        y = model.train(mode)(x)
        y.pow(3).sum().backward()
        found += [y.detach(), x.grad]
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_like_torch(options, pool, backend):
    ours, theirs = pair(pool, **OPTIONS[options], backend=backend)
    batches = [images() + i for i in range(3)]
    for a, b in zip(train_and_evaluate(ours, batches), train_and_evaluate(theirs, batches), strict=True):
        torch.testing.assert_close(a, b)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), theirs.norm.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a, b)


def test_half_precision_modules():
    ours, theirs = pair(dtype=torch.bfloat16)
    x = images(torch.bfloat16)
    a, b = ours(x), theirs(x)
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(ours.running_var, theirs.norm.running_var, rtol=2e-2, atol=2e-2)


def test_autocast():
    """A convolution's bfloat16 in, bfloat16 out; parameters and statistics stay float32."""
    conv = nn.Conv2d(2, 5, 3, padding=1).to(memory_format=torch.channels_last)
    ours, theirs = pair(dtype=torch.float32)
    theirs.double()
    x = torch.randn(4, 2, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        images = conv(x)
        y = ours(images)
    assert images.dtype == y.dtype == torch.bfloat16
    expected = theirs(images.detach().double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    y.backward(torch.ones_like(y)), expected.backward(torch.ones_like(expected))
    assert ours.weight.grad.dtype == ours.running_mean.dtype == torch.float32
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad.double(), theirs.norm.get_parameter(name).grad, rtol=1e-5, atol=1e-4
        )
    torch.testing.assert_close(ours.running_var.double(), theirs.norm.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    ours, theirs = pair()
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=False)
    batches = [images(), images()]
    for a, b in zip(train_and_evaluate(compiled, batches), train_and_evaluate(theirs, batches), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.state_dict().values(), theirs.norm.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_export():
    ours, _ = pair()
    x = images()
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), ours(x))


def test_deepcopy_is_independent():
    ours, _ = pair()
    twin = copy.deepcopy(ours)
    x = images()
    torch.testing.assert_close(ours(x), twin(x))
    ours(x + 1)
    assert ours.num_batches_tracked == 2 and twin.num_batches_tracked == 1
    assert not torch.equal(ours.running_mean, twin.running_mean)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = pair()
        batches = [images(), images()]
        found = train_and_evaluate(DistributedDataParallel(ours), batches)
        for a, b in zip(found, train_and_evaluate(theirs, batches), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()


def test_bad_input():
    with pytest.raises(ValueError, match="pool must be an integer of at least 1, got 0"):
        BatchNormReLUMaxPool2d(3, 0)
    with pytest.raises(ValueError, match="backend must be one of"):
        BatchNormReLUMaxPool2d(3, backend="gpu")
    module = BatchNormReLUMaxPool2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.randn(3, 4, 4))
    with pytest.raises(
        ValueError, match=r"weight must be \[4\].*got \[3\]|running_mean must be \[4\].*got \[3\]"
    ):
        module(torch.randn(1, 4, 4, 4))
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNormReLUMaxPool2d(3, 1)(torch.randn(1, 3, 1, 1))


def test_checkpoints_of_full_interchange():
    """Fused and plain `full` have the same names, and the names torch's modules have."""
    fused, plain = build_model("standard_deep", fused=True), build_model("standard_deep")
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert {fused.bn1.backend, plain.bn1.backend} == {"auto", "reference"}
    torchs = nn.BatchNorm2d(64)
    torchs.load_state_dict({name: getattr(fused.bn1, name) for name in torchs.state_dict()}, strict=True)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    for model in (fused, plain):
        model.to(memory_format=torch.channels_last)
    fused.dropout.p = plain.dropout.p = 0.0
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
