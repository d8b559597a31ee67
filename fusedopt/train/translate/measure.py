"""How good translations are: chrF and BLEU, beside what no translator would get, and some translations to read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .corpus import Pair

PERMUTATIONS = 5
SAMPLES = 6


def measure(
    translate: Callable[[list[str]], list[str]], train: Sequence[Pair], held_out: Sequence[Pair]
) -> dict[str, Any]:
    """Scores from 0 to 100 on all held-out pairs and on as many training pairs, drawn by a fixed seed.

    copy: the French source as its translation. chance: the model's translations given to other sentences of the same
    part, the mean of five permutations.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    generator = np.random.default_rng(0)
    count = len(held_out)
    parts = {"train": _draw(train, count, generator), "held_out": _draw(held_out, count, generator)}
    measured: dict[str, Any] = {}
    samples: list[dict[str, str]] = []
    for part, pairs in parts.items():
        sources, references = ([*texts] for texts in zip(*pairs, strict=True))
        own = translate(sources)
        others = [own[shift:] + own[:shift] for shift in range(1, 1 + PERMUTATIONS)]
        for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
            score, *chance, copy = (metric.corpus_score(texts, [references]).score for texts in (own, *others, sources))
            scores = {"": score, "copy_": copy, "chance_": statistics.mean(chance)}
            measured.update({f"{name}_{of}{part}": round(value, 2) for of, value in scores.items()})
            measured[f"{name}_signature"] = str(metric.get_signature())
        texts = zip(sources[:SAMPLES], references[:SAMPLES], own[:SAMPLES], strict=True)
        samples += [{"part": part, "source": s, "reference": r, "translation": t} for s, r, t in texts]
    return {**measured, "samples": samples}


def _draw(pairs: Sequence[Pair], count: int, generator: np.random.Generator) -> list[Pair]:
    return [pairs[i] for i in generator.permutation(len(pairs))[:count]]


def report(measured: dict[str, Any]) -> list[str]:
    """What `measure` has found, in lines to print."""
    parts = {"held_out": "held-out", "train": "training"}
    lines = []
    for metric, title in (("chrf", "chrF"), ("bleu", "BLEU")):
        for part, name in parts.items():
            own, copy, chance = (measured[f"{metric}_{of}{part}"] for of in ("", "copy_", "chance_"))
            lines.append(f"{title}, {name} pairs: {own:.1f}; the source copied {copy:.1f}, chance {chance:.1f}")
    for sample in sorted(measured["samples"], key=lambda sample: [*parts].index(sample["part"])):
        right = "right" if sample["translation"] == sample["reference"] else f"wanted: {sample['reference']}"
        lines.append(f"{parts[sample['part']]}: {sample['source']} → {sample['translation']} ({right})")
    return lines
