import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import hyperfast
from tests.train import tiny
from train import conditional, report
from train.images import ImageData
from train.loop import RunError
from train.models.conditional import FEATURES, GENERATED, MODELS, ConditionalNet, SmallNet, build_conditional
from train.summary import load_run

DTYPE = torch.float64


def conditioned(fused=True):
    """A conditional network in float64 whose shifts and running statistics are not those of the beginning."""
    model = build_conditional("conditional", fused=fused).double()
    with torch.no_grad():
        for p in (*model.shifts.parameters(), *(g.bias for g in model.network.generators.values())):
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()  # in training batch norm mixes the samples


def one_image_at_a_time(model, x):
    """The specification: w = W z + b by hand for each image, put into the plain network."""
    plain = SmallNet(backend="reference").double().eval()
    rest = {n.removeprefix("network.module."): t for n, t in model.named_parameters()}
    rest |= {n.removeprefix("network.module."): t for n, t in model.named_buffers()}
    rest = {n: t for n, t in rest.items() if n.split(".")[0] not in ("network", "encoder", "shifts")}
    logits = []
    for image in x.unsqueeze(1):
        features = model.encoder(image)[0] / FEATURES**0.5
        weights = {}
        for layer in GENERATED:
            g = model.network.generators[f"{layer}/weight"]
            z = g.z + model.shifts[layer].weight @ features
            weights[f"{layer}.weight"] = (g.weight @ z + g.bias).view(g.shapes[0])
        logits.append(functional_call(plain, rest | weights, image))
    return torch.cat(logits)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_a_loop_over_the_images(fused):
    model, x = conditioned(fused), torch.randn(5, 3, 32, 32, dtype=DTYPE, requires_grad=True)
    y = torch.arange(5)
    ours, theirs = model(x), one_image_at_a_time(model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = {"x": x} | dict(model.named_parameters())
    got, wanted = (
        torch.autograd.grad(F.cross_entropy(logits, y), inputs.values()) for logits in (ours, theirs)
    )
    for name, a, b in zip(inputs, got, wanted, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item() + 1e-13, msg=name)


def test_an_image_has_its_own_network():
    model, x = conditioned(), torch.randn(3, 3, 32, 32, dtype=DTYPE)
    z = model.embeddings(x)
    assert {name: tuple(own.shape) for name, own in z.items()} == dict.fromkeys(GENERATED, (3, 4))
    for b in range(3):
        plain = hyperfast.freeze(model.network, z={name: own[b].detach() for name, own in z.items()})
        assert type(plain) is SmallNet
        torch.testing.assert_close(plain(x[b : b + 1])[0], model(x)[b], rtol=1e-9, atol=1e-9)


def test_it_starts_as_the_static_hypernetwork():
    made = {}
    for name in ("conditional", "static"):
        torch.manual_seed(0)
        made[name] = hyperfast.factored_(build_conditional(name), False).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(made["conditional"](x), made["static"](x), rtol=1e-4, atol=1e-4)
    weights = made["conditional"].network.generate()
    he = {name: (2 / w[0].numel()) ** 0.5 for name, w in weights.items()}
    assert all(0.7 < w.std() / he[name] < 1.3 for name, w in weights.items())


def test_models():
    count = {name: sum(p.numel() for p in build_conditional(name).parameters()) for name in MODELS}
    generated = 32 * 64 * 9 + 64 * 128 * 9 + 128 * 128 * 9 + 1280
    assert count["static"] == count["plain"] + 4 * generated + 4 * 4
    assert count["conditional"] > count["static"] and isinstance(
        build_conditional("conditional"), ConditionalNet
    )
    static = build_conditional("static")
    assert static.generators["conv2/weight"].factored
    assert not build_conditional("static", fused=False).generators["conv2/weight"].factored
    with pytest.raises(ValueError, match="unknown model 'dynamic'; choose one of conditional, static, plain"):
        build_conditional("dynamic")


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def small_data(monkeypatch):
    """Images of four classes: which quarter is bright."""
    g = torch.Generator().manual_seed(3)

    def part(n):
        y = torch.arange(n) % 4
        x = torch.randint(0, 100, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
        for image, label in zip(x, y.tolist(), strict=True):
            row, column = 16 * (label // 2), 16 * (label % 2)
            image[:, row : row + 16, column : column + 16] += 120
        return x, y

    data = ImageData(part(64), part(16), part(24), tiny.augment, lambda x: x.float() / 255)
    monkeypatch.setattr(conditional.cifar10, "load_data", lambda args: (data, 7))
    monkeypatch.setattr(report, "save_figure", lambda figure, path: path.touch())  # drawing takes long
    return data


def run(out, *options):
    arguments = ["--batch-size", "16", "--epochs", "2", "--threads", "1", "--out", str(out), *options]
    return conditional.run(conditional.parse(arguments), conditional.COMMAND.line(arguments))


OTHERS = [["--no-fused"], ["--model", "static"], ["--model", "plain"]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--fused"], *OTHERS])
def test_the_loss_falls(small_data, tmp_path, options):
    trainer = run(tmp_path / "run", "--epochs", "4", *options)
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < 0.8 * losses[0]
    assert load_run(tmp_path / "run").history[-1]["test_accuracy"] > 30


def test_the_report_says_what_the_conditioning_does(small_data, tmp_path):
    trainer = run(tmp_path / "run")
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Conditioning" in text and "| K = 16 | airplane | automobile | bird | cat |" in text
    assert "with the mean z for all images" in text and "plain network" not in text
    z = trainer.model.embeddings(trainer.data.normalize(trainer.data.test[0]))["conv3"].double()
    shifts = z - z.mean(0)
    line = next(line for line in text.split("## Conditioning")[1].splitlines() if "conv3 |" in line)
    assert line.split("|")[1].strip() == "network.conv3" and "| network.conv3 | LinearGenerator |" in text
    assert line.split("|")[2:4] == [
        f" {z.mean(0).norm():.3f} ",
        f" {shifts.square().sum(1).mean().sqrt():.3f} ",
    ]
    assert 0 <= float(line.split("|")[4].strip(" %")) <= 100


def test_variation_of_known_embeddings():
    labels = torch.tensor([0, 0, 1, 1])
    z = torch.tensor([[1.0, 0], [1, 0], [5, 0], [5, 0]])
    assert conditional._variation(z, labels) == ["3.000", "2.000", "100.0 %"]
    assert conditional._variation(z[[0, 2, 0, 2]], labels) == ["3.000", "2.000", "0.0 %"]
    assert conditional._variation(z[:2], labels[:2]) == ["1.000", "0.000", ""]
    assert "| K = 2 | airplane | automobile |" in conditional._classes(z, labels)


def test_rounding_is_no_conditioning():
    labels = torch.arange(8) % 4
    z = torch.randn(3) + 1e-5 * torch.randn(8, 3)
    assert conditional._variation(z.double(), labels)[2] == ""
    assert "no cosines between classes" in conditional._classes(z, labels)


@pytest.mark.slow
def test_resume_is_the_same_run(small_data, tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "half", "--max-steps", "4")
    resumed = run(tmp_path / "half", "--resume")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    with pytest.raises(RunError, match="z_dim was 4, now 5"):
        run(tmp_path / "half", "--resume", "--z-dim", "5")


@pytest.mark.parametrize("option", [["--save-frozen"], ["--generated-l2", "0.1"]])
def test_options_for_one_set_of_weights_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        conditional.parse(option)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert option[0] in error and "has weights for every image, not one set" in error
    assert conditional.parse([*option, "--model", "static"]).model == "static"


@pytest.mark.slow
def test_compiled():
    model, x = conditioned(), torch.randn(3, 3, 32, 32, dtype=DTYPE)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    loss = F.cross_entropy(compiled(x), torch.arange(3))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(3)), parameters)
    for got, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    torch._dynamo.reset()
