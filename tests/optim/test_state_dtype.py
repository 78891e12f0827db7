"""Optimizers with states in bfloat16 and 8 bits: saved, resumed, converted, and as good as float32."""

import copy
import io

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import states
from hyperfast.nn import HyperLinear
from hyperfast.optim import SGD, Adam, AdamW
from tests.optim.net import CLIP, Net, backward, train_step

KINDS = {
    "AdamW": lambda net, **o: AdamW(net, lr=1e-2, **o),
    "Adam": lambda net, **o: Adam(net, lr=1e-2, weight_decay=0.01, **o),
    "SGD": lambda net, **o: SGD(net, lr=0.05, momentum=0.9, **o),
}
LOW = [torch.bfloat16, "8bit"]


@pytest.fixture
def net():
    return hyperfast.factored_(Net())


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_states(a, b):
    a, b = (o.state_dict()["state"] for o in (a, b))
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        assert all(a[i][k].dtype == b[i][k].dtype and torch.equal(a[i][k], b[i][k]) for k in a[i])


@pytest.mark.parametrize("state_dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
class TestResume:
    @pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
    def test_bit_for_bit(self, kind, state_dtype, how, net):
        optimizer = KINDS[kind](net, state_dtype=state_dtype, max_grad_norm=CLIP)
        for i in range(3):
            train_step(net, optimizer, i)
        if how == "deepcopy":
            other, again = copy.deepcopy((net, optimizer))
        else:
            other = hyperfast.factored_(Net())
            other.load_state_dict(saved(net.state_dict()))
            again = KINDS[kind](other, state_dtype=state_dtype, max_grad_norm=CLIP)
            again.load_state_dict(saved(optimizer.state_dict()))
        assert again.state_dtype == state_dtype
        assert_equal_states(optimizer, again)
        for i in range(3, 6):
            train_step(net, optimizer, i), train_step(other, again, i)
        for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
        assert_equal_states(optimizer, again)

    def test_what_is_stored_how(self, kind, state_dtype, net):
        optimizer = KINDS[kind](net, state_dtype=state_dtype)
        train_step(net, optimizer, 0)
        weight, z, ordinary = net.b.generator.weight, net.b.generator.z, net.out.weight
        name = optimizer.state_names[0]
        assert optimizer.state[z][name].dtype == optimizer.state[ordinary][name].dtype == torch.float32
        for p in (weight, net.b.generator.bias):
            if state_dtype == "8bit":
                assert (
                    optimizer.state[p][name + "_codes"].dtype == torch.uint8
                    and name not in optimizer.state[p]
                )
                assert optimizer.state[p][name + "_scales"].shape == (states.num_scales(p.shape),)
            else:
                assert optimizer.state[p][name].dtype == torch.bfloat16
        assert not any(name in s for s in (optimizer.state.get(net.conv.generator.carrier, {}),))

    def test_conversion_both_ways(self, kind, state_dtype, net):
        """Into float32 the stored values, to low precision the nearest; and training goes on."""
        low = KINDS[kind](net, state_dtype=state_dtype)
        for i in range(3):
            train_step(net, low, i)
        plain = KINDS[kind](net)
        plain.load_state_dict(saved(low.state_dict()))
        weight = net.b.generator.weight
        for i, name in enumerate(low.state_names):
            stored = low._states(weight, state_dtype)[i]
            assert plain.state[weight][name].dtype == torch.float32
            assert torch.equal(plain.state[weight][name], states.decode(stored, i == 0))
        again = KINDS[kind](net, state_dtype=state_dtype)
        again.load_state_dict(saved(plain.state_dict()))
        for i in range(len(low.state_names)):
            values = [states.decode(o._states(weight, state_dtype)[i], i == 0) for o in (low, again)]
            torch.testing.assert_close(*values, rtol=1e-5, atol=0)
        for optimizer in (plain, again):
            assert train_step(net, optimizer, 3).isfinite()

    def test_torch(self, kind, state_dtype, net):
        """bfloat16 states load into torch's optimizer; 8-bit ones do after a detour, and never by mistake."""
        low = KINDS[kind](net, state_dtype=state_dtype)
        train_step(net, low, 0)
        dense = hyperfast.factored_(copy.deepcopy(net), False)
        make = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[kind]
        theirs = make(dense.parameters(), lr=0.1)
        theirs.load_state_dict(saved(low.state_dict()))
        if state_dtype == "8bit" and kind != "SGD":  # torch's SGD starts without a buffer it does not find
            with pytest.raises(KeyError, match="exp_avg"):
                train_step(dense, theirs, 1)
        plain = KINDS[kind](net)
        plain.load_state_dict(low.state_dict())
        theirs = make(dense.parameters(), lr=0.1)
        theirs.load_state_dict(saved(plain.state_dict()))
        assert train_step(dense, theirs, 1).isfinite()

    def test_switching_factored_mode_off_and_on(self, kind, state_dtype):
        net = nn.Sequential(HyperLinear(4, 6), HyperLinear(6, 3))
        optimizer = KINDS[kind](net, state_dtype=state_dtype)
        for factored in (True, False, False, True):
            hyperfast.factored_(net, factored)
            optimizer.zero_grad()
            loss = net(torch.randn(5, 4)).square().mean()
            loss.backward()
            optimizer.step()
            found = optimizer.state[net[0].generator.weight]
            assert (optimizer.state_names[0] in found) == (not factored or state_dtype == torch.bfloat16)

    def test_nonfinite_changes_nothing(self, kind, state_dtype, net):
        optimizer = KINDS[kind](net, state_dtype=state_dtype, nonfinite="skip")
        train_step(net, optimizer, 0)
        backward(net, 1)
        net.a.generator.bias.grad[0] = float("inf")
        before, states_before = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
        torch.testing.assert_close(optimizer.state_dict(), states_before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state_dtype", LOW, ids=str)
def test_training_follows_float32(kind, state_dtype, backend):
    """300 steps of a regression: a final loss at most a quarter above that of float32 states."""

    def train(state_dtype):
        torch.manual_seed(0)
        net = nn.Sequential(HyperLinear(8, 16), nn.Tanh(), HyperLinear(16, 4))
        x = torch.randn(64, 8)
        y = torch.sin(x @ torch.randn(8, 4))
        optimizer = KINDS[kind](hyperfast.factored_(net), state_dtype=state_dtype, backend=backend)
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-10:]) / 10

    (start, low), (_, plain) = train(state_dtype), train(None)
    assert plain < 0.6 * start and low < 1.25 * plain


def test_bytes_of_the_states():
    net = hyperfast.factored_(HyperLinear(64, 256, z_dim=16))
    sizes = {}
    for state_dtype in (None, *LOW):
        optimizer = AdamW(net, state_dtype=state_dtype)
        net(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        state = optimizer.state[net.generator.weight]
        sizes[state_dtype] = sum(t.nbytes for t in state.values()) / net.generator.weight.numel()
    assert sizes[None] == pytest.approx(8, abs=1e-3)
    assert sizes[torch.bfloat16] == pytest.approx(4, abs=1e-3)
    assert sizes["8bit"] == pytest.approx(2 + 2 * 4 / 256, abs=1e-3)


@pytest.mark.parametrize("state_dtype", ["bf16", torch.float16, 8])
def test_bad_state_dtype(state_dtype):
    with pytest.raises(ValueError, match="state_dtype must be None, torch.bfloat16 or '8bit'"):
        AdamW(HyperLinear(2, 2), state_dtype=state_dtype)


@pytest.mark.parametrize("state_dtype", LOW, ids=str)
def test_needs_float32(state_dtype):
    net = hyperfast.factored_(HyperLinear(2, 2))
    optimizer = AdamW(net, state_dtype=state_dtype)
    net.double()
    net(torch.randn(2, 2, dtype=torch.float64)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="needs float32 parameters, got a factored weight of torch.float64"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    with pytest.raises(ValueError, match="needs float32 parameters"):
        SGD(net, state_dtype=state_dtype)
