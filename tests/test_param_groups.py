"""Parameter groups by rules: each trainable parameter in exactly one, layer-wise decay as published."""

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layered_nets import Bert, Layer, ViT
from torch import Tensor, nn

import fusedopt


class LlamaRMSNorm(nn.Module):
    """A norm of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class PreNorm(nn.Module):
    """A wrapper whose parameters are those of no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)


def names_of(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


def is_matrix(name: str, parameter: Tensor, module: nn.Module | None) -> bool:
    return parameter.ndim == 2


def no_matrix(name: str, parameter: Tensor, module: nn.Module | None) -> bool:
    return parameter.ndim != 2


# ------------------------------------------------------------------------------------------------ exactly once
MATCHERS = ("*.bias", "*norm*", "encoder.layer.1.*", "*", "nothing.*", re.compile(r"layer\.[02]\."),
            re.compile("weight$"), nn.LayerNorm, nn.Embedding, Layer, nn.Conv2d, is_matrix)  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {}, optional={"lr": st.sampled_from([0.1, 0.2]), "weight_decay": st.sampled_from([0.0, 0.5])}
)
GIVEN_RULES = st.lists(st.tuples(st.sampled_from(MATCHERS) | st.tuples(*[st.sampled_from(MATCHERS)] * 2), OPTIONS))


def first_match(model: nn.Module, rules: list[Any], name: str, parameter: Tensor) -> dict[str, Any]:
    """The options of a parameter's rule, found in another way: modules by their own parameters."""
    for what, options in rules:
        for matcher in what if isinstance(what, tuple) else (what,):
            if isinstance(matcher, str):
                hit = re.fullmatch(re.escape(matcher).replace(r"\*", ".*"), name)
            elif isinstance(matcher, re.Pattern):
                hit = matcher.search(name)
            elif isinstance(matcher, type):
                hit = any(parameter is p for m in model.modules() if isinstance(m, matcher) for p in m.parameters())
            else:
                hit = parameter.ndim == 2
            if hit:
                return options
    return {}


@settings(max_examples=40)
@given(rules=GIVEN_RULES, frozen=st.sets(st.integers(0, 40)), decay=st.sampled_from([None, 1.0, 0.5]))
def test_each_trainable_parameter_is_in_exactly_one_group(rules: list[Any], frozen: set[int], decay: Any) -> None:
    model = Bert()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i not in frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for cls, extra in ((fusedopt.AdamW, {}), (torch.optim.AdamW, {}), (fusedopt.Muon, {"adamw": {}})):
        muon = [(no_matrix, {"use_muon": False})] if extra else []
        own = [*muon, *rules]
        groups = fusedopt.param_groups(model, own, lr=0.3, layer_decay=decay, allow_unused=True)
        assert names_of(groups) == names_of(
            fusedopt.param_groups(model, own, lr=0.3, layer_decay=decay, allow_unused=True)
        )
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        assert not any(a == b for a, b in itertools.combinations(options, 2)), "groups of equal options are not one"
        if not trained:
            assert groups == []
            continue
        optimizer = cls(groups, **extra)
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(trained)
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                assert p is trained[name]
                chosen = {"use_muon": False} if muon and p.ndim != 2 else first_match(model, rules, name, p)
                assert all(group[key] == value for key, value in chosen.items() if key != "lr" or decay is None)
                assert ("use_muon" in group) == ("use_muon" in chosen)
                if "lr" not in chosen and decay is None:
                    assert group["lr"] == 0.3


def test_the_default_group_comes_first_then_the_rules_in_order() -> None:
    rules = [("pooler.*", {"lr": 0.2}), (nn.LayerNorm, {"lr": 0.1}), ("output.*", {"lr": 0.2}), ("*.attn.*", {})]
    groups = fusedopt.param_groups(Bert(1), rules)
    assert [group.get("lr") for group in groups] == [None, 0.2, 0.1]
    assert names_of(groups) == [
        ["embeddings.word.weight", "embeddings.position.weight"]
        + [f"encoder.layer.0.attn.{x}" for x in ("in_proj_weight", "in_proj_bias")]
        + [f"encoder.layer.0.attn.out_proj.{x}" for x in ("weight", "bias")]
        + [f"encoder.layer.0.mlp.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")],
        ["pooler.weight", "pooler.bias", "output.bias"],
        [f"encoder.{norm}.{x}" for norm in ("layer.0.norm", "final_norm") for x in ("weight", "bias")],
    ]


def test_no_decay_is_for_biases_norms_and_embeddings() -> None:
    decayed, plain = fusedopt.param_groups(ViT(1), [fusedopt.no_decay("pos_embed", "cls_token", betas=(0.9, 0.95))])
    assert plain["weight_decay"] == 0.0 and plain["betas"] == (0.9, 0.95) and "weight_decay" not in decayed
    matrices = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.2.weight"]
    assert names_of([decayed]) == [["patch_embed.proj.weight", *(f"blocks.0.{m}" for m in matrices), "head.weight"]]
    blocks = nn.ModuleDict({"own": LlamaRMSNorm(), "wrapper": PreNorm()})
    assert names_of(fusedopt.param_groups(blocks, [fusedopt.no_decay()])) == [["wrapper.inner.weight"], ["own.weight"]]
    (named,) = fusedopt.param_groups(nn.LSTM(2, 3, bias=False), [fusedopt.no_decay()], allow_unused=True)
    assert len(named["params"]) == 2
    recurrent = fusedopt.param_groups(nn.LSTM(2, 3), [fusedopt.no_decay()])
    assert names_of(recurrent) == [["weight_ih_l0", "weight_hh_l0"], ["bias_ih_l0", "bias_hh_l0"]]
    kept = fusedopt.param_groups(Bert(), [(nn.Embedding, {}), fusedopt.no_decay()])
    assert names_of(kept)[0][:2] == ["embeddings.word.weight", "embeddings.position.weight"]


def test_tensor_rates_are_merged_only_when_they_are_one_tensor() -> None:
    a, b = torch.tensor(0.1), torch.tensor(0.1)
    rules = [("pooler.*", {"lr": a}), ("output.*", {"lr": b}), (nn.Embedding, {"lr": a})]
    assert [group["lr"] is a for group in fusedopt.param_groups(Bert(1), rules)[1:]] == [True, False]
    groups = fusedopt.param_groups(Bert(2), lr=a, layer_decay=0.5)
    assert [group["lr"].item() for group in groups] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert groups[0]["lr"] is a


# -------------------------------------------------------------------------------------------- layer-wise decay
def beit_layer(name: str, layers: int) -> int:
    """BEiT's and MAE's numbers: 0 for tokens and embeddings, i + 1 for layer i, layers + 1 for whatever is left."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "embeddings")):
        return 0
    found = re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name)
    return int(found[1]) + 1 if found else layers + 1


@pytest.mark.parametrize(("model", "layers"), [(Bert(3), 3), (ViT(4), 4), (Bert(12), 12)], ids=["BERT", "ViT", "deep"])
@pytest.mark.parametrize("named", [False, True], ids=["model", "names"])
def test_layer_decay_is_the_published_formula(model: nn.Module, layers: int, named: bool) -> None:
    """Each parameter's lr is lr·decay^(layers + 1 − its layer's number)."""
    source = list(model.named_parameters()) if named else model
    found = rates(fusedopt.param_groups(source, lr=0.01, layer_decay=0.75))
    assert found == {
        name: pytest.approx(0.01 * 0.75 ** (layers + 1 - beit_layer(name, layers)))
        for name, _ in model.named_parameters()
    }
    assert found["encoder.final_norm.weight" if isinstance(model, Bert) else "head.weight"] == 0.01


def test_layers_by_a_function_as_timm_numbers_them() -> None:
    """timm puts a ViT's last norm into the group of the last block: published scales of its layer map."""
    model, last = ViT(4), 4

    def number(name: str) -> int:
        return last if name.startswith("norm.") else beit_layer(name, last)

    found = rates(fusedopt.param_groups(model, lr=1.0, layer_decay=0.5, layers=number))
    assert found["norm.weight"] == found["blocks.3.mlp.0.weight"] == 0.5
    assert found["head.weight"] == 1.0 and found["cls_token"] == 0.5**5


def test_layers_by_a_pattern_with_several_numbers() -> None:
    """Stages of blocks, and an encoder beside a decoder, whose embedding lies below its layers."""
    net = nn.ModuleDict({"stem": nn.Linear(2, 2)})
    net.update({f"layer{s}": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for s in (1, 2)})
    net["fc"] = nn.Linear(2, 2)
    found = rates(fusedopt.param_groups(net, lr=1.0, layer_decay=0.5, layers=re.compile(r"layer(\d)\.(\d+)\.")))
    order = ["fc", "layer2.1", "layer2.0", "layer1.1", "layer1.0", "stem"]
    assert [found[f"{name}.weight"] for name in order] == [0.5**d for d in range(6)]

    def half() -> nn.ModuleDict:
        stack = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        return nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": stack, "norm": nn.LayerNorm(2)})

    net = nn.ModuleDict({"encoder": half(), "decoder": half(), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"numbers in decoder\.layers, encoder\.layers: say which"):
        fusedopt.param_groups(net, lr=1.0, layer_decay=0.5)
    found = rates(fusedopt.param_groups(net, lr=1.0, layer_decay=0.5, layers=re.compile(r"layers\.(\d+)\.")))
    for side in ("encoder", "decoder"):
        parts = ["norm", "layers.1", "layers.0", "embed"]
        assert [found[f"{side}.{part}.weight"] for part in parts] == [1.0, 0.5, 0.25, 0.125]
    assert found["head.bias"] == 1.0


def test_frozen_layers_count_and_rules_keep_their_own_rate() -> None:
    model = Bert(3)
    model.pooler.requires_grad_(False)
    model.encoder.layer[1].requires_grad_(False)  # pyright: ignore[reportIndexIssue] # a ModuleList
    groups = fusedopt.param_groups(model, [("embeddings.*", {"lr": 1.0})], lr=0.1, layer_decay=0.5)
    found = rates(groups)
    assert found["encoder.layer.0.norm.weight"] == pytest.approx(0.1 * 0.5**3)
    assert found["embeddings.word.weight"] == 0.5**4
    assert not any(name.startswith(("pooler", "encoder.layer.1.")) for name in found)


# -------------------------------------------------------------------------------------------- names of wrappers
class Wrapper(nn.Module):
    """Stands in for a wrapper that holds the module under a name of its own."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def fsdp1(model: Bert) -> nn.Module:
    """FSDP1 with use_orig_params=True around each layer and the whole."""
    layers = [Wrapper("_fsdp_wrapped_module", layer) for layer in model.encoder.layer]  # pyright: ignore[reportGeneralTypeIssues] # a ModuleList
    model.encoder.layer = nn.ModuleList(layers)
    return Wrapper("_fsdp_wrapped_module", model)


def fsdp2(model: Bert) -> nn.Module:
    """As fully_shard: other classes, the same names."""
    for module in list(model.modules()):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    return model


WRAPPINGS: dict[str, Any] = {
    "DDP": lambda model: Wrapper("module", model),
    "compiled": lambda model: Wrapper("_orig_mod", model),
    "DDP of compiled": lambda model: Wrapper("module", Wrapper("_orig_mod", model)),
    "compiled DDP": lambda model: Wrapper("_orig_mod", Wrapper("module", model)),
    "FSDP1": fsdp1,
    "checkpointed": lambda model: Wrapper("_checkpoint_wrapped_module", model),
    "FSDP2": fsdp2,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_rules_see_names_without_wrappers_and_groups_have_torchs(wrapping: str) -> None:
    rules = [("encoder.layer.0.*", {"lr": 0.5}), fusedopt.no_decay(), (re.compile(r"^pooler\.weight"), {"lr": 0.7})]
    plain = fusedopt.param_groups(Bert(), rules, lr=0.1, layer_decay=0.5)
    wrapped = WRAPPINGS[wrapping](Bert())
    groups = fusedopt.param_groups(wrapped, rules, lr=0.1, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [group["lr"] for group in plain]
    given = dict(wrapped.named_parameters())
    assert all(given[name] is p for group in groups for name, p in group["params"])
    assert fusedopt.describe_groups(groups, wrapped) == fusedopt.describe_groups(plain)
    assert (names_of(groups) == names_of(plain)) == (wrapping == "FSDP2")


# ------------------------------------------------------------------------------------------------------ errors
NAMED = list(Bert().named_parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(rules=[("enocder.layer.0.norm.bias", {})]), ValueError, "no parameter; the closest is encoder.layer.0"),
        (dict(rules=[(("*.bias", re.compile("gian$")), {})]), ValueError, r"'gian\$' matches no parameter"),
        (dict(rules=[((nn.LayerNorm, nn.Conv2d), {}), (nn.Conv2d, {})]), ValueError, "rule 2: Conv2d matches no para"),
        (dict(rules=[("*.bias", {}), ("output.*", {})]), ValueError, "rule 2 gets no parameter: rule 1 before it"),
        (dict(rules=[("output.weight", {})]), ValueError, r"output.weight, which is tied to embeddings.word.weight"),
        (dict(rules=["*.bias"]), TypeError, "rule 1 must be a pair"),
        (dict(rules=[("*", [])]), TypeError, "rule 1 must be a pair"),
        (dict(rules=[(3, {})]), TypeError, "rule 1 matches by a glob, .* not by 3"),
        (dict(rules=[(int, {})]), TypeError, "not by <class 'int'>"),
        (dict(rules=[("*", {"params": []})]), ValueError, "rule 1 sets 'params'"),
        (dict(model=NAMED, rules=[(nn.Linear, {})]), ValueError, "pass the model instead"),
        (dict(model=NAMED, rules=[fusedopt.no_decay()]), ValueError, "pass the model instead"),
        (dict(model=list(Bert().parameters())), TypeError, "rules go by names"),
        (dict(model=[("module._flat_param", torch.ones(1))]), ValueError, "use_orig_params=True"),
        (dict(lr=-1.0), ValueError, "learning rate: -1.0"),
        (dict(layer_decay=0.5), ValueError, "give lr"),
        (dict(layer_decay=1.5, lr=0.1), ValueError, "layer_decay must be above 0 and at most 1, got 1.5"),
        (dict(layer_decay=0.0, lr=0.1), ValueError, "layer_decay must be above 0"),
        (dict(layer_decay="0.5", lr=0.1), TypeError, "layer_decay must be a number"),
        (dict(layers=re.compile("a")), ValueError, "give that too"),
        (dict(layer_decay=0.5, lr=0.1, layers=re.compile(r"h\.(\d+)")), ValueError, "finds no layer number"),
        (dict(model=nn.Linear(1, 1), layer_decay=0.5, lr=0.1), ValueError, "no layer number in names such as weight"),
    ],
    ids=lambda x: None if not isinstance(x, str) else x[:30],
)  # fmt: skip
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.param_groups(**{"model": Bert(), **arguments})


def test_unused_rules_are_taken_when_that_is_said() -> None:
    rules = [("no.such", {}), ("*", {"lr": 0.1}), fusedopt.no_decay()]
    (group,) = fusedopt.param_groups(Bert(), rules, allow_unused=True)
    assert group["lr"] == 0.1 and "weight_decay" not in group
