"""hyperfast.optim.Adam and SGD on factored gradients against torch.optim's on plain PyTorch twins."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import hyperfast
from hyperfast.nn import HyperLinear
from hyperfast.optim import SGD, Adam, AdamW
from tests.optim.net import CLIP, assert_steps_agree, backward, train_step

TORCH = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
VARIANTS = {
    "Adam": (Adam, {"lr": 1e-2}),
    "Adam, L2": (Adam, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "SGD": (SGD, {"lr": 0.1}),
    "SGD, L2": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "Nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    """make(model, **more), make_torch(model)"""
    kind, options = VARIANTS[request.param]
    return (
        lambda net, **more: kind(net, **options, **more),
        lambda net: TORCH[kind](net.parameters(), **options),
    )


@pytest.mark.parametrize("clip", [None, CLIP])
def test_twenty_steps(variant, clip, pair, assert_equal_parameters):
    ours, theirs = pair
    before = copy.deepcopy(theirs.state_dict())
    optimizer, reference = variant[0](ours, max_grad_norm=clip), variant[1](theirs)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 20, clip)
    assert torch.equal(ours.unused.generator.weight, before["unused.generator.weight"])  # not decayed
    assert not torch.equal(ours.b.generator.weight, before["b.generator.weight"])
    assert ours.conv.generator.carrier.count_nonzero() == 0


@pytest.mark.parametrize("step", [0, 2])
def test_single_steps_in_float32(variant, step, pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer = variant[0](ours, max_grad_norm=CLIP)
    for i in range(step):
        train_step(ours, optimizer, i)
    ours.float(), theirs.float()
    theirs.load_state_dict(ours.state_dict())
    state = optimizer.state_dict()
    optimizer, reference = variant[0](ours, max_grad_norm=CLIP), variant[1](theirs)
    optimizer.load_state_dict(state), reference.load_state_dict(copy.deepcopy(state))
    loss, expected = train_step(ours, optimizer, step), train_step(theirs, reference, step, CLIP)
    assert abs(loss - expected) <= 1e-5
    assert_equal_parameters(ours, theirs, 1e-5)


@pytest.mark.parametrize("to", ["torch", "hyperfast"])
def test_interchange_with_torch(variant, to, pair, assert_equal_parameters):
    """Train on one side, continue on the other, through a file; 3 + 3 steps equal 6."""
    ours, theirs = pair
    optimizer, reference = variant[0](ours), variant[1](theirs)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3)
    got, expected = optimizer.state_dict(), reference.state_dict()
    assert got["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(got["state"], expected["state"])
    file = io.BytesIO()
    torch.save(expected if to == "hyperfast" else got, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if to == "hyperfast":
        optimizer = variant[0](ours)
        optimizer.load_state_dict(state)
    else:
        reference = variant[1](theirs)
        reference.load_state_dict(state)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, start=3)


def test_copies_go_on(variant, pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer, reference = variant[0](ours), variant[1](theirs)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2)
    ours, optimizer = copy.deepcopy((ours, optimizer))
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2, start=2)


def test_scheduler_and_zeroed_gradients(variant, pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer, reference = variant[0](ours), variant[1](theirs)
    schedulers = [CosineAnnealingLR(o, 5, 1e-6) for o in (optimizer, reference)]
    for i in range(4):
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 1, start=i)
        for scheduler in schedulers:
            scheduler.step()
    for o in (optimizer, reference):  # decay and momentum go on
        o.zero_grad(set_to_none=False)
        o.step()
    assert_equal_parameters(ours, theirs, 1e-12)


@pytest.mark.parametrize("frozen", ["z", "weight"])
def test_frozen_parts(variant, frozen, pair, assert_equal_parameters):
    ours, theirs = pair
    for net in (ours, theirs):
        for name in ("conv", "a", "b"):
            getattr(net.get_submodule(name).generator, frozen).requires_grad_(False)
    optimizer, reference = variant[0](ours, max_grad_norm=CLIP), variant[1](theirs)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, CLIP)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nonfinite_changes_nothing(variant, nonfinite, pair):
    ours, _ = pair
    optimizer = variant[0](ours, nonfinite=nonfinite)
    train_step(ours, optimizer, 0)
    backward(ours, 1)
    ours.a.generator.bias.grad[1] = float("nan")
    before = copy.deepcopy((ours.state_dict(), optimizer.state_dict()["state"]))
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="nothing was updated"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    torch.testing.assert_close((ours.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_dense_models_train_too(variant, pair, assert_equal_parameters):
    ours, theirs = pair
    hyperfast.factored_(ours, False)
    optimizer, reference = variant[0](ours), variant[1](theirs)
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3)


def test_momentum_of_each_role(pair, assert_equal_parameters):
    """weight without momentum, bias with it, and the other way round."""
    ours, theirs = pair
    for options in ({"weight": {"momentum": 0.9}}, {"bias": {"momentum": 0.9, "nesterov": True}}):
        groups = hyperfast.param_groups(ours, **options, z={"lr": 0.2})
        place = {id(p): name for name, p in ours.named_parameters()}
        named = dict(theirs.named_parameters())
        twins = [
            group | {"params": [named[place[id(p)]] for p in group["params"] if place[id(p)] in named]}
            for group in groups
        ]
        optimizer, reference = SGD(groups, lr=0.05), torch.optim.SGD(twins, lr=0.05)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3)
        assert optimizer.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def test_momentum_switched_on_later(pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer, reference = SGD(ours, lr=0.05), torch.optim.SGD(theirs.parameters(), lr=0.05)
    for i in range(4):
        for o in (optimizer, reference):
            o.param_groups[0]["momentum"] = 0.0 if i < 2 else 0.9
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 1, start=i)


def test_adam_and_adamw_states_load_into_each_other(pair, assert_equal_parameters):
    """The state says how Adam decays, as in torch; AdamW stays AdamW."""
    ours, theirs = pair
    made = []
    for net, kinds in ((ours, (Adam, AdamW)), (theirs, (torch.optim.Adam, torch.optim.AdamW))):
        source = kinds[0](net.parameters(), lr=1e-2, weight_decay=0.1)
        train_step(net, source, 0)
        made.append(kinds[1](net.parameters()))
        made[-1].load_state_dict(source.state_dict())
    assert made[0].param_groups[0]["decoupled_weight_decay"]
    assert_steps_agree(ours, theirs, *made, assert_equal_parameters, 3, start=1)


@pytest.mark.parametrize("kind", [Adam, SGD])
@pytest.mark.parametrize("missing", ["bias", "z"])
def test_a_split_triple_raises(kind, missing, pair):
    ours, _ = pair
    left_out = getattr(ours.a.generator, missing)
    with pytest.raises(ValueError, match=f"without its {missing}"):
        kind([p for p in ours.parameters() if p is not left_out])


@pytest.mark.parametrize("kind", [Adam, SGD])
@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_states_of_what_they_do_not_do_are_refused(kind, option):
    if (kind, option) == (SGD, "amsgrad"):
        pytest.skip("SGD has no amsgrad")
    net = nn.Linear(2, 2)
    state = TORCH[kind](net.parameters(), **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"hyperfast.optim.{kind.__name__} does not do {option}"):
        kind(net).load_state_dict(state)


BAD_OPTIONS = {
    "Adam lr": (Adam, {"lr": -1.0}, "lr must be at least 0"),
    "Adam betas": (Adam, {"betas": (0.9, 1.0)}, "betas"),
    "Adam eps": (Adam, {"eps": -1e-8}, "eps"),
    "Adam decay": (Adam, {"weight_decay": -0.1}, "weight_decay"),
    "Adam nonfinite": (Adam, {"nonfinite": "ignore"}, "nonfinite must be one of"),
    "SGD lr": (SGD, {"lr": -1.0}, "lr must be at least 0"),
    "SGD momentum": (SGD, {"momentum": -0.1}, "momentum"),
    "SGD decay": (SGD, {"weight_decay": -0.1}, "weight_decay"),
    "Nesterov without momentum": (SGD, {"nesterov": True}, "nesterov needs a momentum"),
    "Nesterov dampened": (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
    "SGD clip": (SGD, {"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
    "SGD backend": (SGD, {"backend": "cuda"}, "backend must be one of"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    kind, options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        kind(HyperLinear(2, 2), **options)


def test_reference_backend(pair):
    """The same without kernels."""
    nets = [pair[0], copy.deepcopy(pair[0])]
    optimizers = [
        SGD(net, lr=0.05, momentum=0.9, backend=backend)
        for net, backend in zip(nets, ("auto", "reference"), strict=True)
    ]
    for i in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            train_step(net, optimizer, i)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
