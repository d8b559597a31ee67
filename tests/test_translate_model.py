"""Task `translate`: the encoder–decoder against NumPy, its masks, its cache, and that it learns."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.train.translate import decode
from fusedopt.train.translate.batches import Example, collate
from fusedopt.train.translate.model import Cache, Past, Sizes, Translator
from fusedopt.train.translate.tokens import END, SPECIALS, START

VOCABULARY = 12
EXAMPLES = [Example([3, 4, 5, 6, 7], [8, 9]), Example([10], [11, 3, 5, 7]), Example([4, 4], [6])]
LAYERS, HEADS, WIDTH = 2, 2, 8


def translator(dtype: torch.dtype = torch.float64, std: float = 0.3, **changes: float) -> Translator:
    """In evaluation mode, with weights so large that everything matters."""
    torch.manual_seed(0)
    sizes = dict(vocabulary=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, max_seq_len=16)
    model = Translator(Sizes(**{**sizes, "dropout": 0.0, "label_smoothing": 0.0, **changes})).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


@torch.no_grad()
def loss(model: Translator, examples: Sequence[Example] = EXAMPLES) -> float:
    return float(model(*collate(examples)))


class Reference:
    """The model once more, in NumPy, for one pair, hence without masks of padding."""

    def __init__(self, model: Translator) -> None:
        self.weights = {name: value.numpy() for name, value in model.state_dict().items()}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return self.weights[f"{name}.weight"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T

    def attend(self, x: np.ndarray, seen: np.ndarray, name: str, causal: bool = False) -> np.ndarray:
        """Rotations as products of complex numbers."""
        keys, values = np.split(self.linear(seen, f"{name}.key_value"), 2, axis=-1)
        heads, size = [], WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            query = self.linear(x, f"{name}.query")[:, part]
            scores = self.rotate(query) @ self.rotate(keys[:, part]).T / math.sqrt(size)
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ values[:, part])
        return self.linear(np.concatenate(heads, -1), f"{name}.out")

    def rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate((turned.real, turned.imag), -1)

    def feed_forward(self, x: np.ndarray, block: str) -> np.ndarray:
        y = self.linear(self.norm(x, f"{block}.mlp_norm"), f"{block}.mlp.0")
        return x + self.linear(y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2, f"{block}.mlp.2")

    def log_probabilities(self, example: Example) -> np.ndarray:
        """Of every token at every position of the translation."""
        embedding = self.weights["embedding.weight"]
        memory = embedding[[*example.source, END]]
        for block in (f"blocks.{i}" for i in range(LAYERS)):
            y = self.norm(memory, f"{block}.attention_norm")
            memory = self.feed_forward(memory + self.attend(y, y, f"{block}.attention"), block)
        memory = self.norm(memory, "encoder_norm")
        x = embedding[[START, *example.target]]
        for block in (f"blocks.{LAYERS + i}" for i in range(LAYERS)):
            y = self.norm(x, f"{block}.attention_norm")
            x = x + self.attend(y, y, f"{block}.attention", causal=True)
            x = x + self.attend(self.norm(x, f"{block}.cross_norm"), memory, f"{block}.cross")
            x = self.feed_forward(x, block)
        logits = self.norm(x, "norm") @ embedding.T
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def right(model: Translator) -> list[np.ndarray]:
    """Logarithms of the probabilities of what is right, by row."""
    reference = Reference(model)
    places = [(np.arange(len(example.target) + 1), [*example.target, END]) for example in EXAMPLES]
    return [reference.log_probabilities(x)[place] for x, place in zip(EXAMPLES, places, strict=True)]


def test_the_loss_is_that_of_numpy() -> None:
    """In fp64; the angles' sines and cosines are rounded to fp32 (6e-8). A mean over tokens, not over rows."""
    model = translator()
    expected = right(model)
    np.testing.assert_allclose([loss(model, [x]) for x in EXAMPLES], [-row.mean() for row in expected], rtol=1e-6)
    np.testing.assert_allclose(loss(model), -np.concatenate(expected).mean(), rtol=1e-6)


def test_label_smoothing_is_that_of_numpy_and_only_in_training() -> None:
    """Loss (1 − s) · right + s · mean over the vocabulary. Szegedy et al. 2016, arXiv:1512.00567, section 7."""
    plain, smoothed = translator(), translator(label_smoothing=0.2)
    assert loss(plain) == loss(smoothed)
    assert loss(plain.train()) == loss(plain.eval())
    everything = np.concatenate([Reference(plain).log_probabilities(example) for example in EXAMPLES])
    expected = -0.8 * np.concatenate(right(plain)).mean() - 0.2 * everything.mean()
    np.testing.assert_allclose(loss(smoothed.train()), expected, rtol=1e-6)


def test_dropout_only_in_training() -> None:
    model = translator(dropout=0.5)
    assert loss(model) == loss(translator())
    torch.manual_seed(1)
    first, second = loss(model.train()), loss(model)
    torch.manual_seed(1)
    assert loss(model) == first != second


def test_padding_does_not_change_a_row() -> None:
    """In fp64, where other shapes add in another order: 1e-13 is some hundred roundings. Nor do gradients change."""
    model = translator()
    predictions = [len(example.target) + 1 for example in EXAMPLES]
    alone = np.average([loss(model, [example]) for example in EXAMPLES], weights=predictions)
    np.testing.assert_allclose(loss(model), alone, rtol=1e-13)
    longer = Example([5] * 12, [6] * 12)
    gradients = []
    for batch in (collate(EXAMPLES), collate([*EXAMPLES, longer], slice(0, 3))):
        model.zero_grad()
        padded = model(*batch)
        padded.backward()
        np.testing.assert_allclose(float(padded.detach()), alone, rtol=1e-13)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_the_decoder_sees_no_later_token_and_all_of_the_source() -> None:
    model = translator()
    source, inputs, _ = collate([EXAMPLES[0]])
    logits = model(source, inputs)
    for position in range(1, inputs.shape[1]):
        changed = inputs.clone()
        changed[:, position] = 3
        now = model(source, changed)
        torch.testing.assert_close(now[:, :position], logits[:, :position], rtol=1e-13, atol=1e-13)
        assert not torch.allclose(now[:, position], logits[:, position])
    for position in range(source.shape[1]):
        changed = source.clone()
        changed[:, position] = 8
        assert not torch.allclose(model(changed, inputs)[:, 0], logits[:, 0])


def test_cached_decoding_gives_the_same_logits() -> None:
    model = translator()
    source, inputs, _ = collate(EXAMPLES)
    cache = Cache([Past() for _ in range(LAYERS)])
    parts = [model(source, inputs[:, t : t + 1], cache=cache) for t in range(inputs.shape[1])]
    assert all(past.source is not None for past in cache.pasts)  # computed once
    torch.testing.assert_close(torch.cat(parts, 1), model(source, inputs), rtol=1e-12, atol=1e-13)


def test_translations_are_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the sources, whatever the batches: each token is the best one after those before."""
    model = translator(std=0.25)
    sources = [[3, 4, 5, 6, 7], [10], [4, 4], [9, 8, 7, 6], [11, 11, 3]]
    found = decode.translate(model, sources, 12)
    called = []
    counting = model.register_forward_hook(lambda *_: called.append(1))
    assert decode.translate(model, sources[:4], 12) == found[:4]
    counting.remove()
    assert len(called) == 1 + max(map(len, found[:4])) < 12 == len(found[4])  # some end, and some reach the limit
    monkeypatch.setattr(decode, "ROWS", 2)
    assert decode.translate(model, sources, 12) == found
    assert len({*map(len, found)}) > 1
    for source, translation in zip(sources, found, strict=True):
        example = Example(source, translation)
        best = model(*collate([example])[:2])[0, :, END:].argmax(-1) + END
        assert best[: len(translation)].tolist() == translation
        assert len(translation) == 12 or int(best[-1]) == END


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_it_runs_in_low_precision(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Logits of up to 3 with 8 bits are off by 0.01 each; their loss is summed in fp32."""
    exact = loss(translator(std=0.1))
    model = translator(dtype, std=0.1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        rounded = model.train()(*collate(EXAMPLES))
        tokens = decode.translate(model.eval(), [[3, 4]], 5)
    rounded.backward()
    assert rounded.dtype == torch.float32 and abs(float(rounded.detach()) - exact) < 0.03
    assert len(tokens[0]) <= 5 and all(p.grad is not None for p in model.parameters())


def test_blocks_are_all_layers() -> None:
    model = translator()
    assert len(model.blocks) == 2 * LAYERS
    outside = {name.split(".")[0] for name, _ in model.named_parameters()} - {"blocks"}
    assert outside == {"embedding", "encoder_norm", "norm"}


def test_it_learns_eight_pairs_by_heart() -> None:
    generator = np.random.default_rng(0)
    examples = [
        Example(*([int(i) for i in generator.integers(SPECIALS, VOCABULARY, length)] for length in (4, 2 + n % 4)))
        for n in range(8)
    ]
    torch.manual_seed(0)
    model = Translator(Sizes(VOCABULARY, 32, 1, 2, 16, 0.0, 0.1))
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3, clip_grad_norm=1.0)
    batch = collate(examples)
    for _ in range(100):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert decode.translate(model, [example.source for example in examples], 16) == [x.target for x in examples]
    assert loss(model, examples) < 0.4  # with smoothed labels the best one is not 0
