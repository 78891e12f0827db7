"""The command for character language models: text of the test's own, networks of a few units."""

import math
import os
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

from hyperfast.nn import HyperLSTM
from tests.train.recorded import RecordedGraph
from tests.train.test_loop import assert_same, last
from train import charlm, checkpoint, compare, comparison, language
from train.charlm import PUBLISHED, build, parse
from train.checkpoint import CheckpointError
from train.language import BPC, TextData
from train.loop import Interrupted, plateau
from train.models.charlm import MODELS, CharLM
from train.summary import load_run
from train.text import Vocabulary, load_text

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}, they say.\n" for i in range(30))
SIZES = ["--seq-length", "6", "--batch-size", "8", "--embedding-size", "3", "--hidden-size", "5"]
SMALL = [
    *SIZES,
    "--hyper-num-units",
    "3",
    "--hyper-embedding-size",
    "2",
    "--epochs",
    "2",
    "--gen-length",
    "20",
]
DROPPED = ["--use_recurrent_dropout", "--dropout_keep_prob", "0.8", "--dropout", "0.2"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    file = tmp_path / "sums.txt"
    file.write_text(TEXT)
    return file


def train(path, out, *options):
    return charlm.main(["--data_path", str(path), "--out", str(out), *SMALL, *options])


def trainer_of(path, out, *options):
    args = parse(["--data-path", str(path), "--out", str(out), *SMALL, *options])
    out.mkdir(exist_ok=True)
    return charlm.make_trainer(args)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def tiny_model(kind="ln_hyper_lstm", vocabulary=7, **options):
    torch.manual_seed(1)
    sizes = {"embedding_size": 3, "hidden_size": 5, "hyper_size": 4, "hyper_embedding_size": 2}
    return CharLM(kind, vocabulary, **sizes | options)


# ---- the model ----


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_the_state_is_all_that_later_characters_need(kind, fused):
    model = tiny_model(kind, num_layers=2, fused=fused).double()
    tokens = torch.randint(7, (3, 9))
    logits, state = model(tokens)
    first, between = model(tokens[:, :4])
    then, after = model(tokens[:, 4:], between)
    assert logits.shape == (3, 9, 7) and len(state) == (4 if MODELS[kind].hyper else 2)
    torch.testing.assert_close(torch.cat((first, then), 1), logits)
    for a, b in zip(state, after, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(model(tokens[:, 4:])[0], then)


def test_one_hot_and_embedding_are_the_same_map():
    one_hot = tiny_model("lstm", embedding_size=0).double()
    embedded = tiny_model("lstm", embedding_size=7).double()
    assert embedded.load_state_dict(one_hot.state_dict(), strict=False).missing_keys == ["embedding.weight"]
    embedded.embedding.weight.data = torch.eye(7, dtype=torch.float64)
    tokens = torch.randint(7, (2, 5))
    torch.testing.assert_close(one_hot(tokens)[0], embedded(tokens)[0])
    assert "one_hot" not in one_hot.state_dict()


def test_dropout_is_where_the_paper_has_it(monkeypatch):
    """On the input, between layers and on the output in training; the recurrent one is the cells'."""
    model = tiny_model(num_layers=2, dropout=0.25, recurrent_dropout=0.1)
    assert isinstance(model.lstm, HyperLSTM)
    assert [cell.recurrent_dropout for cell in model.lstm.layers] == [0.1, 0.1]
    assert all(cell.layer_norm for cell in model.lstm.layers)
    seen, real = [], F.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        seen.append((x.shape[-1], p)) if training and p else None
        return real(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", dropout)
    model(torch.randint(7, (2, 4)))
    assert seen == [(3, 0.25), (5, 0.25), (5, 0.25)]
    model.eval()
    tokens = torch.randint(7, (2, 4))
    assert torch.equal(model(tokens)[0], model(tokens)[0]) and len(seen) == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    """Of the paper's models, for Penn Treebank's 50 characters. Its equations give 5.086 M with N_z = 16: the
    12 more of an embedding are 144 (H + M) + 96 = 0.163 M numbers, where its table has 0.14 M more."""
    options = vars(parse(["--recipe", "paper"])) | PUBLISHED[name].options
    with torch.device("meta"):
        model = build(options, Vocabulary(chr(65 + i) for i in range(50)), fused=True)
    count = sum(p.numel() for p in model.parameters())
    wanted = 5.086 if name == "with N_z = 16" else PUBLISHED[name].parameters
    assert count / 1e6 == pytest.approx(wanted, abs=0.006)
    assert model.embedding is None and model.dropout == 0.1
    assert [cell.recurrent_dropout for cell in model.lstm.layers] == pytest.approx(
        [0.1] * options["num_layers"]
    )
    assert charlm.published(options | {"text": "ptb"}) is PUBLISHED[name]
    assert charlm.published(options | {"text": "other.txt"}) is None
    other_recipe = {"dropout": 0.0, "batch_size": 64, "use_recurrent_dropout": False, "optimizer": "adamw"}
    for option, value in other_recipe.items():
        assert charlm.published(options | {"text": "ptb", option: value}) is None
    assert charlm.published(options | {"text": "ptb", "epochs": 1}) is PUBLISHED[name]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "gru"}, "unknown model 'gru'; choose one of lstm, ln_lstm"),
        ({"embedding_size": -1}, "got 7 and -1"),
    ],
)
def test_the_model_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        tiny_model(**options)


# ---- the task ----


def text_data(path, length=6):
    return TextData(load_text(path), length)


def test_the_state_goes_from_step_to_step_and_begins_anew_with_the_epoch(path):
    data, given, made = text_data(path), [], []
    model = tiny_model(vocabulary=len(data.text.vocabulary))

    def forward(x, state):
        given.append(None if state is None else [s.clone() for s in state])
        logits, after = model(x, state)
        made.append([s.detach() for s in after])
        return logits, after

    steps = data.steps(8)
    for epoch in range(2):
        batches = data.batches(epoch, 42, 8)
        for i, (x, y) in enumerate(batches):
            assert x.shape == y.shape == (8, 6)
            loss, score = data.loss(forward, x, y)
            loss.backward()  # nothing that it needs was written over
            assert not score.requires_grad and score == pytest.approx(loss.item() * 48)
            assert i == 0 or all(map(torch.equal, given[-1], made[-2]))
        assert i + 1 == steps
    assert given[0] is None and all(not s.any() for s in given[steps])
    places = {s.data_ptr() for s in data._state}
    x, y = next(data.batches(2, 42, 8))
    data.loss(forward, x, y)
    assert places == {s.data_ptr() for s in data._state}  # a graph would find it there


def test_a_row_goes_on_where_it_ended(path):
    data = text_data(path)
    batches = list(data.batches(3, 42, 8))
    x = torch.cat([x for x, _ in batches], 1)
    y = torch.cat([y for _, y in batches], 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = data.text.vocabulary.decode(data.text.train)
    assert all(data.text.vocabulary.decode(row) in text for row in x)
    first = [next(data.batches(epoch, seed, 8))[0] for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])


def exact_bits(model, tokens):
    """Of all characters but the first, one at a time, in float64."""
    state, bits = None, 0.0
    for now, following in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        logits, state = model(torch.tensor([[now]]), state)
        bits -= logits[0, 0].log_softmax(0)[following].item() / math.log(2)
    return bits / (len(tokens) - 1)


@torch.no_grad()
def test_evaluation_is_that_of_the_whole_text(path, monkeypatch):
    data = text_data(path, length=20)
    model = (
        tiny_model(vocabulary=len(data.text.vocabulary), dropout=0.5, recurrent_dropout=0.5).double().eval()
    )
    tokens = data.text.validation
    exact = exact_bits(model, tokens.long())
    for size, rel in ((1, 1e-6), (64, 5e-3), (3, 5e-3)):
        monkeypatch.setattr(language, "EVAL_BATCH", size)
        loss, bpc = data.evaluate(model, "validation", None, lambda: None)
        assert bpc == pytest.approx(exact, rel=rel) and bpc == pytest.approx(loss / math.log(2))
    monkeypatch.setattr(language, "EVAL_BATCH", 1)
    first = data.evaluate(model, "validation", 2, lambda: None)[1]
    assert first == pytest.approx(exact_bits(model, tokens[:41].long()), rel=1e-6)


def test_learning_rate_on_a_plateau_is_torchs():
    values = [3, 2, 2.5, 2, 2, 2.1, 1.9, 5, 5, 5, 5, 5, 5, 1, 1, 1, 1, 1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0)
    rows = []
    rate = plateau(1.0, 0.5, 2, BPC, lambda: rows)
    for value in values:
        assert rate(len(rows), 0) == optimizer.param_groups[0]["lr"]
        rows.append({"validation_bpc": value})
        torchs.step(value)
    assert rate(len(rows), 0) == 0.5**4


# ---- runs ----


@pytest.mark.parametrize("fused", ["--fused", pytest.param("--no-fused", marks=pytest.mark.slow)])
def test_resume_is_bit_exact(path, tmp_path, fused, monkeypatch):
    """Dropout, recurrent dropout, state and learning rate: a run stopped in mid-epoch, with a state that it
    carries from step to step, and continued is the whole one."""
    monkeypatch.setattr(TextData, "evaluate", lambda *_: (1.0, 3.0))  # never better: the rate falls
    options = (fused, "--model", "ln_hyper_lstm", *DROPPED, "--patience", "0", "--lr", "0.2", "--epochs", "4")
    assert train(path, tmp_path / "whole", *options) == 0
    stopped = trainer_of(path, tmp_path / "parts", *options)
    schedule = stopped.schedule

    def stop(epoch, step):
        if step == 2 * stopped.steps_per_epoch + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(epoch, step)

    stopped.schedule = stop
    with pytest.raises(Interrupted):
        stopped.fit()
    assert stopped.steps == 2 * stopped.steps_per_epoch + 4 < 3 * stopped.steps_per_epoch
    assert any(s.any() for s in stopped.data._state)
    torch.rand(7)
    assert train(path, tmp_path / "parts", *options, "--resume") == 0
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert_same(whole, parts)
    assert [row["lr"] for row in whole["history"]] == [0.2, 0.2, 0.1, 0.05]
    best = checkpoint.load(tmp_path / "whole" / "best.pt")
    assert whole["vocabulary"] == best["vocabulary"] == sorted(set(TEXT))


@pytest.mark.parametrize("fused", ["--fused", pytest.param("--no-fused", marks=pytest.mark.slow)])
def test_a_graphed_run_is_the_eager_run(path, tmp_path, monkeypatch, fused):
    recorders = []

    def recorder(device):
        recorders.append(RecordedGraph())
        return recorders[-1]

    monkeypatch.setattr("train.loop.CudaGraph", recorder)
    options = (fused, "--model", "ln_hyper_lstm", *DROPPED)
    eager = trainer_of(path, tmp_path / "eager", *options)
    eager.fit()
    args = parse(["--data-path", str(path), "--out", str(tmp_path / "graph"), *SMALL, *options])
    args.cuda_graph = True
    real = torch.optim.Adam

    def adam(*arguments, capturable=False, **options):
        return real(*arguments, **options)  # torch refuses it on the CPU

    monkeypatch.setattr(torch.optim, "Adam", adam)
    (tmp_path / "graph").mkdir()
    graphed = charlm.make_trainer(args)
    graphed.fit()
    assert [r.captures for r in recorders] == [1] and recorders[0].replays > graphed.steps_per_epoch
    for a, b in zip(eager.history, graphed.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["validation_bpc"] == pytest.approx(b["validation_bpc"], rel=1e-4)


def test_a_run_learns_and_reports(path, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--model", "hyper_lstm", "--use_layer_norm", "--lr", "0.05", "--prime_text", "7 times")
    assert train(path, out, *options) == 0
    printed = capsys.readouterr().out
    run = load_run(out)
    best = run.summary["best"]
    assert run.model == "ln_hyper_lstm" and run.metric == BPC and run.result == best["validation_bpc"]
    assert run.history[-1]["train_bpc"] == pytest.approx(run.history[-1]["train_loss"] / math.log(2))
    assert best["validation_bpc"] < 3.5 < run.history[0]["train_bpc"]
    assert f"validation bits per character {best['validation_bpc']:.3f} at the best" in printed
    text = (out / "report.md").read_text()
    assert f"| this run, best validation epoch | {best['epoch']} | {best['validation_bpc']:.3f} |" in text
    assert "| layer-norm HyperLSTM 1000 | 1.250 | 4.92 M |  |  |" in text and "characters/s" in text
    assert (
        (out / "dynamics.png").exists()
        and "    7 times" in text
        and (out / "curves.png").exists()
        and "accuracy" not in text
    )
    # V = 26: embedding 78, LSTM 4 * 5 * (3 + 5 + 1) + 2 * 20 + 10, output 26 * 6
    V = len(set(TEXT))
    hyper = 12 * (8 + 3 + 1) + 24 + 6 + 24 * 3 + 16 + 12 * 5 * 2
    for row in (f"| embedding | {3 * V} |", "| LSTM | 230 |", f"| output | {6 * V} |"):
        assert row in text
    assert f"| hyper LSTM and its maps | {hyper} |" in text
    assert "| end of a line |" in text and "](dynamics.png)" in text and (out / "dynamics.png").exists()
    assert not capsys.readouterr().err


def test_penn_treebank_has_a_test_part_and_published_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    folder = tmp_path / "text" / "ptb"
    folder.mkdir(parents=True)
    for part, size in (("train", 400), ("valid", 100), ("test", 150)):
        symbols = TEXT.replace("\n", " ").replace(" ", "_")[:size]
        (folder / f"ptb.char.{part}.txt").write_text(" ".join(symbols) + " \n")
    out = tmp_path / "run"
    assert train(tmp_path, out, "--model", "lstm", "--epochs", "1") == 0
    best = load_run(out).summary["best"]
    assert f"test bits per character {best['test_bpc']:.3f} at the best" in capsys.readouterr().out
    assert charlm.main(["--mode", "eval", "--data", str(tmp_path), "--load-model", str(out / "best.pt")]) == 0
    rows = capsys.readouterr().out
    assert f"| validation | 100 | {best['validation_bpc']:.3f} |" in rows
    assert f"| test | 150 | {best['test_bpc']:.3f} |" in rows
    recipe = load_run(out).summary["recipe"]
    assert set(charlm.COMPARED) <= set(recipe)
    monkeypatch.setitem(PUBLISHED, "tiny", charlm.Published(1.5, 0.01, recipe))
    assert train(tmp_path, out, "--model", "lstm", "--epochs", "1", "--resume") == 0
    text = (out / "report.md").read_text()
    assert f"| tiny | 1.500 | 0.01 M | {best['test_bpc']:.3f} | 0.00 M |" in text
    assert "weights change" not in text
    assert "| published, Ha, Dai, Le |  |  | 1.500 |" in text


def test_models_side_by_side(path, tmp_path):
    options = ["--command", "charlm", "--models", "lstm,ln_lstm", "--out", str(tmp_path / "c")]
    plans = compare.plan(*compare.parser().parse_known_args([*options, "--data-path", str(path)]))
    assert [charlm.parse(plan.arguments).model for plan in plans] == ["lstm", "ln_lstm"]
    for name in ("lstm", "ln_lstm"):
        assert train(path, tmp_path / name, "--model", name, "--epochs", "1") == 0
    runs = [load_run(tmp_path / name) for name in ("lstm", "ln_lstm")]
    text = comparison.write(runs, tmp_path, "command").read_text()
    best = runs[0].summary["best"]
    assert f"| [lstm](lstm/report.md) | 1 of 1 | 1 | {best['validation_bpc']:.3f} |  |  |" in text
    assert (tmp_path / "bpc.png").exists() and "accuracy" not in text and "per point" not in text
    runs[0].summary.pop("metric")  # a run on images
    with pytest.raises(CheckpointError, match="cannot be compared: accuracy, bits per character"):
        comparison.write(runs, tmp_path, "command")


# ---- a trained model ----


@pytest.fixture
def trained(path, tmp_path):
    assert train(path, tmp_path / "run", "--model", "ln_lstm", "--val-split", "0.2", "--epochs", "1") == 0
    return tmp_path / "run" / "best.pt"


def test_evaluation_of_a_checkpoint(path, trained, capsys):
    """What the run printed, from the file alone: its sizes, its vocabulary, its share for validation."""
    row = checkpoint.load(trained)["row"]
    capsys.readouterr()
    assert charlm.main(["--mode", "eval", "--data-path", str(path), "--load_model", str(trained)]) == 0
    size = int(len(TEXT) * 0.2)
    printed = capsys.readouterr().out
    assert f"| validation | {size - 1} | {row['validation_bpc']:.3f} |" in printed and "ln_lstm" in printed
    bpc = charlm.evaluate(parse(["--mode", "eval", "--data", str(path), "--load-model", str(trained)]))
    assert bpc == {"validation": row["validation_bpc"]}


def test_evaluation_is_on_what_was_not_trained_on(path, trained, capsys):
    arguments = ["--mode", "eval", "--load-model", str(trained), "--data-path"]
    assert charlm.main([*arguments, str(path), "--val-split", "0.2"]) == 0
    capsys.readouterr()
    assert charlm.main([*arguments, str(path), "--val-split", "0.99"]) == 2
    assert "--val-split 0.99: all of this text but its last 0.2 is what the model" in one_line(capsys)
    other = path.with_name("other.txt")
    other.write_text(TEXT[7:])
    rows = []
    for options, size in (([], len(TEXT) - 7), (["--val-split", "0.5"], int((len(TEXT) - 7) * 0.5))):
        assert charlm.main([*arguments, str(other), *options]) == 0
        rows.append(capsys.readouterr().out)
        assert f"| text | {size - 1} |" in rows[-1].replace(",", "")
    assert charlm.main([*arguments, str(path), "--eval-batches", "1"]) == 0
    assert f"| validation | {6 * 64 - 63 * 6} |" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["eval", "generate", "train"])
def test_a_reader_that_has_enough(path, trained, tmp_path, capsys, monkeypatch, mode):
    """As `| head -c1`: no error, and where a run stopped how to go on."""
    options = SMALL if mode == "train" else ["--load-model", str(trained)]
    capsys.readouterr()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        arguments = ["--mode", mode, *options, "--data-path", str(path), "--out", str(tmp_path / "piped")]
        assert charlm.main(arguments) == 128 + signal.SIGPIPE
        print("more")
    error = capsys.readouterr().err
    assert ("stopped by SIGPIPE" in error and "--resume" in error) if mode == "train" else not error


def test_interrupted_while_the_report_is_written(path, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(charlm, "sample", interrupted)
    out = tmp_path / "run"
    assert train(path, out, "--model", "lstm", "--epochs", "1") == 130
    captured = capsys.readouterr()
    assert f"writing {out}/report.md" in captured.out
    assert "stopped by SIGINT" in captured.err and "Continue with: python -m train.charlm" in captured.err
    assert captured.err.endswith(" --resume\n")
    monkeypatch.undo()
    assert train(path, out, "--model", "lstm", "--epochs", "1", "--resume") == 0
    assert (out / "report.md").exists()


def test_generation(trained, capsys, tmp_path):
    def written(*options):
        capsys.readouterr()
        options = ["--load_model", str(trained), "--gen_length", "30", *options]
        assert charlm.main(["--mode", "generate", *options]) == 0
        return capsys.readouterr().out

    one, again, other = (written("--prime_text", "7 times", "--seed", seed) for seed in "112")
    assert one == again != other and one.startswith("7 times") and len(one) == 7 + 30 + 1
    assert set(one) <= set(TEXT)
    cold = {written("--temperature", "0", "--seed", seed) for seed in "12"}
    assert len(cold) == 1
    assert not (tmp_path / "runs").exists()


def test_training_may_start_from_a_checkpoint(path, trained, tmp_path, capsys):
    options = ("--model", "ln_lstm", "--val-split", "0.2", "--load_model", str(trained))
    trainer = trainer_of(path, tmp_path / "again", *options)
    for name, value in checkpoint.load(trained)["model"].items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert train(path, tmp_path / "b", *options, "--hidden-size", "6") == 2
    assert f"{trained} is another model: --hidden-size 6, it has 5" in one_line(capsys)


def test_training_from_a_checkpoint_takes_its_model(path, trained, tmp_path, monkeypatch, capsys):
    """And goes on without the file, with the text under another name."""
    monkeypatch.chdir(tmp_path)
    options = ["--seq-length", "6", "--batch-size", "8", "--gen-length", "5", "--load-model", str(trained)]
    options += ["--val-split", "0.2", "--hyper-num-units", "7"]  # that an LSTM has none of
    assert charlm.main([*options, "--data", str(path), "--epochs", "1"]) == 0
    out = tmp_path / "runs" / "charlm_continued"
    recipe = load_run(out).summary["recipe"]
    assert (recipe["model"], recipe["hidden_size"], recipe["num_layers"]) == ("ln_lstm", 5, 1)
    renamed = path.rename(tmp_path / "renamed.txt")
    trained.unlink()
    (out / "report.md").unlink()
    capsys.readouterr()
    assert charlm.main([*options, "--data", str(renamed), "--epochs", "1", "--resume"]) == 0
    assert "note: text was sums.txt, now renamed.txt" in capsys.readouterr().out
    options = options[: options.index("--load-model")] + ["--val-split", "0.2", "--early-stopping", "3"]
    resumed = [*options, "--data", str(renamed), "--epochs", "1", "--out", str(out), "--resume"]
    assert charlm.main(resumed) == 0
    notes = capsys.readouterr().out
    assert "note: early_stopping was 0, now 3" in notes and "load_model was" in notes
    assert "patience was" not in notes


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "eval"], "--mode eval needs --load-model FILE"),
        (["--mode", "generate"], "--mode generate needs --load-model FILE"),
        (["--mode", "eval", "--load-model", "x", "--resume"], "--resume is for --mode train"),
        (["--model", "gru"], "invalid choice: 'gru'"),
        (["--dropout", "1"], "--dropout: must be below 1"),
        (["--dropout-keep-prob", "0"], "--dropout-keep-prob: must be above 0"),
        (["--val-split", "1"], "--val-split: must be below 1"),
        (["--temperature", "-1"], "--temperature: must be at least 0"),
        (["--gen_length", "0"], "--gen-length: must be at least 1"),
        (["--seq_length", "0"], "--seq-length: must be at least 1"),
        (["--num_layers", "0"], "--num-layers: must be at least 1"),
        (["--dropout_keep_prob", "0.8"], "--dropout-keep-prob needs --use-recurrent-dropout"),
        (
            ["--mode", "eval", "--load-model", "x", "--lr", "1", "--early-stopping", "2"],
            "--lr, --early-stopping: for --mode train, not for eval",
        ),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and message in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "sums.txt is empty"),
        (TEXT, ["--seq-length", "4000"], "a batch of 8 passages of 4000 needs 32,001"),
        (TEXT, ["--seq-length", "50", "--batch-size", "20"], "a batch of 20 passages of 50 needs 1,001"),
        (TEXT, ["--val-split", "0.002"], "with val_split 0.002 its validation part has 1"),
        (TEXT + "§", [], "1 of 82 characters are not among the"),
        (TEXT + "§", [], "choose another --val-split, or remove them"),
        (TEXT, ["--prime-text", "7 × 7"], "--prime-text: 1 of 5 characters are not among the"),
        (TEXT, ["--load-model", "nowhere.pt"], "nowhere.pt: no such file"),
        (None, [], "sums.txt does not exist"),
    ],
)
def test_bad_data(path, tmp_path, text, options, message, capsys):
    path.unlink() if text is None else path.write_text(text)
    assert train(path, tmp_path / "run", *options) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_validation_text_shorter_than_a_step(path, tmp_path):
    assert (
        train(path, tmp_path / "run", "--model", "hyper_lstm", "--val-split", "0.005", "--epochs", "1") == 0
    )
    assert (tmp_path / "run" / "report.md").exists()


def test_no_data_names_the_layouts(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    assert charlm.main(["--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "ptb.char.train.txt" in one_line(capsys)


def test_bad_checkpoints(path, trained, tmp_path, capsys):
    def fails(*arguments):
        assert charlm.main([*map(str, arguments)]) == 2
        return one_line(capsys)

    capsys.readouterr()
    assert "nowhere.pt: no such file" in fails("--mode", "eval", "--load-model", "nowhere.pt")
    generate = ("--mode", "generate", "--load-model", trained)
    assert "prime text: 1 of 2 characters" in fails(*generate, "--prime-text", "7é")
    assert "--model lstm, it has ln_lstm" in fails(*generate, "--model", "lstm")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("y", "ü"))
    assert "'ü'" in fails("--mode", "eval", "--data", other, "--load-model", trained)
    state = checkpoint.load(trained)
    damaged = tmp_path / "damaged.pt"
    checkpoint.save(damaged, state | {"vocabulary": ["a", "a"]})
    assert "damaged.pt: no checkpoint of a character language model" in fails(*generate[:3], damaged)
    incomplete = {name: value for name, value in state["recipe"].items() if name != "hidden_size"}
    for recipe, message in (
        (incomplete, "the recipe in it has no hidden_size"),
        (state["recipe"] | {"model": "gru"}, "unknown model 'gru'"),
    ):
        checkpoint.save(damaged, checkpoint.load(trained) | {"recipe": recipe})
        assert f"damaged.pt: {message}" in fails(*generate[:3], damaged)
    state.pop("vocabulary")
    checkpoint.save(damaged, state)
    assert "damaged.pt: no checkpoint of a character language model" in fails(*generate[:3], damaged)
    checkpoint.save(damaged, checkpoint.load(trained) | {"vocabulary": sorted(set(TEXT)) + ["ü"]})
    assert "damaged.pt: weights of another model: embedding.weight has shape" in fails(*generate[:3], damaged)


def test_resume_refuses_another_text(path, tmp_path, capsys):
    options = ("--model", "lstm", "--epochs", "1")
    assert train(path, tmp_path / "run", *options) == 0
    path.write_text(TEXT.replace("say", "saw"))
    capsys.readouterr()
    assert train(path, tmp_path / "run", *options, "--resume") == 2
    error = one_line(capsys)
    assert "characters are not among the" in error and "'w'" in error
    path.write_text(TEXT[1:])
    assert train(path, tmp_path / "run", *options, "--resume") == 2
    assert "the run had another recipe: text_checksum was" in one_line(capsys)


# ---- the command line ----


def test_recipes():
    args = parse([])
    report = {
        "model": "hyper_lstm", "seq_length": 100, "batch_size": 32, "embedding_size": 128, "hidden_size": 512,
        "num_layers": 1, "dropout": 0.1, "hyper_num_units": 128, "hyper_embedding_size": 16, "epochs": 20,
        "lr": 1e-3, "lr_decay": 0.5, "lr_patience": 3, "clip": 5.0, "gen_length": 1000, "optimizer": "adam",
        "use_recurrent_dropout": False, "dropout_keep_prob": 0.9, "patience": 0, "schedule": "plateau",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in report} == report and str(
        args.out
    ) == "runs/charlm_hyper_lstm"
    paper = parse(["--recipe", "paper", "--model", "ln_hyper_lstm"])
    changed = {
        "batch_size": 128, "embedding_size": 0, "hidden_size": 1000, "hyper_embedding_size": 4, "clip": 1.0,
        "use_recurrent_dropout": True, "dropout": 0.1, "dropout_keep_prob": 0.9, "schedule": "constant",
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in changed} == changed


def test_the_report_s_command_line():
    line = """--data_path a.txt --seq_length 50 --batch_size 16 --val_split 0.2 --embedding_size 64
        --hidden_size 256 --num_layers 2 --dropout 0.2 --hyper_num_units 64 --hyper_embedding_size 8
        --use_layer_norm --use_recurrent_dropout --dropout_keep_prob 0.8 --epochs 3 --lr 0.01 --lr_decay 0.3
        --patience 1 --clip 2 --temperature 0.7 --gen_length 10 --prime_text you --load_model b.pt"""
    args = parse(line.split())
    assert (args.model, args.num_layers, args.lr_patience, args.lr_decay) == ("ln_hyper_lstm", 2, 1, 0.3)
    assert args.use_recurrent_dropout and args.dropout_keep_prob == 0.8 and str(args.load_model) == "b.pt"
    assert (args.temperature, args.gen_length, args.prime_text, args.val_split) == (0.7, 10, "you", 0.2)
    for model in MODELS:
        assert parse(["--model", model, "--use-layer-norm"]).model == f"ln_{model.removeprefix('ln_')}"
        assert parse(["--model", model]).model == model
