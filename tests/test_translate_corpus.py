"""Task `translate`: what is read from catalogues, what is held out, and the tokenizers."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from hypothesis import given
from hypothesis import strategies as st

from fusedopt.train.errors import BadInput
from fusedopt.train.translate import corpus, tokens
from fusedopt.train.translate.corpus import Pair, normalised
from fusedopt.train.translate.task import load


def catalogue(path: Path, *entries: tuple, locale: str = "fr") -> Path:
    """A compiled catalogue of (message or its plural forms, translations, flags)."""
    written = Catalog(locale)
    for message, translation, *flags in entries:
        written.add(message, translation, flags=flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_mo(file, written)
    return path


def test_messages_are_read_as_pairs(tmp_path: Path) -> None:
    path = catalogue(
        tmp_path / "django.mo",
        ("Add\n    a <b>%(name)s</b>", "Ajouter\u00a0: <b>%(name)s</b> "),
        (("%(n)d page", "%(n)d pages"), ("%(n)d page", "%(n)d feuilles")),
        ("Doubtful", "Douteux", "fuzzy"),
        ("Missing", ""),
        ("M", "L"),
    )
    assert list(corpus.messages(path)) == [
        [("%(n)d page", "%(n)d page"), ("%(n)d feuilles", "%(n)d pages")],
        [("Ajouter : <b>%(name)s</b>", "Add a <b>%(name)s</b>")],
    ]


def test_a_third_plural_form_translates_the_plural(tmp_path: Path) -> None:
    three = catalogue(tmp_path / "ru.mo", (("one day", "many days"), ("jour", "jours", "de jours")), locale="ru")
    assert list(corpus.messages(three)) == [[("jour", "one day"), ("jours", "many days"), ("de jours", "many days")]]


def test_the_real_corpus_is_split_without_anything_in_common() -> None:
    read = corpus.load()
    assert len(read.train) > 2000 and 0.07 < len(read.held_out) / (len(read.train) + len(read.held_out)) < 0.13
    assert len({*read.train, *read.held_out}) == len(read.train) + len(read.held_out)
    for side in range(2):
        learnt = {normalised(pair[side]) for pair in read.train}
        assert learnt.isdisjoint(normalised(pair[side]) for pair in read.held_out)
    assert corpus.load() == read


MESSAGES = [[Pair(f"mot {word}", f"word {word}")] for word in ("un", "deux", "trois", "quatre", "cinq", "six", "sept")]


def drawn(groups: list[list[Pair]]) -> list[str]:
    return [pair.source for pair in corpus.split(groups)[1]]


def test_the_split_is_a_function_of_each_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "DRAWN", 50)
    expected = drawn(MESSAGES)
    assert expected == ["mot deux", "mot quatre", "mot sept", "mot trois"]  # of all versions
    assert drawn(MESSAGES[::-1]) == drawn(MESSAGES + MESSAGES) == expected
    assert drawn(MESSAGES[:3]) == ["mot deux", "mot trois"]


def test_what_training_shares_is_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pairs with one target, one source or one message, in a chain: one in training takes all others along."""
    monkeypatch.setattr(corpus, "_drawn", lambda pair: pair.source != "base")
    chain = [
        [Pair("base", "a b")],
        [Pair("Déjà", "<i>A %(x)s b!</i>")],  # the same target
        [Pair("deja", "c d")],  # the same source as the last
        [Pair("e f", "C d"), Pair("e fs", "c ds")],  # the same target, and a plural
        [Pair("other", "other")],
    ]
    train, held_out = corpus.split(chain)
    assert held_out == [("other", "other")] and len(train) == 5


def test_normalised_leaves_words() -> None:
    assert normalised("« %(a)s » <b class='x'>Où ÊTRE</b>, 12&nbsp;{n} l’été…") == "ou etre l ete"


@pytest.mark.parametrize("name", ["django", "wagtail", "sacrebleu"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    with pytest.raises(BadInput, match=rf"needs {name}, not installed here: pip install 'fusedopt\[translate\]'"):
        corpus.load()


def test_packages_without_catalogues_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", ("json",))
    with pytest.raises(BadInput, match="json are installed without French catalogues"):
        corpus.catalogues()


def test_frameworks_are_not_imported() -> None:
    code = "import sys; from fusedopt.train.translate import corpus; corpus.load(); print('django' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "False\n", done.stderr


TEXTS = ["Modifier la page %(title)s", "Edit page %(title)s", "Modifier le modèle", "Edit the model"] * 3
TOKENIZERS = {"bytes": tokens.Bytes(), "bpe": tokens.byte_pairs(TEXTS, tokens.SMALLEST + 20)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(st.characters(exclude_categories=["Cs"])))  # without halves of characters, which are no UTF-8
def test_round_trips_are_exact(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokens.SPECIALS <= i < tokenizer.size for i in ids)


def test_the_corpus_makes_round_trips() -> None:
    task = load("bpe", 2000)
    assert task.tokenizer.size == 2000
    for pair, example in (*task.train, *task.held_out_part):
        assert tuple(map(task.tokenizer.decode, example)) == pair


def test_half_a_character_is_replaced() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_pieces_are_shorter_than_bytes_and_learnt_alike_each_time() -> None:
    pieces, again = TOKENIZERS["bpe"], tokens.byte_pairs(iter(TEXTS), tokens.SMALLEST + 20)
    assert len(pieces.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert pieces.digest == again.digest != tokens.byte_pairs(TEXTS, tokens.SMALLEST + 19).digest


def test_the_tokenizer_and_the_digest_depend_on_training_pairs_and_settings() -> None:
    task = load("bpe", 300)
    texts = [text for pair in task.corpus.train for text in pair]
    assert tokens.make("bpe", 300, texts).digest == task.tokenizer.digest
    assert len({task.digest, load("bpe", 301).digest, load("bytes", 0).digest}) == 3


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("bpe", 258, "--vocabulary-size must be at least 259"),
        ("bpe", 5000, "--vocabulary-size 5000: the training pairs yield [0-9]+"),
        ("words", 300, "unknown tokenizer words .known: bytes, bpe"),
    ],
)
def test_impossible_vocabularies_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tokens.make(name, size, TEXTS)


def test_what_occurs_once_is_no_piece() -> None:
    with pytest.raises(BadInput, match=f"yield {tokens.SMALLEST},"):
        tokens.byte_pairs(["abcd"], tokens.SMALLEST + 1)
