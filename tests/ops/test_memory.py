"""Memory that an op may not update, or that lies where elements may not, and what torch reads wrongly."""

import pytest
import torch
import torch.nn.functional as F

from hyperfast import ops


def problem(C: int = 3) -> dict[str, torch.Tensor]:
    x = torch.randn(2, C, 4, 4).contiguous(memory_format=torch.channels_last)
    names = ("running_mean", "running_var", "weight", "bias")
    return {"x": x} | {name: torch.rand(C) for name in names}


def in_inference(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


BAD = {
    "expanded": ({"running_var": lambda t: t[:1].expand(3)}, ValueError, "running_var .* contiguous"),
    "lazily negated": ({"running_mean": torch._neg_view}, ValueError, "running_mean .* lazily negated"),
    "of inference": (
        {"running_mean": in_inference},
        ValueError,
        "running_mean was made under inference_mode",
    ),
    "sparse": ({"x": torch.Tensor.to_sparse}, TypeError, "x must be a dense"),
    "two dtypes": ({"weight": torch.Tensor.bfloat16, "x": torch.Tensor.bfloat16}, TypeError, "one dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_and_nothing_changed(case):
    changes, error, message = BAD[case]
    given = problem()
    before = given["running_mean"].clone(), given["running_var"].clone()
    changed = given | {name: change(given[name]) for name, change in changes.items()}
    with pytest.raises(error, match=message):
        ops.batch_norm_relu_max_pool(**changed, training=True)
    assert torch.equal(given["running_mean"], before[0]) and torch.equal(given["running_var"], before[1])


def test_running_statistics_in_the_memory_of_others_are_refused():
    given = problem()
    given["running_var"] = given["bias"]
    with pytest.raises(ValueError, match="shares memory with"):
        ops.batch_norm_relu_max_pool(**given, training=True)


@pytest.mark.parametrize("expanded", ["weight", "running_var"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_expanded_channels_in_evaluation(expanded, backend):
    """torch's own backward in channels_last reads them as if they were contiguous."""
    given = {name: t.double() for name, t in problem().items()}
    given[expanded] = given[expanded][:1].expand(3)
    x = given.pop("x").requires_grad_()
    (got,) = torch.autograd.grad(
        ops.batch_norm_relu_max_pool(x, **given, pool=1, backend=backend).square().sum(), x
    )
    given = {name: t.contiguous() for name, t in given.items()}
    y = F.relu(F.batch_norm(x.contiguous(), **given))
    torch.testing.assert_close(got, torch.autograd.grad(y.square().sum(), x)[0])


def test_an_address_between_elements_is_refused():
    memory = torch.zeros(4 * 96 + 2, dtype=torch.uint8).numpy()[2:]
    x = torch.frombuffer(memory, dtype=torch.float32).view(2, 4, 4, 3).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="no multiple of its elements"):
        ops.batch_norm_relu_max_pool(**problem() | {"x": x}, training=True)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(48, 2)
    with pytest.raises(ValueError, match="no multiple of its elements"):
        ops.hyper_linear(torch.ones(1, 16), torch.ones(2), weight, path="merged")


def test_float64_under_autocast_is_refused_on_every_path():
    with torch.autocast("cpu", torch.bfloat16):
        for path in ("auto", "merged", "separate"):
            with pytest.raises(TypeError, match="x must be torch.float32"):
                ops.hyper_linear(torch.ones(1, 4).double(), torch.ones(2), torch.ones(12, 2), path=path)
