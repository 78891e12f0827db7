"""The VGG networks, and `python -m train.vgg` on few random images; what all commands share is tested with
cifar100."""

import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import hyperfast
from hyperfast.factored import generator_of
from hyperfast.nn import named_generators, parameter_counts
from tests.train.test_cifar10 import TinyNet, images
from tests.train.test_cifar100 import one_line
from train import checkpoint, command, compare, comparison, models, report, vgg
from train.data import DataError, ImageSet, subset
from train.images import ImageData
from train.loop import Config, Trainer
from train.losses import LOSSES, WithCenters
from train.models import build_model
from train.models.vgg import HYPERS, MODELS, VGG, Block, build_vgg
from train.optimizers import NesterovSGD

# ---- networks ----

CONVOLUTIONS = [(64, 3), (128, 64), (256, 128), (256, 256), (512, 256), (512, 512), (512, 512), (512, 512)]
COUNTS = {
    "vgg_a": 9_750_922,
    "vgg_a_bn": 9_756_426,
    "vgg_a_residual": 20_514_954,
    "vgg_a_residual_dropout": 20_514_954,
    "vgg_a_gelu": 9_756_426,
}


NARROW = ((6,), (8,), (10, 10), (12, 12), (12, 12))  # the channels of tests


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(models.vgg, "STAGES", NARROW)
    monkeypatch.setattr(models.vgg, "FEATURES", NARROW[-1][-1])


def pair(name):
    """Both ways to compute a network, of equal weights and of running statistics that are not the first."""
    torch.manual_seed(3)
    fused, plain = VGG(name), VGG(name, backend="reference")
    for m in fused.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.detach(), m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.detach(), m.running_mean):
                t.normal_(std=0.1)
    plain.load_state_dict(fused.state_dict())
    return [network.to(torch.float64, memory_format=torch.channels_last) for network in (fused, plain)]


def photos(n=4, dtype=torch.float64):
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        network = VGG(name)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name] == parameter_counts(network)["total"]


def test_counts_follow_from_the_listing():
    plain = sum(o * i * 9 + o for o, i in CONVOLUTIONS) + 2 * (512 * 512 + 512) + 512 * 10 + 10
    assert COUNTS["vgg_a"] == plain and COUNTS["vgg_a_bn"] == plain + 2 * sum(o for o, _ in CONVOLUTIONS)
    blocks = [(64, 64), *CONVOLUTIONS[1:]]
    residual = 64 * 27 + 3 * 64 + 512 * 512 + 512 + 512 * 10 + 10
    for o, i in blocks:
        residual += o * i * 9 + o * o * 9 + 6 * o + (o * i + 3 * o) * (i != o)
    assert COUNTS["vgg_a_residual"] == residual


@pytest.mark.parametrize("name", ["vgg_a", "vgg_a_bn"])
def test_features_are_torchvisions(name, narrow):
    """Names, and what they compute, in training too, with the running statistics that it leaves."""
    listing = [entry for stage in NARROW for entry in (*stage, "M")]
    expected = torchvision.models.vgg.make_layers(listing, batch_norm=name == "vgg_a_bn").double()
    for network in pair(name):
        expected.load_state_dict(network.features.state_dict())
        for training in (False, True):
            network.features.train(training), expected.train(training)
            got, wanted = network.features(photos()), expected(photos())
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
            assert got.shape == (4, 12, 1, 1)
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(network.features.state_dict()[key], tensor, rtol=1e-9, atol=1e-9)


def by_hand(state, x, training):
    """The residual network once more, from its text."""

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    def norm(name, x):
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *(p.clone() for p in parts), training=training)

    def linear(name, x):
        return F.linear(x, state[f"classifier.{name}.weight"], state[f"classifier.{name}.bias"])

    x = norm("features.1", conv("features.0", x)).relu()
    for index, pool in zip((3, 5, 7, 8, 10, 11, 13, 14), (1, 2, 2, 1, 2, 1, 2, 1), strict=True):
        x = F.max_pool2d(x, pool)
        block = f"features.{index}"
        y = norm(f"{block}.bn1", conv(f"{block}.conv1", x)).relu()
        y = norm(f"{block}.bn2", conv(f"{block}.conv2", y))
        if f"{block}.shortcut.0.weight" in state:
            x = norm(f"{block}.shortcut.1", conv(f"{block}.shortcut.0", x))
        x = (x + y).relu()
    return linear("3", linear("0", x.mean((2, 3))).relu())


def test_the_residual_network_by_hand(narrow):
    for network in pair("vgg_a_residual"):
        state = {key: t.clone() for key, t in network.state_dict().items()}
        for training in (True, False):
            network.train(training)
            network.classifier.eval()  # dropout
            wanted = by_hand(state, photos(), training)
            torch.testing.assert_close(network(photos()), wanted, rtol=1e-8, atol=1e-8)
            network.load_state_dict(state)


@pytest.mark.parametrize("name", MODELS)
def test_fused_gradients_are_those_of_plain_pytorch(name, narrow):
    results = []
    for network in pair(name):
        torch.manual_seed(0)  # of dropout
        loss = network(photos()).square().mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["vgg_a", "vgg_a_bn", "vgg_a_residual"])
def test_hooks_see_every_layer_and_change_nothing(name, narrow):
    """Whoever looks between batch norm and pool sees what is there."""
    seen = [{}, {}]
    fused, plain = (network.eval() for network in pair(name))
    wanted = fused(photos())
    for network, own in zip((fused, plain), seen, strict=True):
        hooks = [
            m.register_forward_hook(lambda m, x, y, own=own, key=key: own.update({key: y.detach().clone()}))
            for key, m in network.named_modules()
            if isinstance(m, (nn.ReLU, nn.BatchNorm2d, nn.MaxPool2d))
        ]
        torch.testing.assert_close(network(photos()), wanted, rtol=1e-9, atol=1e-9)
        for hook in hooks:
            hook.remove()
    assert torch.equal(fused(photos()), wanted)
    assert list(seen[0]) == list(seen[1]) and len(seen[0]) == len(hooks) > 10
    for key, got in seen[0].items():
        torch.testing.assert_close(got, seen[1][key], rtol=1e-9, atol=1e-9)
        assert bool((got < 0).any()) == isinstance(fused.get_submodule(key), nn.BatchNorm2d)


def test_initialisation():
    for layer in VGG("vgg_a_bn").modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            out, into, *kernel = layer.weight.shape
            std = (2 / ((out + into) * torch.Size(kernel).numel())) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and not layer.bias.any()
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any()


def test_dropout(narrow):
    for name, variant in MODELS.items():
        network = VGG(name)
        blocks = [m for m in network.features if isinstance(m, Block)]
        assert len(blocks) == (8 if variant.residual else 0)
        for dropout in (part for block in blocks for part in (block.dropout1, block.dropout2)):
            if name == "vgg_a_residual_dropout":
                assert isinstance(dropout, nn.Dropout2d) and dropout.p == 0.3
            else:
                assert isinstance(dropout, nn.Identity)
        found = [m.p for m in network.classifier if isinstance(m, nn.Dropout)]
        assert found == [0.5] * (1 if variant.residual else 2)


def test_forward_features_are_the_input_of_the_last_layer(narrow):
    for name in MODELS:
        network, x = VGG(name).eval(), photos(dtype=torch.float32)
        features = network.forward_features(x)
        assert features.shape == (4, 12) and torch.equal(network.classifier[-1](features), network(x))


def test_gelu_is_everywhere(narrow):
    network = VGG("vgg_a_gelu")
    assert sum(isinstance(m, nn.GELU) for m in network.modules()) == 10
    assert not any(isinstance(m, nn.ReLU) for m in network.modules())


def test_build_model(narrow):
    network = build_model("vgg_a", num_classes=7)
    assert network.classifier[-1].out_features == 7 and type(network.features[0]) is nn.Conv2d
    assert type(build_model("vgg_a", 10, fused=True).features[0]) is hyperfast.nn.Conv2d
    hyper = build_model("vgg_a", 10, fused=True, generated=["features.0", "classifier.6"], z_dim=3)
    counts = parameter_counts(hyper)
    assert counts["generated"] == 6 * 27 + 120 and counts["generator"] == 4 * counts["generated"]
    for build, message in (
        (lambda: build_model("vgg_b", 10), "unknown model 'vgg_b'; choose one of full, .*vgg_a_gelu"),
        (lambda: VGG("vgg"), "unknown model 'vgg'; choose one of vgg_a, "),
        (lambda: VGG("vgg_a", 0), "num_classes must be at least 1, got 0"),
        (lambda: build_vgg("vgg_a", hyper="chunked"), "unknown hypernetwork 'chunked'; choose one of linear"),
        (
            lambda: build_vgg("vgg_a", hyper="linear", targets=["features.1"]),
            "no layer or parameter named 'features.1'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("hyper", ["linear", "shared"])
def test_hypernetworks_start_as_their_plain_twins(hyper, fused, narrow):
    made, x = [], photos(dtype=torch.float32)
    for kind in (None, hyper):
        torch.manual_seed(6)
        made.append(build_vgg("vgg_a_bn", fused=fused, hyper=kind).eval())
    plain, made = made
    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-5)
    counts = parameter_counts(made)
    assert counts["generated"] + counts["other"] == parameter_counts(plain)["total"]
    assert counts["other"] == sum(p.numel() for p in plain.parameters() if p.dim() == 1)
    assert all(g.factored == fused for _, g in named_generators(made))


def test_one_generator_of_units():
    """All kernels of 3 x 3 but the first, with the variance of He's initialisation."""
    torch.manual_seed(7)
    made = build_vgg("vgg_a", hyper="two_layer")
    weights = made.generate()
    assert list(weights) == [f"features.{i}.weight" for i in (3, 6, 8, 11, 13, 16, 18)]
    assert parameter_counts(made)["generator"] == 64 * 64 * 65 + 65 * 64 * 9
    for weight in weights.values():
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.2)
    with pytest.raises(ValueError, match="cannot start from a given weight"):
        build_vgg("vgg_a", hyper="two_layer", init="keep")


# ---- recipes and options ----


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_the_reports(name):
    args = vgg.parse(["--model", name])
    wanted = {"optimizer": "sgd", "lr": 0.01 if name == "vgg_a" else 0.02, "weight_decay": 5e-4, "epochs": 30,
              "batch_size": 128, "schedule": "steps", "loss": "cross_entropy", "augment": "crop_flip",
              "patience": 0, "clip": 100.0, "hyper": "none", "subset": None, "fused": True, "seed": 42,
              "precision": "fp32", "state_dtype": "fp32", "init": "xavier"}  # fmt: skip
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert str(args.out) == f"runs/vgg_{name}" and vgg.VALIDATION == 5000
    assert vgg.MEAN == vgg.STD == (0.5, 0.5, 0.5) and command.MOMENTUM == 0.9
    assert vgg.parse([]).model == "vgg_a_bn"
    assert str(vgg.parse(["--model", name, "--hyper", "linear"]).out) == f"runs/vgg_{name}_linear"


@pytest.mark.parametrize(
    ("schedule", "epochs", "wanted"),
    [
        ("steps", 30, [1.0] * 20 + [0.1] * 5 + [0.01] * 5),
        ("steps", 6, [1, 1, 1, 1, 0.1, 0.01]),
        ("steps", 1, [1]),
        ("constant", 3, [1, 1, 1]),
        ("cosine", 4, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_schedules(schedule, epochs, wanted):
    args = vgg.parse(["--lr", "1", "--schedule", schedule, "--epochs", str(epochs)])
    rate = vgg.SCHEDULES[schedule](args, 7)
    for last in (0, 6):
        assert [rate(e, 7 * e + last) for e in range(epochs)] == pytest.approx(wanted)


def test_usual_rates_of_optimizers():
    usual = {"sgd": (0.02, 5e-4), "nesterov": (0.02, 5e-4), "adam": (1e-3, 5e-4), "adamw": (1e-3, 0.01),
             "rmsprop": (1e-3, 5e-4)}  # fmt: skip
    for name, (lr, decay) in usual.items():
        args = vgg.parse(["--optimizer", name])
        assert (args.lr, args.weight_decay) == (lr, decay)
        args = vgg.parse(["--optimizer", name, "--lr", "0.3", "--weight-decay", "0"])
        assert (args.lr, args.weight_decay) == (0.3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vgg_b"], "argument --model: invalid choice: 'vgg_b'"),
        (["--hyper", "chunked"], "argument --hyper: invalid choice: 'chunked'"),
        (["--loss", "hinge"], "argument --loss: invalid choice: 'hinge'"),
        (["--augment", "mixup"], "argument --augment: invalid choice: 'mixup'"),
        (["--subset", "9"], "argument --subset: must be at least 10, got 9"),
        (["--z-dim", "4"], "--z-dim needs --hyper"),
        (["--hidden-dim", "4"], "--hidden-dim needs --hyper"),
        (["--init", "hyperfan"], "--init needs --hyper"),
        (["--generated-l2", "0.1"], "--generated-l2 needs --hyper"),
        (["--hyper", "linear", "--hidden-dim", "4"], "--hidden-dim: a linear generator has none"),
        (
            ["--hyper", "two_layer", "--init", "keep"],
            "a two_layer generator cannot start from a given weight",
        ),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs --device cuda, got cpu"),
    ],
)
def test_command_line_errors(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        vgg.main(options)
    assert caught.value.code == 2 and message in one_line(capsys)


OWN = {  # by --fused, and by whether the generators have factored gradients
    "sgd": (torch.optim.SGD, hyperfast.optim.SGD, hyperfast.optim.SGD),
    "nesterov": (NesterovSGD, NesterovSGD, hyperfast.optim.SGD),
    "adam": (torch.optim.Adam, hyperfast.optim.Adam, hyperfast.optim.Adam),
    "adamw": (torch.optim.AdamW, hyperfast.optim.AdamW, hyperfast.optim.AdamW),
    "rmsprop": (torch.optim.RMSprop, torch.optim.RMSprop, torch.optim.RMSprop),
}


@pytest.mark.parametrize("name", command.OPTIMIZERS)
def test_optimizers(name, small_models):
    """The kind, its options, and that a step goes down by it with clipping."""
    for options, kind in zip(
        (["--no-fused"], ["--fused"], ["--fused", "--hyper", "linear"]), OWN[name], strict=True
    ):
        args = vgg.parse(["--optimizer", name, "--clip", "0.5", "--lr", "0.01", *options])
        model, optimizer, step = vgg.build(args)
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.01 and group["weight_decay"] == args.weight_decay
        if name in ("sgd", "nesterov"):
            assert group["momentum"] == 0.9 and group["nesterov"] == (name == "nesterov")
        x, losses = photos(8, torch.float32), []
        for _ in range(3):
            loss = F.cross_entropy(model(x), torch.arange(8))
            loss.backward()
            losses.append(loss.item())
            clipped = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norm = float(step())
            assert norm == pytest.approx(clipped.item(), rel=0.5)  # a part of it where gradients are factored
            optimizer.zero_grad()
        assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", command.OPTIMIZERS)
def test_optimizers_in_a_graph(name, monkeypatch):
    """On tensors of a GPU without contents: whoever looks at one raises."""
    reached = []

    def fused(params, grads, *lists, lr, **options):
        assert lr.is_cuda and lr.dtype == torch.float32 and all(p.is_cuda for p in (*params, *grads))
        reached.append(len(params))

    for kernel in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
        monkeypatch.setattr(torch, kernel, fused)  # torch has no fake kernels of these
    for fused_option in ("--fused", "--no-fused"):
        args = vgg.parse(["--device", "cuda", "--optimizer", name, fused_option])
        assert args.cuda_graph
        with torch._subclasses.FakeTensorMode():
            with torch.device("cuda"):
                model = TinyNet()
            optimizer, step = command.make_optimizer(model, args)
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device="cuda")
            for _ in range(2):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                assert step().device.type == "cuda"
    assert bool(reached) == (name in ("adam", "adamw", "sgd"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="captured for real instead")
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "options",
    [
        ("--model", "vgg_a_bn"),
        ("--model", "vgg_a_residual_dropout", "--loss", "center", "--augment", "cutmix"),
        ("--model", "vgg_a", "--hyper", "linear", "--loss", "focal"),
        ("--model", "vgg_a_gelu", "--hyper", "shared", "--optimizer", "nesterov"),
    ],
)
def test_nothing_in_a_step_waits_for_a_gpu(options, narrow, monkeypatch):
    """Whole steps in bfloat16 on tensors of a GPU without contents: whoever looks at one raises."""
    args = vgg.parse([*options, "--device", "cuda", "--precision", "bf16"])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # the engine asks for the GPU
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *lists, **options: None)  # has no fake kernel
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **options: module)  # made where it is to be
    with torch._subclasses.FakeTensorMode():
        with torch.device("cuda"):
            model, optimizer, step = vgg.build(args)
        trainer = object.__new__(Trainer)  # without the data and records of a run
        trainer.model = trainer._trained = model.train()
        trainer.optimizer, trainer.step = optimizer, step
        trainer.device, trainer.config = torch.device("cuda"), Config(1, 8, precision="bf16", cuda_graph=True)
        criterion = LOSSES[args.loss]().to("cuda")
        trainer.data = ImageData(*[None] * 5, criterion=criterion)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device="cuda")
        x = torch.zeros(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
        y = (
            torch.zeros(8, 10, device="cuda")
            if args.augment == "cutmix"
            else torch.zeros(8, device="cuda").long()
        )
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if generator_of(p) is None else None
            figures = trainer._eager_step(x, y)
            assert figures.device.type == "cuda" and figures.shape == (3,)


# ---- runs ----


def tiny_model(name, num_classes=10, fused=True, hyper=None, z_dim=None, hidden_dim=None, init=None):
    """Stands for every model where only the command is looked at."""
    network = TinyNet()
    if hyper is None:
        return network
    options = {"hidden_dim": hidden_dim} if hidden_dim else {}
    kind = {"z_dim": z_dim, "init": init, "backend": "auto" if fused else "reference"}
    made = hyperfast.hyperize(network, hyper, targets=["conv", "final"], **kind, **options)
    return hyperfast.factored_(made) if fused else made


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(vgg, "build_vgg", tiny_model)


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    data = ImageSet(*images(60, 0), *images(20, 1), [])
    monkeypatch.setattr(
        vgg, "load_images", lambda name, root, part=None: subset(data, *part) if part else data
    )
    monkeypatch.setattr(vgg, "VALIDATION", 20)
    for module in (report, comparison):  # drawing takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())


@pytest.fixture
def small(small_data, small_models):
    pass


def run(out, *options):
    return vgg.main(["--out", str(out), "--epochs", "2", "--batch-size", "8", *options])


def test_a_run_leaves_everything(small, tmp_path, capsys):
    assert run(tmp_path / "a", "--model", "vgg_a") == 0
    out = capsys.readouterr().out
    count = sum(p.numel() for p in TinyNet().parameters())
    assert f"vgg_a: {count} parameters\n" in out and "all 2 epochs done; test accuracy" in out
    text = (tmp_path / "a" / "report.md").read_text()
    assert "# CIFAR-10, vgg_a" in text and "| published, best of 30 epochs on CIFAR-10's test set |" in text
    table = {row.split(" | ")[0][2:]: row for row in re.findall(r"^\| .* \|$", text, re.MULTILINE)}
    assert table["vgg_a_residual"] == "| vgg_a_residual | 97.13 % | 91.36 % | 9,512,458 | 20,514,954 |"
    assert table["vgg_a_gelu"] == "| vgg_a_gelu | 96.53 % | 89.42 % |  | 9,756,426 |"
    state = checkpoint.load(tmp_path / "a" / "last.pt")
    train, test = state["history"][-1]["train_accuracy"], checkpoint.load(tmp_path / "a" / "best.pt")["row"]
    assert table["**vgg_a, this run**"] == (
        f"| **vgg_a, this run** | {train:.2f} % | {test['test_accuracy']:.2f} % |  | {count} |"
    )


RESUMED = [
    ("--hyper", "linear"),
    ("--optimizer", "nesterov", "--loss", "center", "--augment", "cutmix", "--subset", "40"),
    (),
    ("--hyper", "shared", "--no-fused", "--optimizer", "nesterov", "--schedule", "cosine"),
    ("--hyper", "two_layer", "--optimizer", "rmsprop", "--loss", "label_smoothing", "--augment", "jitter"),
    ("--hyper", "linear", "--optimizer", "rmsprop", "--loss", "focal", "--augment", "autoaugment"),
]


@pytest.mark.parametrize(
    "options", [*RESUMED[:2], *(pytest.param(options, marks=pytest.mark.slow) for options in RESUMED[2:])]
)
def test_resume_ends_where_an_unbroken_run_does(small, tmp_path, options):
    resume_and_compare(tmp_path, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--model", "vgg_a_residual_dropout"), ("--hyper", "linear")])
def test_real_networks_resume_so_too(small_data, tmp_path, options):
    resume_and_compare(tmp_path, options)


def resume_and_compare(tmp_path, options):
    """Bit for bit."""
    run(tmp_path / "whole", *options)
    run(tmp_path / "a", *options, "--max-steps", "6")
    assert run(tmp_path / "a", "--resume", *options) == 0
    whole, parts = (checkpoint.load(tmp_path / d / "last.pt") for d in ("whole", "a"))
    assert len(whole["history"]) == 2 and whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
    for i, own in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, parts["optimizer"]["state"][i][k]) for k, v in own.items())


def test_resume_of_another_recipe_is_refused(small, tmp_path, capsys):
    run(tmp_path / "a", "--hyper", "linear", "--max-steps", "1")
    capsys.readouterr()
    for changed in (("--hyper", "shared"), ("--subset", "40"), ("--loss", "focal"), ("--z-dim", "2")):
        assert run(tmp_path / "a", "--hyper", "linear", "--resume", *changed) == 2
        name = changed[0].removeprefix("--").replace("-", "_")
        assert re.search(f"the run had another recipe: .*{name} was ", one_line(capsys))


@pytest.mark.parametrize("hyper", ["linear", pytest.param("shared", marks=pytest.mark.slow)])
def test_hypernetworks(small, tmp_path, capsys, hyper):
    assert run(tmp_path / "a", "--hyper", hyper, "--z-dim", "4", "--save-frozen") == 0
    text, out = (tmp_path / "a" / "report.md").read_text(), capsys.readouterr().out
    assert f"# CIFAR-10, vgg_a_bn, {hyper} hypernetwork" in text
    assert f"**vgg_a_bn, {hyper} hypernetwork, this run**" in text and "| published" not in text
    assert "z.png" in text and "expansion" in text
    model = vgg.load_trained(tmp_path / "a")
    counts = parameter_counts(model)
    assert counts["generated"] == 108 + 40 and counts["other"] == 4 + 8 + 10
    assert (
        f"vgg_a_bn, {hyper} hypernetwork: {counts['total']} parameters (generator {counts['generator']}, "
        in out
    )
    assert ", 170 in the main network" in out
    state = safetensors.torch.load_file(tmp_path / "a" / "frozen.safetensors")
    plain = TinyNet()
    plain.load_state_dict(state)
    assert not model.training
    x = photos(dtype=torch.float32)
    torch.testing.assert_close(plain.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_load_trained(small, tmp_path):
    """The best epoch; of the center loss the network alone."""
    run(tmp_path / "a", "--loss", "center", "--save-frozen")
    model = vgg.load_trained(tmp_path / "a")
    assert type(model) is TinyNet and not model.training
    state = checkpoint.load(tmp_path / "a" / "best.pt")
    assert {f"network.{k}" for k in model.state_dict()} | {"centers"} == set(state["model"])
    assert torch.equal(model.conv.weight, state["model"]["network.conv.weight"])
    assert state["model"]["centers"].any()
    plain = safetensors.torch.load_file(tmp_path / "a" / "frozen.safetensors")
    assert plain.keys() == model.state_dict().keys()
    state["recipe"]["model"] = "full"
    checkpoint.save(tmp_path / "a" / "best.pt", state)
    with pytest.raises(checkpoint.CheckpointError, match="full is no model of train.vgg"):
        vgg.load_trained(tmp_path / "a")


def test_losses_and_augmentations_reach_the_data(small):
    x = images(16, 9)[0]
    for loss in LOSSES:
        args = vgg.parse(["--loss", loss])
        data, _ = vgg.load_data(args)
        assert type(data.criterion) is type(LOSSES[loss]())
        assert isinstance(vgg.build(args)[0], WithCenters) == (loss == "center")
    for augment in vgg.AUGMENTATIONS:
        data, _ = vgg.load_data(vgg.parse(["--augment", augment]))
        assert (data.mix is not None) == (augment == "cutmix")
        made = data.augment(x, torch.Generator().manual_seed(1))
        same = (made == data.normalize(x)).flatten(1).all(1)
        assert same.all() if augment == "none" else same.sum() < 4
        assert data.normalize(x).min() >= -1 and data.normalize(x).max() <= 1


def test_a_subset(small, tmp_path, capsys):
    assert compare.training_command("vgg") is vgg.COMMAND and "vgg" in compare.COMMANDS
    data, checksum = vgg.load_data(vgg.parse(["--subset", "30"]))
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [27, 3, 20]
    data, _ = vgg.load_data(vgg.parse(["--subset", "10"]))
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [9, 1, 10]
    assert checksum != vgg.load_data(vgg.parse(["--subset", "30", "--seed", "1"]))[1]
    assert run(tmp_path / "a", "--subset", "61") == 2
    assert "a subset of 61 images, but there are 60 for training" in one_line(capsys)
    assert run(tmp_path / "a", "--subset", "10", "--batch-size", "10") == 2
    assert "batch size 10 is larger than the 9 training images" in one_line(capsys)


def test_subsets_are_parts_of_larger_ones():
    data = ImageSet(*images(60, 0), *images(20, 1), ["a"])
    data.train_labels = torch.arange(60)
    small, large = subset(data, 10, 3), subset(data, 30, 3)
    assert torch.equal(small.train_labels, large.train_labels[:10]) and small.classes == ["a"]
    assert torch.equal(small.train_images, data.train_images[small.train_labels])
    assert len(set(large.train_labels.tolist())) == 30 and not torch.equal(
        large.train_labels, torch.arange(30)
    )
    assert torch.equal(small.test_images, data.test_images[:10]) and len(large.test_labels) == 20
    assert subset(data, 60, 3).train_labels.sort()[0].tolist() == list(range(60))
    with pytest.raises(DataError, match="a subset of 61 images, but there are 60"):
        subset(data, 61, 3)


@pytest.mark.slow
def test_comparison(small, tmp_path, monkeypatch):
    def train(plan):
        return plan.training.main([*plan.arguments, *plan.resume]), None

    monkeypatch.setattr(compare, "train", train)
    options = ["--command", "vgg", "--models", "vgg_a,vgg_a_bn", "--epochs", "1", "--batch-size", "8"]
    assert compare.main([*options, "--out", str(tmp_path / "c")]) == 0
    text = (tmp_path / "c" / "compare.md").read_text()
    assert "[vgg_a](vgg_a/report.md)" in text and "86.43 %" in text and "89.54 %" in text


def test_every_hypernetwork_has_its_sizes():
    for hyper, own in HYPERS.items():
        args = vgg.parse(["--hyper", hyper])
        assert (args.z_dim, args.hidden_dim, args.init) == (own.z_dim, own.hidden_dim, own.init)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--model", name) for name in MODELS] + [("--hyper", h) for h in HYPERS])
def test_the_real_networks_learn_their_images(options):
    """One batch, over and over, without dropout: the loss falls."""
    torch.manual_seed(8)
    model, _, step = vgg.build(vgg.parse([*options, "--optimizer", "adam", "--lr", "1e-4"]))
    for part in model.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout2d)):
            part.p = 0.0
    x, y, losses = photos(16, torch.float32), torch.arange(16) % 10, []
    for _ in range(24):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        *(("--optimizer", name) for name in command.OPTIMIZERS),
        ("--hyper", "linear"),
        ("--hyper", "shared", "--optimizer", "nesterov"),
        ("--hyper", "two_layer", "--optimizer", "rmsprop"),
        ("--model", "vgg_a_residual_dropout", "--loss", "center", "--augment", "cutmix"),
    ],
)
def test_gpu_run(small_data, tmp_path, options, precision):
    """Steps captured as a graph follow the eager ones."""
    losses = []
    for way in ("--cuda-graph", "--no-cuda-graph"):
        out = tmp_path / way.strip("-")
        more = ("--device", "cuda", "--precision", precision, "--lr", "0.001", way)
        assert run(out, *options, *more) == 0
        losses.append([row["train_loss"] for row in checkpoint.load(out / "last.pt")["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # rounding grows with the steps
