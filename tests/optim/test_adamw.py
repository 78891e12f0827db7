"""hyperfast.optim.AdamW on factored gradients against torch.optim.AdamW on plain PyTorch twins."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import hyperfast
from hyperfast.nn import HyperLinear
from hyperfast.optim import AdamW
from tests.optim.net import CLIP, OPTIONS, Net, assert_steps_agree, backward, batch, train_step
from train.models import build_model


class TestTraining:
    """Many steps in float64."""

    @pytest.mark.parametrize("clip", [None, CLIP, 1e-3])
    def test_twenty_steps(self, pair, clip, assert_equal_parameters):
        ours, theirs = pair
        before = copy.deepcopy(theirs.state_dict())
        optimizer = AdamW(ours, **OPTIONS, max_grad_norm=clip)
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 20, clip)
        assert all(p.grad is None for p in ours.unused.parameters())
        assert torch.equal(ours.unused.generator.weight, before["unused.generator.weight"])  # not decayed
        assert not torch.equal(ours.b.generator.weight, before["b.generator.weight"])
        assert ours.conv.generator.carrier.count_nonzero() == 0

    def test_the_norm_is_reported(self, pair):
        ours, theirs = pair
        optimizer = AdamW(ours, max_grad_norm=CLIP)
        assert optimizer.grad_norm is None
        backward(ours, 0), backward(theirs, 0)
        optimizer.step()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP).item()
        assert isinstance(optimizer.grad_norm, float) and expected > CLIP
        assert optimizer.grad_norm == pytest.approx(expected, rel=1e-12)

    def test_clip_before_the_step(self, pair, assert_equal_parameters):
        """hyperfast.optim.clip_grad_norm_ and a step without clipping is the same."""
        ours, theirs = pair
        optimizer = AdamW(ours, **OPTIONS)
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        for i in range(5):
            optimizer.zero_grad()
            backward(ours, i)
            hyperfast.optim.clip_grad_norm_(ours, CLIP)
            optimizer.step()
            train_step(theirs, reference, i, CLIP)
        assert_equal_parameters(ours, theirs, 1e-9)

    def test_full_scaled_down(self, monkeypatch, plain_twin, assert_equal_parameters):
        monkeypatch.setattr("train.models.full.CHANNELS", (3, 4, 4, 6, 6, 512))
        ours = build_model("full", 10, fused=True, z_dim=2).double()
        self.train_full(ours, plain_twin(ours), 20, assert_equal_parameters)

    @pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
    def test_full(self, steps, plain_twin, assert_equal_parameters):
        ours = build_model("full", fused=True).double()
        self.train_full(ours, plain_twin(ours), steps, assert_equal_parameters)

    def train_full(self, ours, theirs, steps, check):
        """Dropout seeded, the recipe's optimizer and clipping, cosine schedule."""
        options = {"lr": 1e-3, "weight_decay": 1e-4}
        optimizer = AdamW(ours, **options, max_grad_norm=1.0)
        reference = torch.optim.AdamW(theirs.parameters(), **options, fused=True)
        schedulers = [CosineAnnealingLR(o, 20, 1e-6) for o in (optimizer, reference)]
        for i in range(steps):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
            losses = []
            for model, o in ((ours, optimizer), (theirs, reference)):
                torch.manual_seed(1000 + i)
                o.zero_grad()
                loss = F.cross_entropy(model(x), torch.arange(4))
                loss.backward()
                if o is reference:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                o.step()
                losses.append(loss.item())
            assert abs(losses[0] - losses[1]) <= 1e-9
            for scheduler in schedulers:
                scheduler.step()
        check(ours, theirs, 1e-9)


class TestSingleSteps:
    """From equal inputs, at the precisions people train in."""

    @pytest.mark.parametrize("step", range(4))
    def test_float32(self, pair, step, assert_equal_parameters):
        ours, theirs = pair
        optimizer = AdamW(ours, **OPTIONS, max_grad_norm=CLIP)
        for i in range(step):
            train_step(ours, optimizer, i)
        ours.float(), theirs.float()
        theirs.load_state_dict(ours.state_dict())
        state = optimizer.state_dict()
        optimizer, reference = (
            AdamW(ours, **OPTIONS, max_grad_norm=CLIP),
            torch.optim.AdamW(theirs.parameters(), **OPTIONS),
        )
        optimizer.load_state_dict(state), reference.load_state_dict(copy.deepcopy(state))
        loss, expected = train_step(ours, optimizer, step), train_step(theirs, reference, step, CLIP)
        assert abs(loss - expected) <= 1e-5
        assert_equal_parameters(ours, theirs, 1e-5)

    def test_bfloat16(self, pair, plain_twin):
        """At most twice the error of plain PyTorch at that precision, against float64."""
        ours, exact = pair
        ours.bfloat16()
        exact.load_state_dict(ours.state_dict())
        exact.double()
        plain = copy.deepcopy(exact).bfloat16()
        train_step(ours, AdamW(ours, **OPTIONS), 0)
        for model in (plain, exact):
            train_step(model, torch.optim.AdamW(model.parameters(), **OPTIONS), 0)
        for name, p in exact.state_dict().items():
            ours_error = (ours.state_dict()[name].double() - p.double()).norm()
            plain_error = (plain.state_dict()[name].double() - p.double()).norm()
            assert ours_error <= 2 * plain_error + 2**-8 * p.double().norm(), name


class TestGradients:
    def test_accumulation_equals_one_batch(self, assert_equal_parameters):
        nets = [hyperfast.factored_(HyperLinear(6, 3, dtype=torch.float64))]
        nets.append(copy.deepcopy(nets[0]))
        optimizers = [AdamW(net, **OPTIONS, max_grad_norm=CLIP) for net in nets]
        for _ in range(4):
            x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))
            optimizers[0].zero_grad(), optimizers[1].zero_grad()
            F.cross_entropy(nets[0](x), y).backward()
            for part in range(4):
                rows = slice(3 * part, 3 * part + 3)
                (F.cross_entropy(nets[1](x[rows]), y[rows]) / 4).backward()
            for optimizer in optimizers:
                optimizer.step()
            assert_equal_parameters(nets[0], nets[1], 1e-12)

    def test_zeroed_gradients_still_decay(self, pair, assert_equal_parameters):
        """zero_grad(set_to_none=False): torch updates with gradient zero, moments and decay included."""
        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2)
        for o in (optimizer, reference):
            o.zero_grad(set_to_none=False)
            o.step()
            o.step()
        assert_equal_parameters(ours, theirs, 1e-12)

    def test_no_gradients_no_change(self, pair):
        ours, _ = pair
        optimizer = AdamW(ours, max_grad_norm=1.0)
        before = copy.deepcopy(ours.state_dict())
        optimizer.step()
        assert optimizer.grad_norm == 0.0
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())

    @pytest.mark.parametrize("frozen", ["z", "weight", "generator", "layer bias"])
    def test_frozen_parts(self, frozen, pair, assert_equal_parameters):
        ours, theirs = pair
        for net in (ours, theirs):
            for name in ("conv", "a", "b") if frozen != "layer bias" else ("a", "b"):
                layer = net.get_submodule(name)
                parts = {"generator": layer.generator.parameters(), "layer bias": [layer.bias]}
                for p in parts.get(frozen) or [getattr(layer.generator, frozen)]:
                    p.requires_grad_(False)
        optimizer = AdamW(ours, **OPTIONS, max_grad_norm=CLIP)
        reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 4, CLIP)
        assert ours.conv.generator.carrier.count_nonzero() == 0

    def test_a_frozen_bias_trains_dense_only(self):
        layer = HyperLinear(4, 3)
        layer.generator.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="frozen bias"):
            hyperfast.factored_(layer)
        layer.generator.bias.requires_grad_(True)
        optimizer = AdamW(hyperfast.factored_(layer))
        layer.generator.bias.requires_grad_(False)  # too late: dw has no place to go
        layer(torch.randn(2, 4)).sum().backward()
        with pytest.raises(ValueError, match="bias"):
            optimizer.step()

    def test_freezing_and_thawing_in_the_middle(self, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer = AdamW(ours, **OPTIONS)
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        for i in range(6):
            for net in (ours, theirs):
                net.a.generator.weight.requires_grad_(i not in (1, 2))
                net.b.generator.z.requires_grad_(i not in (2, 3))
            assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 1, start=i)

    def test_dense_models_train_too(self, pair, plain_twin, assert_equal_parameters):
        ours, theirs = pair
        hyperfast.factored_(ours, False)
        optimizer = AdamW(ours, **OPTIONS, max_grad_norm=CLIP)
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 4, CLIP)
        assert ours.a.generator.weight.grad is not None

    @pytest.mark.parametrize("part", ["dw", "z", "other"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("nonfinite", ["raise", "skip"])
    def test_nonfinite_changes_nothing(self, pair, part, value, nonfinite):
        ours, _ = pair
        optimizer = AdamW(ours, **OPTIONS, nonfinite=nonfinite, max_grad_norm=1.0)
        train_step(ours, optimizer, 0)
        made = ours.a.generator()[0].detach().clone()
        optimizer.zero_grad()
        backward(ours, 1)
        before = copy.deepcopy((ours.state_dict(), optimizer.state_dict()["state"]))
        where = {"dw": ours.a.generator.bias, "z": ours.b.generator.z, "other": ours.out.weight}[part]
        where.grad.view(-1)[-1] = value
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="nothing was updated"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        torch.testing.assert_close(
            (ours.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0
        )
        assert torch.equal(ours.a.generator()[0], made)
        train_step(ours, optimizer, 2)  # and goes on
        assert not torch.equal(ours.out.weight, before[0]["out.weight"])

    def test_grad_scaler(self, pair, assert_equal_parameters):
        ours, theirs = pair
        ours.float(), theirs.float()
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
        for i in range(5):
            for net, o, scaler in zip((ours, theirs), (optimizer, reference), scalers, strict=True):
                o.zero_grad()
                x, y = batch(i, torch.float32)
                scaler.scale(F.cross_entropy(net(x), y)).backward()
                if i == 2:  # an overflow: both skip
                    net.a.generator.bias.grad[0] = float("inf")
                scaler.unscale_(o)
                clip = hyperfast.optim.clip_grad_norm_ if net is ours else torch.nn.utils.clip_grad_norm_
                clip(net.parameters(), CLIP)
                scaler.step(o)
                scaler.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_equal_parameters(ours, theirs, 1e-4)

    def test_autocast(self, pair, assert_equal_parameters):
        ours, theirs = (net.float() for net in pair)
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        for net, o in ((ours, optimizer), (theirs, reference)):
            x, y = batch(0, torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            o.step()
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
        # AdamW's first step is lr times the gradient's sign: bf16 rounding shows where the sign is in doubt
        assert_equal_parameters(ours, theirs, 2.1 * OPTIONS["lr"])

    def test_closure(self, pair):
        ours, _ = pair
        optimizer = AdamW(ours, **OPTIONS)
        before = ours.out.weight.detach().clone()
        loss = optimizer.step(lambda: backward(ours, 0))
        assert loss.item() > 0 and not torch.equal(ours.out.weight, before)


class TestGroups:
    def groups(self, net, lrs):
        roles = {"weight": [], "z": [], "bias": [], "other": []}
        for name, p in net.named_parameters():
            role = name.rpartition(".")[2] if ".generator." in name else "other"
            roles["bias" if role == "carrier" else role].append(p)
        return [{"params": roles[r], "lr": lr, "weight_decay": wd} for r, (lr, wd) in lrs.items()]

    def test_each_role_its_own_options(self, pair, assert_equal_parameters):
        ours, theirs = pair
        lrs = {"weight": (1e-2, 0.1), "bias": (3e-3, 0.0), "z": (3e-2, 0.0), "other": (1e-3, 0.01)}
        options = {
            role: {
                "lr": lr,
                "weight_decay": wd,
                "betas": (0.8, 0.95 if role == "weight" else 0.9),
                "eps": 1e-6,
            }
            for role, (lr, wd) in lrs.items()
        }
        other = options.pop("other")
        optimizer = AdamW(hyperfast.param_groups(ours, **options, **other), max_grad_norm=CLIP)
        groups = self.groups(theirs, lrs)
        for group, role in zip(groups, lrs, strict=True):
            group.update(betas=options.get(role, other)["betas"], eps=1e-6)
        reference = torch.optim.AdamW(groups)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 6, CLIP)

    def test_param_groups_hold_each_parameter_once(self, pair):
        ours, _ = pair
        groups = hyperfast.param_groups(ours, z={"lr": 1.0}, weight_decay=0.5)
        members = [id(p) for g in groups for p in g["params"]]
        assert sorted(members) == sorted(id(p) for p in ours.parameters())
        assert all(g["weight_decay"] == 0.5 for g in groups)
        assert [g.get("lr") for g in groups if g["name"] == "z"] == [1.0]
        assert [g["name"] for g in hyperfast.param_groups(nn.Linear(2, 2))] == ["other"]

    def test_triples_across_groups_and_later_groups(self, pair, assert_equal_parameters):
        """weight, bias and z of one layer in three groups; z added later."""
        ours, theirs = pair
        for net in (ours, theirs):
            net.requires_grad_(False)
            net.a.requires_grad_(True)
        g, h = ours.a.generator, theirs.a.generator
        optimizer = AdamW(
            [{"params": [g.weight, ours.a.bias]}, {"params": [g.bias, g.z], "lr": 0.1}], **OPTIONS
        )
        reference = torch.optim.AdamW(
            [{"params": [h.weight, theirs.a.bias]}, {"params": [h.bias, h.z], "lr": 0.1}], **OPTIONS
        )
        optimizer.add_param_group({"params": [ours.out.weight.requires_grad_()], "lr": 0.2})
        reference.add_param_group({"params": [theirs.out.weight.requires_grad_()], "lr": 0.2})
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 4)

    @pytest.mark.parametrize("missing", ["bias", "z"])
    def test_a_split_triple_raises(self, missing, pair):
        ours, _ = pair
        left_out = getattr(ours.a.generator, missing)
        rest = [p for p in ours.parameters() if p is not left_out]
        with pytest.raises(ValueError, match=f"without its {missing}"):
            AdamW(rest)
        with pytest.raises(ValueError, match=f"without its {missing}"):
            hyperfast.optim.clip_grad_norm_(rest, 1.0)

    def test_a_triple_split_after_construction_raises_before_any_change(self, pair):
        ours, _ = pair
        optimizer = AdamW(ours, **OPTIONS)
        train_step(ours, optimizer, 0)
        optimizer.zero_grad()
        backward(ours, 1)
        group, z = optimizer.param_groups[0], ours.a.generator.z
        group["params"] = [p for p in group["params"] if p is not z]
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match="without its z"):
            optimizer.step()
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())

    def test_a_weight_with_a_dense_gradient_too_raises(self, pair):
        ours, _ = pair
        optimizer = AdamW(ours)
        backward(ours, 0)
        ours.a.generator.weight.grad = torch.zeros_like(ours.a.generator.weight)
        with pytest.raises(RuntimeError, match="dense gradient too"):
            optimizer.step()

    def test_named_parameters(self, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer = AdamW(ours.named_parameters(), **OPTIONS)
        reference = torch.optim.AdamW(theirs.named_parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2)
        saved, expected = optimizer.state_dict(), reference.state_dict()
        assert saved["param_groups"][0]["param_names"] == expected["param_groups"][0]["param_names"]
        reference.load_state_dict(saved), optimizer.load_state_dict(expected)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2, start=2)


SCHEDULERS = {
    "cosine": lambda o: CosineAnnealingLR(o, 4, 1e-6),
    "lambda": lambda o: LambdaLR(o, [lambda t: 0.5**t] * len(o.param_groups)),
    "one cycle": lambda o: OneCycleLR(o, 0.05, total_steps=8),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer = AdamW(hyperfast.param_groups(ours), **OPTIONS)
    reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, reference)]
    for i in range(6):
        assert_steps_agree(
            ours, theirs, optimizer, reference, assert_equal_parameters, 1, CLIP * 100, start=i
        )
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["betas"] == reference.param_groups[0]["betas"]


def test_lr_as_a_tensor(pair, assert_equal_parameters):
    ours, theirs = pair
    optimizer, reference = AdamW(ours, lr=torch.tensor(0.01)), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    # torch.tensor(0.01) is a float32
    assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, tolerance=1e-7)


class TestState:
    @pytest.mark.parametrize("to", ["torch", "hyperfast"])
    @pytest.mark.parametrize("through_a_file", [False, True])
    def test_interchange(self, to, through_a_file, pair, plain_twin, assert_equal_parameters):
        """Train on one side, continue on the other; 3 + 3 steps equal 6."""
        ours, theirs = pair
        make = {
            "torch": lambda: torch.optim.AdamW(theirs.parameters(), lr=1.0),
            "hyperfast": lambda: AdamW(ours, lr=1.0),
        }
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3)
        state = copy.deepcopy((reference if to == "hyperfast" else optimizer).state_dict())
        if through_a_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        fresh = make[to]()
        fresh.load_state_dict(state)
        if to == "hyperfast":
            optimizer = fresh
        else:
            reference = fresh
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, start=3)

    def test_state_dicts_are_alike(self, pair):
        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        train_step(ours, optimizer, 0), train_step(theirs, reference, 0)
        got, expected = optimizer.state_dict(), reference.state_dict()
        assert got["param_groups"] == expected["param_groups"]
        assert got["state"].keys() == expected["state"].keys()
        torch.testing.assert_close(got["state"], expected["state"])

    @pytest.mark.parametrize("option", ["amsgrad", "maximize"])
    def test_states_of_what_it_does_not_do_are_refused(self, option, pair):
        ours, theirs = pair
        reference = torch.optim.AdamW(theirs.parameters(), **{option: True})
        train_step(theirs, reference, 0)
        with pytest.raises(ValueError, match=option):
            AdamW(ours).load_state_dict(reference.state_dict())

    def test_a_state_of_another_model_is_refused(self, pair):
        ours, _ = pair
        other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
        optimizer = AdamW(ours)
        with pytest.raises(ValueError, match="parameter group|size"):
            optimizer.load_state_dict(other.state_dict())
        train_step(ours, optimizer, 0)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_of_model_and_optimizer_go_on(self, how, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer = AdamW(ours, **OPTIONS, max_grad_norm=CLIP, nonfinite="skip")
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, CLIP)
        if how == "deepcopy":
            copied = copy.deepcopy((ours, optimizer))
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps((ours, optimizer)))
        else:
            file = io.BytesIO()
            torch.save((ours, optimizer), file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert copied[1].max_grad_norm == CLIP and copied[1].nonfinite == "skip"
        twin = copy.deepcopy((theirs, reference))
        assert_steps_agree(copied[0], twin[0], copied[1], twin[1], assert_equal_parameters, 3, CLIP, start=3)
        # the originals are untouched by it and go on as well
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, CLIP, start=5)

    def test_load_state_dict_in_the_middle_continues(self, pair, assert_equal_parameters):
        """Both saved after 3 steps, trained away, loaded again into the same and into fresh objects."""
        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3)
        saved = copy.deepcopy((ours.state_dict(), optimizer.state_dict()))
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2, start=9)
        for net, o in ((ours, optimizer), (theirs, reference)):
            net.load_state_dict(saved[0])
            o.load_state_dict(copy.deepcopy(saved[1]))  # torch takes the tensors as they are
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, start=3)
        fresh = hyperfast.factored_(Net().double())
        fresh.load_state_dict(saved[0])
        again = AdamW(fresh)
        again.load_state_dict(saved[1])
        for i in range(3, 6):
            train_step(fresh, again, i)
        assert_equal_parameters(fresh, ours, 0.0)

    def test_changing_the_dtype_in_the_middle(self, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2)
        for net, o in ((ours, optimizer), (theirs, reference)):
            net.zero_grad()
            net.float()
            o.load_state_dict(o.state_dict())  # casts the state, as in torch
        assert_steps_agree(
            ours, theirs, optimizer, reference, assert_equal_parameters, 2, start=2, tolerance=1e-4
        )

    @pytest.mark.parametrize("how", ["in place", ".data and invalidate", "a new parameter"])
    def test_edits_of_parameters_between_steps(self, how, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 2)
        for net in (ours, theirs):
            g = net.a.generator
            for name in ("weight", "bias", "z"):
                p = getattr(g, name)
                if how == "in place":
                    with torch.no_grad():
                        p.mul_(0.5)
                elif how == "a new parameter":
                    setattr(g, name, nn.Parameter(p.detach() * 0.5))
                else:
                    p.data.mul_(0.5)
        if how == "a new parameter":
            optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        elif how != "in place":
            hyperfast.invalidate(ours)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 3, start=2)

    def test_averaged_models(self, pair):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        ours, theirs = pair
        optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        averaged = [
            AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
            for net in (ours, theirs)
        ]
        for i in range(4):
            train_step(ours, optimizer, i), train_step(theirs, reference, i)
            averaged[0].update_parameters(ours), averaged[1].update_parameters(theirs)
        x, _ = batch(0)
        torch.testing.assert_close(averaged[0].eval()(x), averaged[1].eval()(x))


class TestStockOptimizers:
    @pytest.mark.parametrize(
        "make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop]
    )
    def test_refused_in_factored_mode(self, make, pair):
        ours, _ = pair
        optimizer = make(ours.parameters(), lr=0.1)
        backward(ours, 0)
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(
            RuntimeError, match="cannot step a generator in factored mode.*hyperfast.optim.AdamW"
        ):
            optimizer.step()
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())

    def test_work_again_after_factored_is_off(self, pair, assert_equal_parameters):
        ours, theirs = pair
        optimizer = torch.optim.AdamW(ours.parameters(), **OPTIONS)
        with pytest.raises(RuntimeError):
            optimizer.step()
        hyperfast.factored_(ours, False)
        optimizer = torch.optim.AdamW(ours.parameters(), **OPTIONS)
        reference = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
        assert_steps_agree(ours, theirs, optimizer, reference, assert_equal_parameters, 4)

    def test_may_train_the_rest(self, pair):
        ours, _ = pair
        torch.optim.SGD(ours.out.parameters(), lr=0.1).step()

    def test_refused_for_copies_and_new_parameters(self, pair):
        ours, _ = pair
        copied = copy.deepcopy(ours)
        ours.a.generator.weight = nn.Parameter(torch.randn(24, 3).double())
        for net in (copied, ours.a, pickle.loads(pickle.dumps(ours))):
            with pytest.raises(RuntimeError, match="factored mode"):
                torch.optim.SGD(net.parameters(), lr=0.1).step()


BAD_OPTIONS = {
    "lr": ({"lr": -1.0}, "lr"),
    "beta1": ({"betas": (1.0, 0.9)}, "betas"),
    "beta2": ({"betas": (0.9, -0.1)}, "betas"),
    "eps": ({"eps": -1e-8}, "eps"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay"),
    "max_grad_norm": ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    "max_grad_norm nan": ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
    "nonfinite": ({"nonfinite": "ignore"}, "nonfinite must be one of raise, skip"),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        AdamW(HyperLinear(2, 2), **options)
    if case not in ("max_grad_norm", "max_grad_norm nan", "nonfinite", "backend"):
        with pytest.raises(ValueError, match=message):
            AdamW([{"params": HyperLinear(2, 2).parameters(), **options}])


def test_generators_that_share_a_weight_with_different_embeddings_are_refused():
    net = nn.ModuleList([HyperLinear(4, 3), HyperLinear(4, 3)])
    net[1].generator.weight, net[1].generator.bias = net[0].generator.weight, net[0].generator.bias
    hyperfast.factored_(net)
    with pytest.raises(ValueError, match="shared by generators with different embeddings"):
        AdamW(net)


def test_generators_that_share_an_embedding(plain_twin, assert_equal_parameters):
    ours = nn.Sequential(HyperLinear(4, 4, dtype=torch.float64), HyperLinear(4, 3, dtype=torch.float64))
    twin = plain_twin(ours)
    for net in (ours, twin):
        net[1].generator.z = net[0].generator.z
    optimizer = AdamW(hyperfast.factored_(ours), **OPTIONS, max_grad_norm=CLIP)
    reference = torch.optim.AdamW(twin.parameters(), **OPTIONS)
    for _ in range(4):
        x = torch.randn(5, 4, dtype=torch.float64)
        for net, o in ((ours, optimizer), (twin, reference)):
            o.zero_grad()
            net(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimizer.step(), reference.step()
    assert_equal_parameters(ours, twin, 1e-12)


def test_a_weight_that_is_not_contiguous_raises_before_any_change():
    layer = HyperLinear(4, 3, z_dim=5)
    layer.generator.weight = nn.Parameter(torch.randn(5, 12).t())
    hyperfast.factored_(layer)
    layer(torch.randn(2, 4)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="contiguous"):
        AdamW(layer).step()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
