"""The table of parameter groups, and the abbreviation of their names."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from layered_nets import ViT
from torch import nn

import fusedopt
from fusedopt.group_table import abbreviate


def test_the_table_of_an_optimizer_of_two_rules() -> None:
    """What was left out; options that only one of the rules has only where they are not its default."""
    model = ViT(12)
    model.head.requires_grad_(False)
    other = fusedopt.no_decay("cls_token", "pos_embed", "patch_embed.*", use_muon=False)
    rules = [other, ("blocks.[0-3].*", {"lr": 0.02, "state_dtype": "bfloat16"})]
    optimizer = fusedopt.Muon(
        fusedopt.param_groups(model, rules), lr=0.01, adamw={"lr": 0.001, "betas": (0.8, 0.9)}, skip_nonfinite=True
    )
    model.extra = nn.Linear(1, 2)
    assert (
        fusedopt.describe_groups(optimizer, model)
        == """\
group           lr  weight_decay    eps  use_muon  state_dtype  tensors  parameters  names
0             0.01           0.1  1e-07                              32       1,024  blocks.{4–11}.attn.in_proj_weight
                                                                                     blocks.{4–11}.attn.out_proj.weight
                                                                                     blocks.{4–11}.mlp.{0,2}.weight
1            0.001             0  1e-08     False                    78         516  {cls_token,pos_embed}
                                                                                     patch_embed.proj.{weight,bias}
                                                                                     blocks.{0–11}.norm.{weight,bias}
                                                                                     blocks.{0–11}.attn.in_proj_bias
                                                                                     blocks.{0–11}.attn.out_proj.bias
                                                                                     blocks.{0–11}.mlp.{0,2}.bias
                                                                                     norm.{weight,bias}
2             0.02           0.1  1e-07               bfloat16       16         512  blocks.{0–3}.attn.in_proj_weight
                                                                                     blocks.{0–3}.attn.out_proj.weight
                                                                                     blocks.{0–3}.mlp.{0,2}.weight
frozen                                                                2          10  head.{weight,bias}
in no group                                                           2           4  extra.{weight,bias}"""
    )


def test_the_table_of_an_optimizer_without_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": [model[1].weight], "lr": 0.25}])
    assert (
        fusedopt.describe_groups(optimizer)
        == """\
group     lr  weight_decay  tensors  parameters  names
0      0.001          0.01        2           9  unnamed
1       0.25          0.01        1           3  unnamed"""
    )
    assert (
        fusedopt.describe_groups(optimizer, model)
        == """\
group           lr  weight_decay  tensors  parameters  names
0            0.001          0.01        2           9  0.{weight,bias}
1             0.25          0.01        1           3  1.weight
in no group                             1           1  1.bias"""
    )


def expanded(name: str) -> list[str]:
    """All names that an abbreviated one stands for."""
    parts: list[list[str]] = []
    for part in name.split("."):
        entries = part.strip("{}").split(",")
        spans = [entry.split("–") for entry in entries]
        parts.append(
            [str(i) for s in spans for i in range(int(s[0]), int(s[-1]) + 1)] if entries[0][0].isdigit() else entries
        )
    return [".".join(chosen) for chosen in itertools.product(*parts)]


PARTS = st.sampled_from(["weight", "bias", "mlp", *map(str, range(12))])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=40))
def test_abbreviated_names_stand_for_just_these(names: set[str]) -> None:
    short = abbreviate(sorted(names))
    assert sorted(name for s in short for name in expanded(s)) == sorted(names)


def test_layers_are_abbreviated() -> None:
    names = [f"blocks.{i}.{part}.weight" for i in (*range(12), 14) for part in ("mlp.0", "mlp.2", "norm")]
    assert abbreviate(names) == ["blocks.{0–11,14}.mlp.{0,2}.weight", "blocks.{0–11,14}.norm.weight"]
