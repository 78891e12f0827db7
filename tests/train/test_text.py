"""train/text.py on small texts, and on the real ones if HYPERFAST_DATA is set."""

import os

import pytest
import torch

from train.data import DataError
from train.text import IGNORED, Streams, Vocabulary, evaluation_streams, load_text, streams


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)


def fails(call, *words, error=DataError):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def write_ptb(folder, train="a b _ c \nc a \n", valid="b _ a \n", test="c c \n"):
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"ptb.char.{part}.txt").write_bytes(text.encode())
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestVocabulary:
    def test_characters_are_ordered_by_code_point(self):
        vocabulary = Vocabulary.of("zéa\nA日a🙂")
        assert vocabulary.to_list() == ["\n", "A", "a", "z", "é", "日", "🙂"]
        assert len(vocabulary) == 7 and "é" in vocabulary and "e" not in vocabulary

    def test_encode_gives_places_and_decode_undoes_it(self):
        vocabulary = Vocabulary(["b", "🙂", "a"])
        tokens = vocabulary.encode("ab🙂🙂")
        assert tokens.tolist() == [2, 0, 1, 1] and tokens.dtype == torch.uint8
        assert vocabulary.decode(tokens) == vocabulary.decode([2, 0, 1, 1]) == "ab🙂🙂"
        assert vocabulary.encode("").tolist() == [] and vocabulary.decode([]) == ""

    @pytest.mark.parametrize("size, dtype", [(256, torch.uint8), (257, torch.int32)])
    def test_dtype_holds_every_token(self, size, dtype):
        text = "".join(map(chr, range(300, 300 + size)))
        tokens = Vocabulary.of(text).encode(text)
        assert tokens.dtype == dtype and tokens.tolist() == list(range(size))

    def test_unseen_characters_are_named_with_their_positions(self):
        vocabulary = Vocabulary.of("abc")
        fails(
            lambda: vocabulary.encode("aXbX\tc", "the prime text"),
            "the prime text: 3 of 6 characters are not among the 3",
            "'X' (position 1), '\\t' (position 4)",
        )
        fails(lambda: vocabulary.encode("b" * 5 + "`", start=7_000), "1 of 6", "'`' (position 7,005)")
        fails(lambda: vocabulary.encode("zyxwvu"), "'z' (position 0), 'y' (p", "'v' (position 4), ...")

    @pytest.mark.parametrize("character", ["\x00", "`", "b", "d", "日", "\U0010ffff", "\udcff"])
    def test_every_other_character_is_unseen(self, character):
        fails(
            lambda: Vocabulary(["a", "c"]).encode(f"a{character}c"), "1 of 3", f"{character!r} (position 1)"
        )

    @pytest.mark.parametrize("token", [-1, 3])
    def test_decode_rejects_tokens_that_are_none(self, token):
        fails(lambda: Vocabulary.of("abc").decode([0, token]), "0..2", str(token), error=ValueError)

    @pytest.mark.parametrize("characters", [[], ["ab"], [""], [1], ["a", "b", "a"]])
    def test_rejects_what_is_no_vocabulary(self, characters):
        fails(lambda: Vocabulary(characters), "vocabulary must", error=ValueError)

    def test_list_and_equality(self):
        vocabulary = Vocabulary.of("hello")
        again = Vocabulary(vocabulary.to_list())
        assert again == vocabulary and hash(again) == hash(vocabulary)
        other = Vocabulary(list("ehol"))
        assert other != vocabulary


class TestTextFile:
    def test_last_part_is_for_validation(self, tmp_path):
        text = load_text(write(tmp_path / "a.txt", "abcabcabab"), 0.25)
        decode = text.vocabulary.decode
        assert (text.name, decode(text.train), decode(text.validation)) == ("a.txt", "abcabcab", "ab")
        assert text.test is None and text.train.dtype == torch.uint8

    def test_line_ends_and_byte_order_mark(self, tmp_path):
        text = load_text(write(tmp_path / "a", b"\xef\xbb\xbfa\r\nb\rc\n\nabc"), 0.3)
        assert text.vocabulary.decode(text.train) == "a\nb\nc\n\n"

    def test_vocabulary_is_that_of_training_alone(self, tmp_path):
        path = write(tmp_path / "a.txt", "ab" * 10 + "a$b$")
        fails(
            lambda: load_text(path, 0.2),
            str(path),
            "2 of 4 characters",
            "'$' (position 21)",
            "choose another --val-split",
        )
        assert load_text(write(tmp_path / "b.txt", "$ab" + "ab" * 9), 0.2).vocabulary.to_list() == list("$ab")

    def test_with_the_vocabulary_of_a_model(self, tmp_path):
        path = write(tmp_path / "a.txt", "abababab")
        vocabulary = Vocabulary(list("xba"))
        text = load_text(path, 0.5, vocabulary)
        assert text.vocabulary is vocabulary and text.train.tolist() == [2, 1, 2, 1]
        fails(lambda: load_text(path, 0.5, Vocabulary(["a"])), str(path), "2 of 4", "'b' (position 1)")

    def test_empty_and_damaged(self, tmp_path):
        fails(lambda: load_text(write(tmp_path / "a.txt", "")), "a.txt is empty")
        fails(lambda: load_text(write(tmp_path / "b.txt", b"\xef\xbb\xbf")), "b.txt is empty")
        fails(
            lambda: load_text(write(tmp_path / "c.txt", b"abc\xff\xfe")),
            "c.txt is not text in UTF-8",
            "byte 3",
        )
        fails(lambda: load_text(tmp_path / "absent"), f"{tmp_path / 'absent'} does not exist")

    @pytest.mark.parametrize(
        "length, val_split, part",
        [(19, 0.1, "validation"), (3, 0.5, "validation"), (10, 0.9, "training"), (1, 0.5, "training")],
    )
    def test_split_that_leaves_nothing_to_predict(self, tmp_path, length, val_split, part):
        path = write(tmp_path / "a.txt", "a" * length)
        fails(
            lambda: load_text(path, val_split), f"{length} characters", f"{val_split}", f"its {part} part has"
        )

    def test_least_split(self, tmp_path):
        text = load_text(write(tmp_path / "a.txt", "aaaa"), 0.5)
        assert len(text.train) == len(text.validation) == 2

    @pytest.mark.parametrize("val_split", [0, 1, -0.1, 1.5, float("nan")])
    def test_val_split_outside(self, tmp_path, val_split):
        path = write(tmp_path / "a.txt", "ab" * 100)
        fails(lambda: load_text(path, val_split), "val_split", str(val_split), error=ValueError)


class TestPennTreebank:
    @pytest.mark.parametrize("below", ["", "ptb", "text/ptb", "text"])
    def test_symbols(self, tmp_path, below):
        write_ptb(tmp_path / below)
        write(tmp_path / "other.txt", "not this one")
        text = load_text(tmp_path)
        assert text.name == "ptb" and text.vocabulary.to_list() == list("\n abc")
        parts = [text.vocabulary.decode(part) for part in (text.train, text.validation, text.test)]
        assert parts == ["ab c\nca\n", "b a\n", "cc\n"]

    def test_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HYPERFAST_DATA", str(tmp_path))
        write_ptb(tmp_path / "text" / "ptb")
        assert load_text(None).name == "ptb"
        assert load_text(write(tmp_path / "a.txt", "abababababababababab")).name == "a.txt"

    def test_missing_part(self, tmp_path):
        for missing in ("train", "test"):
            folder = write_ptb(tmp_path / missing)
            (folder / f"ptb.char.{missing}.txt").unlink()
            fails(lambda folder=folder: load_text(folder), str(folder), f"ptb.char.{missing}.txt")

    def test_a_part_is_not_a_text_of_its_own(self, tmp_path):
        folder = write_ptb(tmp_path / "ptb")
        for part in ("train", "valid", "test"):
            path = folder / f"ptb.char.{part}.txt"
            fails(lambda path=path: load_text(path), f"{path} is a part", f"give its folder, {folder}")

    def test_faults_name_the_file(self, tmp_path):
        fails(lambda: load_text(write_ptb(tmp_path, valid="")), "ptb.char.valid.txt is empty")
        fails(lambda: load_text(write_ptb(tmp_path, test=" \n")), "ptb.char.test.txt has 1 symbols")
        fails(
            lambda: load_text(write_ptb(tmp_path, test="a q \n")),
            "ptb.char.test.txt: 1 of 3",
            "'q' (position 1)",
        )

    def test_words_are_not_symbols(self, tmp_path):
        folder = write_ptb(tmp_path, train="a b \nthe cat \n")
        fails(lambda: load_text(folder), "ptb.char.train.txt", "position 5", "'the cat \\n'")


class TestFinding:
    def test_one_text_file(self, tmp_path):
        write(tmp_path / "text" / "one.txt", "ab" * 20)
        assert load_text(tmp_path).name == load_text(tmp_path / "text").name == "one.txt"

    def test_several_text_files(self, tmp_path):
        for name in ("a.txt", "b.txt"):
            write(tmp_path / name, "ab" * 20)
        fails(lambda: load_text(tmp_path), str(tmp_path), "several", "a.txt, b.txt")

    def test_none(self, tmp_path):
        fails(
            lambda: load_text(tmp_path),
            f"no text under {tmp_path}",
            "ptb.char",
            str(tmp_path / "text" / "ptb"),
        )

    @pytest.mark.parametrize("path", [None, ""])
    def test_no_path(self, path):
        fails(
            lambda: load_text(path), "no text was given", "HYPERFAST_DATA", "ptb.char.train.txt", "text file"
        )


def joined(batches):
    """x and y of all batches, [B, S]."""
    x, y = zip(*batches, strict=True)
    return torch.cat(x, 1), torch.cat(y, 1)


class TestStreams:
    def test_rows_go_on_from_batch_to_batch(self):
        batches = streams(torch.arange(30), 2, 4)
        (x0, y0), (x1, y1), (x2, _) = batches
        assert x0.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]] and x1[1].tolist() == [16, 17, 18, 19]
        assert y0.tolist() == [[1, 2, 3, 4], [13, 14, 15, 16]] and x2[0].tolist() == [8, 9, 10, 11]
        assert (len(batches), batches.unused, batches.targets) == (3, 5, 24)
        assert torch.equal(joined(batches)[0], joined(batches)[0])  # once more

    @pytest.mark.parametrize("n", [9, 10, 16, 17, 18, 61])
    @pytest.mark.parametrize("B, T", [(1, 1), (1, 8), (2, 4), (3, 2), (8, 1)])
    def test_every_target_once_but_the_unused(self, n, B, T):
        batches = streams(torch.arange(n).to(torch.uint8), B, T)
        assert [x.shape for x, _ in batches] == [(B, T)] * len(batches)
        assert all(x.dtype == y.dtype == torch.int64 for x, y in batches)
        x, y = joined(batches)
        assert torch.equal(y, x + 1) and torch.equal(x.diff(), torch.ones_like(x.diff()))
        assert y.flatten().tolist() == list(range(1, n - batches.unused))
        assert batches.targets == y.numel() and 0 <= batches.unused < B * T

    def test_offset_uses_the_end(self):
        tokens = torch.arange(30)
        unused = streams(tokens, 2, 4).unused
        batches = streams(tokens, 2, 4, unused)
        x, y = joined(batches)
        assert x[0, 0] == unused and y[-1, -1] == 29 and len(batches) == 3
        assert batches.targets + batches.unused == 29
        assert len(streams(tokens, 2, 4, unused + 1)) == 2

    def test_text_that_is_too_short(self):
        assert len(streams(torch.arange(9), 2, 4)) == 1
        fails(lambda: streams(torch.arange(8), 2, 4), "8 characters", "2 passages of 4 needs 9")
        fails(lambda: streams(torch.arange(9), 2, 4, 1), "8 characters")
        for n in (0, 1):
            fails(lambda n=n: streams(torch.arange(n), 1, 1), f"{n} characters", "needs 2")

    @pytest.mark.parametrize("call", [streams, evaluation_streams])
    def test_wrong_arguments(self, call):
        tokens = torch.arange(20)
        fails(lambda: call(tokens, 0, 4), "batch must be at least 1, got 0", error=ValueError)
        fails(lambda: call(tokens, 2, 0), "length must be at least 1, got 0", error=ValueError)
        fails(lambda: call(tokens, 2, 4, -1), "must be at least 0, got -1", error=ValueError)
        fails(lambda: call(tokens.view(4, 5), 2, 4), "tokens must be [N], got [4, 5]", error=ValueError)


class TestEvaluationStreams:
    @pytest.mark.parametrize("n", [2, 3, 7, 24, 25, 61, 200])
    @pytest.mark.parametrize(
        "B, T, warmup",
        [(1, 4, None), (2, 4, None), (3, 5, 0), (5, 3, 7), (8, 100, None), (64, 1, 1), (7, 2, 30)],
    )
    def test_every_target_once(self, n, B, T, warmup):
        batches = evaluation_streams(torch.arange(n).to(torch.uint8), B, T, warmup)
        x, y = joined(batches)
        counted = y != IGNORED
        assert sorted(y[counted].tolist()) == list(range(1, n)) and batches.targets == n - 1
        assert torch.equal(y[counted], (x + 1)[counted]) and torch.equal(x.diff(), torch.ones_like(x.diff()))
        assert batches.unused == 0 and 1 <= len(x) <= B
        assert all(x.shape[1] == T for x, _ in list(batches)[:-1])
        assert counted.diff(dim=1).sum() == (~counted[:, 0]).sum()  # warm-ups come first
        warmup = T if warmup is None else warmup
        assert counted[0].all() and all((~counted).sum(1)[1:] >= min(warmup, n - 1))
        assert counted.any(1).all()
        assert x.shape[1] == min(-(-(n - 1 + (B - 1) * warmup) // B), n - 1)

    def test_the_first_ones_and_the_last(self):
        x, y = joined(evaluation_streams(torch.arange(12), 2, 5, 2))
        assert x.tolist() == [[0, 1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9, 10]]
        assert y.tolist() == [[1, 2, 3, 4, 5, 6, 7], [IGNORED] * 3 + [8, 9, 10, 11]]

    def test_figures_do_not_depend_on_the_batch_size(self):
        """With a model that sees the last five characters, a warm-up of four is enough."""
        tokens = torch.randint(0, 50, (301,), generator=torch.Generator().manual_seed(0))

        def total(B, T, warmup):
            x, y = joined(evaluation_streams(tokens, B, T, warmup))
            seen = torch.nn.functional.pad(x, (4, 0)).unfold(1, 5, 1)  # zeros before a passage
            losses = (seen * torch.arange(1, 6)).sum(2) * y
            return losses[y != IGNORED].sum().item()

        assert total(4, 7, 4) == total(9, 50, 6) == total(1, 300, 0) != total(4, 7, 3)

    def test_a_text_of_one_character(self):
        fails(lambda: evaluation_streams(torch.arange(1), 2, 4), "2 characters at least, got 1")

    def test_ignored_is_what_cross_entropy_ignores(self):
        logits, y = torch.randn(3, 4), torch.tensor([1, IGNORED, 2])
        both = torch.nn.functional.cross_entropy(logits[[0, 2]], y[[0, 2]], reduction="sum")
        assert torch.equal(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), both)
        assert isinstance(evaluation_streams(torch.arange(9), 2, 4), Streams)


REAL_DATA = os.environ.get("HYPERFAST_DATA")


@pytest.mark.skipif(not REAL_DATA, reason="needs HYPERFAST_DATA")
def test_penn_treebank():
    text = load_text(REAL_DATA)
    assert [len(part) for part in (text.train, text.validation, text.test)] == [5_017_482, 393_042, 442_423]
    assert len(text.vocabulary) == 50
    newline = text.vocabulary.encode("\n")
    assert (text.train == newline).sum() == 42_068 and text.test[-1] == newline
    assert text.vocabulary.decode(text.test[:29]) == "no it was n't black monday\nbu"
    assert len(streams(text.train, 128, 100)) == 391
