"""LSTM against nn.LSTM; HyperLSTM against its cell step by step and against the reference."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import hyperfast
from hyperfast import reference
from hyperfast.nn import LSTM, HyperLSTM, HyperLSTMCell, LSTMCell, LSTMState

I, H, M, Z = 5, 7, 6, 3
F64 = torch.float64
LENGTHS = (2, 6, 1, 4)  # of the packed sequences: unsorted
SHARE = 0.4


def like_torch(ours: LSTM, **options) -> nn.LSTM:
    """nn.LSTM with the weights of `ours`."""
    options = {"batch_first": ours.batch_first, "dropout": ours.dropout} | options
    theirs = nn.LSTM(ours.input_size, ours.hidden_size, ours.num_layers, dtype=F64, **options)
    for i, layer in enumerate(ours.layers):
        weights = layer.weight_ih, layer.weight_hh, layer.bias, torch.zeros_like(layer.bias)
        names = f"weight_ih_l{i}", f"weight_hh_l{i}", f"bias_ih_l{i}", f"bias_hh_l{i}"
        theirs.load_state_dict(dict(zip(names, weights, strict=True)), strict=False)
    return theirs


def randomise_(module: nn.Module) -> nn.Module:
    """No parameter stays at a value that hides what it does."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def hyper(*sizes, layer_norm=True, **options) -> HyperLSTM:
    return randomise_(HyperLSTM(*(sizes or (I, H)), hyper_size=M, embedding_size=Z, layer_norm=layer_norm,
                                **{"dtype": F64} | options))  # fmt: skip


def state_of(module: LSTM | HyperLSTM, *lead: int, requires_grad: bool = True) -> tuple[torch.Tensor, ...]:
    sizes = module.layers[0].state_sizes
    return tuple(
        torch.randn(module.num_layers, *lead, size, dtype=F64, requires_grad=requires_grad) for size in sizes
    )


def flat(found) -> list[torch.Tensor]:
    output, state = found
    return [output.data if isinstance(output, PackedSequence) else output, *state]


def gradients(found, inputs) -> list[torch.Tensor]:
    """Of a sum in which every element of the output and of the last state has its own weight."""
    results = flat(found)
    torch.manual_seed(5)
    loss = sum((r.double() * torch.randn(r.shape, dtype=F64)).sum() for r in results)
    return torch.autograd.grad(loss, list(inputs), retain_graph=True)  # two may share a packing


def packed_input(features: int = I) -> tuple[torch.Tensor, PackedSequence]:
    x = torch.randn(max(LENGTHS), len(LENGTHS), features, dtype=F64, requires_grad=True)
    return x, pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)


def assert_close(actual, expected, **tolerance) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- LSTM is nn.LSTM


@pytest.mark.parametrize("kind", ["dense", "batch_first", "one sequence", "one step", "packed", "sorted"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("layers", [1, 2])
def test_like_torch(layers, with_state, kind):
    ours = randomise_(LSTM(I, H, layers, batch_first=kind == "batch_first", dtype=F64))
    theirs = like_torch(ours)
    lead = {"one sequence": ()}.get(kind, (4,))
    shapes = {"batch_first": (4, 6, I), "one sequence": (6, I), "one step": (1, 4, I)}
    if kind == "packed":
        x, given = packed_input()
    elif kind == "sorted":
        x = torch.randn(11, I, dtype=F64, requires_grad=True)
        given = pack_sequence([x[:5], x[5:8], x[8:10], x[10:]])
    else:
        given = x = torch.randn(shapes.get(kind, (6, 4, I)), dtype=F64, requires_grad=True)
    state = state_of(ours, *lead) if with_state else None
    found, expected = ours(given, state), theirs(given, state)
    assert_close(flat(found), flat(expected))
    if isinstance(given, PackedSequence):
        assert_close(found[0][1:], expected[0][1:])
    inputs = [x, *(state or ())]
    ours_p = [p for layer in ours.layers for p in (layer.weight_ih, layer.weight_hh, layer.bias)]
    theirs_p = [p for i in range(layers) for p in theirs.all_weights[i][:3]]
    assert_close(gradients(found, [*inputs, *ours_p]), gradients(expected, [*inputs, *theirs_p]))


def test_dropout_between_layers_like_torch():
    """The same elements, too: both draw one mask for a layer's outputs, step by step."""
    ours = randomise_(LSTM(I, H, 3, dropout=0.5, dtype=F64))
    theirs, x = like_torch(ours), torch.randn(6, 4, I, dtype=F64)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        found.append(flat(model(x)))
    assert_close(*found)
    assert not torch.allclose(found[0][0], ours.eval()(x)[0])
    assert_close(flat(ours(x)), flat(theirs.eval()(x)))


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("lead", [(4,), ()], ids=["batch", "one"])
def test_cell_like_torch(lead, with_state):
    ours, theirs = randomise_(LSTMCell(I, H, dtype=F64)), nn.LSTMCell(I, H, dtype=F64)
    weights = {"weight_ih": ours.weight_ih, "weight_hh": ours.weight_hh, "bias_ih": ours.bias}
    theirs.load_state_dict(weights | {"bias_hh": torch.zeros(4 * H)})
    x = torch.randn(*lead, I, dtype=F64)
    state = tuple(torch.randn(2, *lead, H, dtype=F64)) if with_state else None
    assert_close(ours(x, state), theirs(x, state))


# ---- HyperLSTM is its cell, step by step, and the reference


MODELS = {
    "lstm": lambda **options: randomise_(LSTM(I, H, 2, dtype=F64, **options)),
    "ln_lstm": lambda **options: randomise_(LSTM(I, H, 2, layer_norm=True, dtype=F64, **options)),
    "hyper_lstm": lambda **options: hyper(I, H, 2, layer_norm=False, **options),
    "ln_hyper_lstm": lambda **options: hyper(I, H, 2, layer_norm=True, **options),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def by_cells(model, x, state):
    """The sequence as a loop over `layers` as the cells they are."""
    states, outputs = [tuple(s[i] for s in state) for i in range(model.num_layers)], []
    for step in x:
        for i, cell in enumerate(model.layers):
            states[i] = cell(step, states[i])
            step = states[i][0]
        outputs.append(step)
    return torch.stack(outputs), [torch.stack(s) for s in zip(*states, strict=True)]


@pytest.mark.parametrize("T", [1, 6])
def test_a_sequence_is_its_steps(model, T):
    x, state = torch.randn(T, 4, I, dtype=F64, requires_grad=True), state_of(model, 4)
    found, expected = model(x, state), by_cells(model, x, state)
    assert_close(flat(found), flat(expected))
    inputs = [x, *state, *model.parameters()]
    assert_close(gradients(found, inputs), gradients(expected, inputs))


def by_reference(model: HyperLSTM, x, state):
    """Parameters put into `reference.lstm` by hand."""
    lasts = []
    for i, cell in enumerate(model.layers):
        p = dict(cell.named_parameters())
        norm = "gates_norm_weight", "gates_norm_bias", "cell_norm_weight", "cell_norm_bias"
        norms, hyper_norms = (
            reference.Norms(*(p[prefix + name] for name in norm)) if cell.layer_norm else None
            for prefix in ("", "hyper_")
        )
        z_bias = torch.cat([p["z_bias"], p["z_bias"].new_zeros(len(p["z_bias"]) // 2)])
        of_hyper = reference.HyperCell(
            p["hyper_weight_ih"],
            p["hyper_weight_hh"],
            p["hyper_bias"],
            p["z_weight"],
            z_bias,
            p["d_weight"],
            hyper_norms,
        )
        own, weights = LSTMState(*(s[i] for s in state)), (p["weight_ih"], p["weight_hh"], p["bias"])
        output, last = reference.lstm(x.reshape(-1, x.shape[-1]), own, *weights, norms, of_hyper)
        x = output.view(*x.shape[:-1], -1)
        lasts.append(last)
    return x, [torch.stack(s) for s in zip(*lasts, strict=True)]


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "norms"])
def test_long_sequences_are_the_reference(layer_norm):
    """100 steps in float32, which norms make lose digits, with at most twice the error of the reference."""
    model = HyperLSTM(9, 33, 1, 13, 5, layer_norm)
    for p in model.parameters():  # near the initial values, which keep a long sequence stable
        p.data.add_(0.02 * torch.randn_like(p))
    twin, x = copy.deepcopy(model).double(), torch.randn(100, 3, 9)

    def everything(module, found) -> list[torch.Tensor]:
        return [t.double() for t in (*flat(found), *gradients(found, module.parameters()))]

    found = model(x)
    zeros = [torch.zeros_like(s) for s in found[1]]
    plain, exact = (
        everything(m, by_reference(m, x.to(dtype), [s.to(dtype) for s in zeros]))
        for m, dtype in ((model, torch.float32), (twin, F64))
    )
    for ours, theirs, expected in zip(everything(model, found), plain, exact, strict=True):
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm() + 1e-6 * expected.norm()


def test_packed_sequences_are_those_sequences(model):
    x, packed = packed_input()
    state = state_of(model, len(LENGTHS))
    found = model(packed, state)
    padded, lengths = pad_packed_sequence(found[0])
    assert lengths.tolist() == list(LENGTHS)
    alone = [model(x[:length, b], tuple(s[:, b] for s in state)) for b, length in enumerate(LENGTHS)]
    for b, (output, own) in enumerate(alone):
        torch.testing.assert_close(padded[: LENGTHS[b], b], output)
        assert_close([s[:, b] for s in found[1]], own)
    inputs = [x, *state, *model.parameters()]
    rows = [alone[b][0][t] for t in range(max(LENGTHS)) for b in packed.sorted_indices if t < LENGTHS[b]]
    states = [torch.stack(s, 1) for s in zip(*(own for _, own in alone), strict=True)]
    assert_close(gradients(found, inputs), gradients((torch.stack(rows), states), inputs))


def test_batch_first_and_one_sequence(model):
    x = torch.randn(3, 4, I, dtype=F64)
    output, state = model(x)
    alone, own = model(x[:, 2])
    torch.testing.assert_close(alone, output[:, 2])
    assert_close(own, [s[:, 2] for s in state])
    model.batch_first = True
    turned, same = model(x.transpose(0, 1))
    torch.testing.assert_close(turned, output.transpose(0, 1))
    assert_close(same, state)


@pytest.mark.parametrize("batch_first", [False, True])
def test_no_sequences(model, batch_first):
    model.batch_first = batch_first
    x = torch.randn((0, 3, I) if batch_first else (3, 0, I), dtype=F64, requires_grad=True)
    output, state = model(x)
    assert output.shape == (*x.shape[:-1], H)
    sizes = model.layers[0].state_sizes
    assert [s.shape for s in state] == [(2, 0, size) for size in sizes]
    for d in torch.autograd.grad(output.sum(), [x, *model.parameters()], allow_unused=True):
        assert d is None or not d.count_nonzero()


def test_state_goes_on(model):
    """Truncated backpropagation: two halves are the whole, whatever tuple the state is given as."""
    x = torch.randn(6, 4, I, dtype=F64)
    whole, end = model(x)
    first, state = model(x[:2])
    second, last = model(x[2:], [s.detach() for s in state])
    torch.testing.assert_close(torch.cat([first, second]), whole)
    assert_close(last, end)
    assert type(state) is (LSTMState if isinstance(model, HyperLSTM) else tuple)
    h, c = state[:2]
    zeros = [torch.zeros_like(s) for s in state[2:]]
    assert_close(flat(model(x, (h, c))), flat(model(x, (h, c, *zeros))))
    assert_close(flat(model(x, LSTMState(h, c))), flat(model(x, (h, c))))


def test_gradcheck():
    for layer_norm in (False, True):
        model = randomise_(HyperLSTM(2, 3, 1, 2, 2, layer_norm, dtype=F64))
        names, parameters = zip(*model.named_parameters(), strict=True)
        x, state = torch.randn(3, 2, 2, dtype=F64, requires_grad=True), state_of(model, 2)

        def function(x, *tensors, model=model, names=names):
            given = dict(zip(names, tensors[4:], strict=True))
            return tuple(flat(torch.func.functional_call(model, given, (x, tensors[:4]))))

        assert torch.autograd.gradcheck(function, (x, *state, *parameters), fast_mode=True)


# ---- recurrent dropout


@pytest.mark.parametrize("kind", MODELS)
def test_recurrent_dropout(kind):
    model, x = MODELS[kind](recurrent_dropout=SHARE), torch.randn(6, 4, I, dtype=F64)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(x)[0])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    without = MODELS[kind]()
    without.load_state_dict(model.state_dict())
    assert_close(flat(model.eval()(x)), flat(without(x)))


def test_recurrent_dropout_drops_candidates():
    """c is sigmoid(i) tanh(g) where it was 0; as many as asked are dropped, the others scaled up, and others
    at every call."""
    model = LSTM(I, 64, 2, recurrent_dropout=SHARE, dtype=F64)
    x = torch.randn(16, I, dtype=F64)
    cells = [model.layers[0](x)[1] for _ in range(2)]
    whole = copy.deepcopy(model).eval().layers[0](x)[1]
    for c in cells:
        torch.testing.assert_close(c[c != 0], whole[c != 0] / (1 - SHARE))
        assert abs((c == 0).double().mean() - SHARE) < 0.05
    assert not torch.equal(cells[0] == 0, cells[1] == 0)


# ---- initial values and sizes


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "norms"])
def test_initial_values(layer_norm):
    cell = HyperLSTMCell(12, 40, 20, 8, layer_norm)
    for weight in (cell.weight_ih, cell.weight_hh, cell.hyper_weight_ih, cell.hyper_weight_hh):
        for gate in weight.detach().chunk(4):
            short = gate if gate.shape[0] <= gate.shape[1] else gate.mT
            torch.testing.assert_close(short @ short.mT, torch.eye(len(short)), atol=1e-5, rtol=0)
    ones, zero = ["z_bias"], ["bias", "hyper_bias"]
    if layer_norm:
        ones += [p + name for p in ("", "hyper_") for name in ("gates_norm_weight", "cell_norm_weight")]
        zero += [p + name for p in ("", "hyper_") for name in ("gates_norm_bias", "cell_norm_bias")]
    forget = ["gates_norm_bias", "hyper_gates_norm_bias"] if layer_norm else ["bias", "hyper_bias"]
    for name in ones + zero:
        p = cell.get_parameter(name).detach()
        expected = torch.full_like(p, float(name in ones))
        if name in forget:
            expected[len(p) // 4 : len(p) // 2] = 1
        torch.testing.assert_close(p, expected, msg=name)
    assert (cell.z_weight[:64] == 0).all()
    assert 0.009 < cell.z_weight[64:].std() < 0.011
    hyper_h = torch.randn(3, 20)  # whatever the hyper LSTM says, scales begin at 0.1 and shifts at 0
    z = (hyper_h @ cell.z_weight.mT + torch.cat([cell.z_bias, torch.zeros(32)])).view(3, 12, 8)
    d = torch.einsum("bpz,phz->bph", z, cell.d_weight)
    torch.testing.assert_close(d[:, :8], torch.full((3, 8, 40), 0.1))
    assert (d[:, 8:] == 0).all()


def test_reset_parameters_again():
    torch.manual_seed(3)
    model = HyperLSTM(I, H, 2, M, Z, layer_norm=True)
    twin = randomise_(copy.deepcopy(model))
    torch.manual_seed(3)
    twin.reset_parameters()
    assert_close(twin.parameters(), model.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        (LSTM, {}, 4_254_050),  # the paper's 4.25 M
        (LSTM, {"layer_norm": True}, 4_264_050),  # 4.26
        (HyperLSTM, {"embedding_size": 4}, 4_911_874),  # 4.91
        (HyperLSTM, {"embedding_size": 4, "layer_norm": True}, 4_923_154),  # 4.92
        # 5.06 there, which its own 14.41 for two such layers contradicts: that is this and a second layer
        (HyperLSTM, {"layer_norm": True}, 5_085_682),
        (HyperLSTM, {"layer_norm": True, "num_layers": 2}, 14_407_714),  # 14.41
    ],
)
def test_parameter_counts(kind, options, count):
    """Of the character models of the paper's table: 50 characters, one-hot, 1000 units, output layer."""
    made = nn.ModuleList([kind(50, 1000, device="meta", **options), nn.Linear(1000, 50, device="meta")])
    assert sum(p.numel() for p in made.parameters()) == count


# ---- as modules


def test_copies_and_files(model, tmp_path):
    x = torch.randn(3, 2, I, dtype=F64)
    expected = flat(model(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomise_(model.layers[0])
        assert_close(flat(twin(x)), expected)
        model.load_state_dict(twin.state_dict())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    randomise_(model).load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_close(flat(model(x)), expected)


def test_factory_arguments():
    model = HyperLSTM(I, H, 2, M, Z, layer_norm=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    half = HyperLSTMCell(I, H, M, Z, dtype=torch.bfloat16)
    assert half.weight_hh.detach().float().norm() == pytest.approx((4 * H) ** 0.5, rel=1e-2)
    assert str(model).count("HyperLSTMCell(") == 2
    shown = repr(LSTM(I, H, 2, layer_norm=True, recurrent_dropout=0.1, batch_first=True, dropout=0.2))
    assert "5, 7, num_layers=2, batch_first=True, dropout=0.2" in shown
    assert "LSTMCell(7, 7, layer_norm=True, recurrent_dropout=0.1)" in shown


def test_functional_call(model):
    x, other = torch.randn(3, 2, I, dtype=F64), randomise_(copy.deepcopy(model))
    found = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert_close(flat(found), flat(other(x)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Linear(I, I, dtype=F64), hyper()
        self.head = nn.Linear(H, 2, dtype=F64)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


@pytest.mark.parametrize("targets", [None, ["lstm.layers.0.weight_hh", "lstm.layers.0.d_weight"]])
def test_hyperize(targets):
    """A network with a HyperLSTM inside; and its weights may themselves be generated."""
    model, x = Tagger(), torch.randn(3, 2, I, dtype=F64)
    generated = hyperfast.hyperize(copy.deepcopy(model), z_dim=2, targets=targets)
    y = generated(x)
    torch.testing.assert_close(y, model(x))
    y.square().sum().backward()
    assert all(p.grad is not None for p in generated.parameters())
    torch.testing.assert_close(hyperfast.freeze(generated)(x), y)


@pytest.mark.parametrize(
    "kind", ["one layer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS)]
)
def test_compile(kind):
    torch._dynamo.reset()
    make = MODELS.get(kind, hyper)
    model, x = make(recurrent_dropout=SHARE), torch.randn(3, 2, I, dtype=F64)
    compiled, state = torch.compile(model, fullgraph=True, backend="aot_eager"), state_of(model, 2)
    found = []
    for function in (model, compiled):
        torch.manual_seed(7)
        results = function(x, state)
        found.append([*flat(results), *gradients(results, [*state, *model.parameters()])])
    assert_close(*found)
    torch._dynamo.reset()


def test_compile_packed():
    """In one graph, whatever lengths come: their number is the batch."""
    torch._dynamo.reset()
    model = MODELS["lstm"]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, packed = packed_input()
    with torch.no_grad():
        assert_close(flat(compiled(packed)), flat(model(packed)))
    torch._dynamo.reset()


def test_autocast():
    model = HyperLSTM(16, 24, 2, 8, 4, layer_norm=True)
    x = torch.randn(10, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model(x)
    assert output.dtype == torch.bfloat16
    expected, _ = model(x)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
    output.float().square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.square().sum().backward()
    for (name, p), grad in zip(model.named_parameters(), found, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - p.grad).norm() <= 0.05 * p.grad.norm(), name


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size must be an integer of at least 1, got 0"),
        ({"hidden_size": -1}, "hidden_size must be an integer of at least 1, got -1"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"hyper_size": 1.5}, "hyper_size must be an integer of at least 1, got 1.5"),
        ({"embedding_size": 0}, "embedding_size must be an integer of at least 1, got 0"),
        ({"recurrent_dropout": 1.0}, "recurrent_dropout must be the share to drop, .* below 1, got 1.0"),
        ({"recurrent_dropout": -0.1}, "recurrent_dropout must be the share to drop"),
        ({"dropout": 1.1}, "dropout must be the share to drop"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HyperLSTM(**{"input_size": I, "hidden_size": H} | options)


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match="applied between layers"):
        LSTM(I, H, dropout=0.5)
    with pytest.raises(TypeError, match="batch_first must be True or False"):
        LSTM(I, H, batch_first=1)


def test_bad_input():
    model = hyper(I, H, 2)
    x, state = torch.randn(3, 4, I, dtype=F64), state_of(model, 4)
    for bad, message in (
        (x[..., :-1], r"input must have input_size 5 as its last dimension, got shape \[3, 4, 4\]"),
        (x[None], r"input must be \[T, B, 5\] or, of one sequence, \[T, 5\], got shape \[1, 3, 4, 5\]"),
        (x[:0], r"input must have at least one time step, got shape \[0, 4, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad)
    for bad, message in (
        (x.float(), "input must be torch.float64 like the weights, got torch.float32"),
        (x.tolist(), "input must be a tensor, got list"),
        (x.to_sparse(), "input must be a dense tensor, got torch.sparse_coo"),
    ):
        with pytest.raises(TypeError, match=message):
            model(bad)
    h, c, hyper_h, hyper_c = state
    for bad, message in (
        ((h, c[:1], hyper_h, hyper_c), r"c of the state must be \[2, 4, 7\], got \[1, 4, 7\]"),
        ((h, c, hyper_h[..., :-1], hyper_c), r"hyper_h of the state must be \[2, 4, 6\], got \[2, 4, 5\]"),
        ((), r"state must be \(h, c\) or \(h, c, hyper_h, hyper_c\), got 0"),
        ((h, c, hyper_h), r"state must be \(h, c\) or \(h, c, hyper_h, hyper_c\), got 3"),
        ([s[:, 0] for s in state], r"h of the state must be \[2, 4, 7\], got \[2, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, bad)
    for bad, message in (
        (h, "state must be a tuple of tensors, got Tensor"),
        ((1.0, 2.0), "h of the state must be a tensor, got float"),
        ((h, None), "c of the state must be a tensor, got NoneType"),
        ((h, c, hyper_h, None), "hyper_c of the state must be a tensor, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            model(x, bad)
    with pytest.raises(ValueError, match=r"h of the state must be \[2, 7\], got \[2, 4, 7\]"):
        model(x[:, 0], state)
    with pytest.raises(ValueError, match=r"h of the state must be \[2, 4, 7\], got \[2, 3, 7\]"):
        model(packed_input()[1], tuple(s[:, :3] for s in state))
    with pytest.raises(ValueError, match=r"input must be packed \[N, 5\], got shape \[2, 4, 5\]"):
        model(PackedSequence(x[:2], torch.tensor([2])))
    with pytest.raises(ValueError, match="input must have at least one time step, got batch_sizes"):
        model(PackedSequence(x[0, :0], torch.tensor([], dtype=torch.int64)))


def test_bad_input_of_cells():
    cell = LSTMCell(I, H, dtype=F64)
    x, h = torch.randn(4, I, dtype=F64), torch.randn(4, H, dtype=F64)
    with pytest.raises(ValueError, match=r"input must be \[B, 5\] or \[5\], got shape \[1, 4, 5\]"):
        cell(x[None])
    with pytest.raises(ValueError, match=r"h of the state must be \[4, 7\], got \[4, 6\]"):
        cell(x, (h[:, 1:], h))
    with pytest.raises(ValueError, match=r"state must be \(h, c\), got 4 tensors"):
        cell(x, (h, h, h, h))
