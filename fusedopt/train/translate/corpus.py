"""The parallel corpus: the French catalogues of Django and Wagtail, read where they are installed, and their split.

A catalogue (gettext) maps an English message of the program to its translation. Here the French one is the source and
the English one the target. What is read are the compiled catalogues, which have no fuzzy or obsolete messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..errors import BadInput

PACKAGES = ("django", "wagtail")
LIBRARIES = ("babel", "sacrebleu", "tokenizers")
DRAWN = 12  # per cent of the sources; a tenth of the pairs remains when what training shares with them is taken out
MARKUP = re.compile(r"%(\(\w+\))?[a-zA-Z%]|\{\w*\}|<[^>]*>|&\w+;")
"""Placeholders, tags and entities."""


class Pair(NamedTuple):
    """A French message and its English original."""

    source: str
    target: str


@dataclass(frozen=True)
class Corpus:
    """Pairs, sorted. `versions`: "django 5.2.1" and the like. `digest`: SHA-256 of all pairs and the split."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    versions: tuple[str, ...]
    digest: str


def load() -> Corpus:
    """Read and split the installed catalogues. BadInput when a package is missing."""
    missing = [name for name in (*PACKAGES, *LIBRARIES) if (spec := find_spec(name)) is None or spec.origin is None]
    if missing:
        lacks = f"--task translate needs {' and '.join(missing)}, not installed here"
        raise BadInput(f"{lacks}: pip install 'fusedopt[translate]'")
    train, held_out = split(message for path in catalogues() for message in messages(path))
    digest = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()
    versions = tuple(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return Corpus(tuple(train), tuple(held_out), versions, digest)


def catalogues() -> list[Path]:
    """The compiled French catalogues. The packages are not imported: that would need a configured site."""
    origins = [spec.origin for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    files = [path for origin in origins for path in Path(origin).parent.rglob("locale/fr/LC_MESSAGES/*.mo")]
    if not files:
        raise BadInput(f"{' and '.join(PACKAGES)} are installed without French catalogues (*.mo): reinstall them")
    return sorted(files)


def messages(path: Path) -> Iterator[list[Pair]]:
    """The pairs of each message of a catalogue: one, or one for each plural form. Contexts are dropped.

    White space of every kind becomes single spaces: line breaks are those of HTML templates. Placeholders, HTML and
    punctuation stay. Left out are pairs with less than two letters on a side, such as "L" for "M" (Monday).
    """
    from babel.messages.mofile import read_mo

    with path.open("rb") as file:
        for message in read_mo(file):
            english, french = ([x] if isinstance(x, str) else [*(x or ())] for x in (message.id, message.string))
            english += english[-1:] * (len(french) - len(english))  # French has a third form, for millions
            forms = [Pair(" ".join(s.split()), " ".join(t.split())) for s, t in zip(french, english, strict=False)]
            pairs = [pair for pair in forms if min(len(normalised(text)) for text in pair) >= 2]
            if message.id and pairs:
                yield pairs


def normalised(text: str) -> str:
    """Words alone, without case, accents, numbers, punctuation, placeholders and tags."""
    letters = unicodedata.normalize("NFKD", MARKUP.sub(" ", text)).casefold()
    return " ".join(re.findall(r"[^\W\d_]+", "".join(c for c in letters if not unicodedata.combining(c))))


def split(groups: Iterable[list[Pair]]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of messages, by a hash of the source: not by their order, or by what else there is.

    A held-out pair that shares the (normalised) source, target or message with a training pair goes over to training,
    until there is none: no held-out sentence can have been learnt by heart.
    """
    keys: dict[Pair, set[tuple[str, str]]] = {}
    for group in groups:
        for pair in group:
            same = {("source", normalised(pair.source)), ("target", normalised(pair.target))}
            keys.setdefault(pair, set()).update(same, {("target", normalised(group[0].target))})
    train = [pair for pair in keys if not _drawn(pair)]
    held_out = [pair for pair in keys if _drawn(pair)]
    while True:
        learnt = set().union(*(keys[pair] for pair in train))
        shared = {pair for pair in held_out if keys[pair] & learnt}
        if not shared:
            return sorted(train), sorted(held_out)
        train += shared
        held_out = [pair for pair in held_out if pair not in shared]


def _drawn(pair: Pair) -> bool:
    digest = hashlib.sha256(normalised(pair.source).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < DRAWN
