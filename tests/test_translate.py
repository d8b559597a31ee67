"""Task `translate`: its batches, its scores, and what it tells and refuses."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] # torch documents it there

from fusedopt.train.errors import BadInput
from fusedopt.train.parallel import Ranks, on_this_rank
from fusedopt.train.translate import decode
from fusedopt.train.translate.batches import IGNORED, Example, Sampler, collate, in_batches
from fusedopt.train.translate.corpus import Pair
from fusedopt.train.translate.measure import measure, report
from fusedopt.train.translate.task import load
from fusedopt.train.translate.tokens import END, PAD, START

EXAMPLES = [Example([10 + i], [10 + i] * (1 + i * i % 17)) for i in range(23)]


def config(**changes: Any) -> Any:
    """The settings that the task reads."""
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, max_seq_len=24, batch_size=8, val_batches=2)
    return SimpleNamespace(
        **{**sizes, "seed": 0, "dropout": 0.1, "label_smoothing": 0.1, "tokenizer": "bpe", **changes}
    )


def numbers(batch: tuple[torch.Tensor, ...]) -> list[int]:
    """Which of EXAMPLES are in a batch."""
    return (batch[0][:, 0] - 10).tolist()


def drawn(size: int, count: int, seed: int = 0) -> np.ndarray:
    """The first `count` examples of a sampler."""
    sampler = Sampler(EXAMPLES, size, seed)
    return np.concatenate([numbers(sampler.next()[0]) for _ in range(-(-count // size))])[:count]


def test_a_batch_is_padded_and_marked() -> None:
    source, inputs, targets = collate([Example([7, 8], [9]), Example([5], [6, 7, 8])])
    assert source.tolist() == [[7, 8, END], [5, END, PAD]]
    assert inputs.tolist() == [[START, 9, PAD, PAD], [START, 6, 7, 8]]
    assert targets.tolist() == [[9, END, IGNORED, IGNORED], [6, 7, 8, END]]


@pytest.mark.parametrize("size", [1, 4, 5, 12, 22, 23])
def test_each_epoch_visits_each_pair_once(size: int) -> None:
    epochs = drawn(size, 5 * 23).reshape(5, 23)
    assert (np.sort(epochs) == np.arange(23)).all()
    assert (epochs[0] != epochs[1]).any() and (drawn(size, 23, seed=1) != epochs[0]).any()


def test_a_batch_is_a_function_of_the_position() -> None:
    one, other = Sampler(EXAMPLES, 5, 0), Sampler(EXAMPLES, 5, 0)
    batches = [one.next() for _ in range(12)]
    assert one.position == 60
    for k in (11, 3, 4, 9, 0):
        other.position = 5 * k
        batch, count = other.next()
        assert all(map(torch.equal, batch, batches[k][0])) and count == batches[k][1]
        assert count == (batch[2] != IGNORED).sum()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_the_rows_of_a_batch(world: int) -> None:
    """Of equal shape, whichever rank has the longest sentence."""
    whole = Sampler(EXAMPLES, 8, 0)
    parts = [Sampler(EXAMPLES, 8, 0, Ranks("ddp", rank, world).rows(8)) for rank in range(world)]
    for _ in range(6):
        batch, count = whole.next()
        shares = [part.next() for part in parts]
        assert all(share[1] == count for share in shares)
        for i, tensor in enumerate(batch):
            assert torch.equal(torch.cat([share[0][i] for share in shares]), tensor)


def test_a_batch_has_pairs_of_similar_length() -> None:
    examples = [Example([5], [6] * length) for length in np.random.default_rng(0).geometric(0.1, 407)]

    def padded(sampler: Iterator[torch.Tensor]) -> float:
        return float(np.mean([(targets == IGNORED).float().mean() for targets in sampler]))

    sampler = Sampler(examples, 16, 0)
    assert padded(sampler.next()[0][2] for _ in range(100)) < 0.25  # in any epoch
    assert padded(collate(examples[i : i + 16])[2] for i in range(0, 400, 16)) > 0.6


def test_held_out_batches_are_spread_over_the_lengths() -> None:
    assert sorted(i for batch in in_batches(EXAMPLES, 8, 9) for i in numbers(batch)) == list(range(23))
    few = in_batches(EXAMPLES, 4, 2)
    assert [len(batch[0]) for batch in few] == [4, 4]
    assert few[0][2].shape[1] < few[1][2].shape[1] == 18


def test_scores_of_translators_that_are_known() -> None:
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    pairs = [Pair(f"le {word} est là", " ".join([f"the {word} is here", word[::-1]])) for word in words]
    targets = dict(pairs)
    perfect = measure(lambda texts: [targets[text] for text in texts], pairs * 3, pairs)
    assert perfect["chrf_train"] == perfect["chrf_held_out"] == 100.0
    assert perfect["bleu_held_out"] == pytest.approx(100.0)
    assert perfect["chrf_copy_held_out"] < 50 > perfect["chrf_chance_held_out"] > 0
    copying = measure(lambda texts: texts, pairs, pairs)
    for name in ("chrf", "bleu"):
        for part in ("train", "held_out"):
            assert copying[f"{name}_{part}"] == copying[f"{name}_copy_{part}"]
        assert copying[f"{name}_copy_held_out"] == perfect[f"{name}_copy_held_out"]
    assert "nc:6" in perfect["chrf_signature"] and "tok:13a" in perfect["bleu_signature"]
    parts = [sample["part"] for sample in perfect["samples"]]
    assert parts == ["train"] * 6 + ["held_out"] * 6
    assert all(sample["reference"] == sample["translation"] != sample["source"] for sample in perfect["samples"])
    lines = report(copying)
    copied = copying["chrf_copy_held_out"]
    assert lines[0].startswith(f"chrF, held-out pairs: {copied:.1f}; the source copied {copied:.1f}, chance ")
    sample = copying["samples"][6]
    assert lines[4] == "held-out: {source} → {source} (wanted: {reference})".format(**sample)
    assert len(lines) == 4 + 12 and report(perfect)[-1].endswith("(right)")


def test_the_task_measures_its_model() -> None:
    task, settings = load("bpe", 300), config(max_seq_len=12)
    torch.manual_seed(0)
    model = task.model(settings).eval()
    measured = task.measure(model, settings)
    assert measured == task.measure(model, settings)
    sample = measured["samples"][0]
    ids = decode.translate(model, [task.tokenizer.encode(sample["source"])], 12)[0]
    assert task.tokenizer.decode(ids) == sample["translation"]
    long = {pair for pair, example in (*task.train, *task.held_out_part) if example.length > 12}
    assert not long & {(sample["source"], sample["reference"]) for sample in measured["samples"]}


def test_the_introduction_counts_what_is_left_out() -> None:
    task, settings = load("bpe", 300), config(max_seq_len=12)
    corpus, vocabulary = task.describe(settings)
    total = len(task.corpus.train) + len(task.corpus.held_out)
    held_out = sum(example.length <= 12 for _, example in task.held_out_part)
    kept = task.examples(settings) + held_out
    assert f"{task.examples(settings)} training + {held_out} held-out pairs, without {total - kept} longer" in corpus
    assert "a vocabulary of 300" in vocabulary
    assert "without" not in task.describe(config(max_seq_len=4096))[0]
    batches = task.held_out(config(max_seq_len=12, val_batches=100))
    assert sum(len(batch[0]) for batch in batches) == held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 1}, "--max-seq-len 1 leaves no pairs"),
        ({"batch_size": 4000}, "--batch-size 4000 is more than the [0-9]+ training pairs"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load("bpe", 300).check(config(**changes))


def test_the_full_batch_is_an_epoch() -> None:
    task = load("bpe", 300)
    settings = config(batch_size=task.examples(config()))
    task.check(settings)
    sampler = task.sampler(settings, slice(0, 2))
    (source, _, _), count = sampler.next()
    assert len(source) == 2 and count == sum(len(x.target) + 1 for _, x in task.train if x.length <= 24)


def test_sharded_weights_change_nothing() -> None:
    """FSDP2 with a group of one: weights are DTensors, gathered in `forward` alone."""
    task, settings = load("bpe", 300), config(dropout=0.0)
    batch = task.held_out(settings)[0]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(task.model(settings))
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        Ranks("fsdp").wrap(models[1], batch)
        losses = [model(*batch) for model in models]
        assert torch.equal(*losses)
        torch.stack(losses).sum().backward()
        whole, sharded = ([on_this_rank(p.grad) for p in model.parameters()] for model in models)
        assert all(map(torch.equal, whole, sharded))
        sources = [[5, 6, 7], [300 - n for n in range(1, 9)]]
        assert len({str(decode.translate(model.eval(), sources, 8)) for model in models}) == 1
    finally:
        distributed.destroy_process_group()
