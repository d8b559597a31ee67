"""The table of rules and checks in fusedopt/docs/rules.md. ``python tests/checks.py`` writes it anew.

Nothing in it is typed by hand. A check covers a row of `table.py` if a test that makes it is run over that row, over
its rule's name or class, or names one of these in its code, or stands in the rule's own file of tests.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "fusedopt" / "docs" / "rules.md"
BEGIN, END = "<!-- made by tests/checks.py: begin -->", "<!-- made by tests/checks.py: end -->"
YES, NO = "✓", "–"


@dataclass(frozen=True)
class Check:
    """A column. tests: names of those that make it, as file::test, or a file for all of its tests.

    own: what names of such tests contain in a rule's own file of tests. cell: of a row, where no test is asked.
    """

    heading: str
    meaning: str
    tests: tuple[str, ...] = ()
    own: str = "-"
    cell: Callable[[Any], str] | None = None


def sparse(row: Any) -> str:
    """What sparse gradients a rule takes."""
    return {"rows": "as torch", "only": "only", "lazy": "lazy", None: NO}[row.cls.rule.sparse]


def cautious(row: Any) -> str:
    """What of a rule may be cautious."""
    import torch

    rule, group = row.cls.rule, row.cls([torch.ones(2, 2)], **row.options).param_groups[0]
    if rule.sparse == "only":
        return NO
    return ", ".join(["step"] * (rule.cautious and not rule.n_norms) + ["decay"] * rule.decoupled(group)) or NO


def oracle(row: Any) -> str:
    """Whether `fusedopt verify` has an oracle of a rule."""
    from fusedopt.verify.oracles import ORACLES

    return YES if row.name in ORACLES else NO


CHECKS = (
    Check(
        "torch's database", "configurations, errors and schedulers of torch's own tests, beside torch.optim",
        ("test_torch_database::test_every_configuration",),
    ),
    Check(
        "random options", "five steps under options drawn at random, beside torch.optim",
        ("test_conformance::test_five_steps_under_random_options",),
    ),
    Check(
        "state dict", "torch's state continues here and ours in torch, as without the exchange",
        ("test_checkpoint::test_torchs_run_continues_here_and_back", "test_torch_database::test_every_configuration"),
    ),
    Check(
        "kernels", "kernels give the bits of the eager twins, in every dtype (fp64 norms: within ulps)",
        ("test_engine::test_eager_and_kernels_agree_bit_for_bit", "test_sparse::test_kernels_equal_twins"),
        own="kernels_agree",
    ),
    Check("oracle", "`fusedopt verify` holds each step to a derived bound on its distance from float64", cell=oracle),
    Check(
        "package", "50 steps beside well-known packages",
        ("test_packages", "test_oracle_papers::test_oracle_agrees_with_a_package"),
    ),
    Check(
        "masks", "`set_update_mask` keeps elements bit for bit",
        (
            "test_update_mask::test_masked_elements_stay_and_state_follows_the_gradient",
            "test_sparse::test_masks_hold_under_sparse_gradients",
        ),
        own="mask",
    ),
    Check(
        "formats", "a step of lr 0 leaves every bit of the weights in every storage format",
        ("test_lr_zero::test_eager",),
    ),
    Check("sparse", 'sparse gradients: as torch takes them, only such, or with `sparse="lazy"`', cell=sparse),
    Check("cautious", "what `cautious` and `cautious_decay` can act on", cell=cautious),
    Check(
        "launches", "as many for 40 tensors as for one",
        ("test_conformance::test_launches_do_not_depend_on_the_number_of_tensors",), own="launches",
    ),
    Check(
        "sm_90", "compiles off-line in every dtype, without spills",
        ("test_compiled_kernels::test_sm_90_rules_do_not_spill_and_need_no_barriers",), own="compiled_without_spills",
    ),
)  # fmt: skip


def rows() -> list[Any]:
    """Every row of the table, by class, and a plain one for rules that have none."""
    import table

    from fusedopt.rules import RULES

    tuples = [value for value in vars(table).values() if isinstance(value, tuple)]
    found = {str(row): row for rows in tuples for row in rows if isinstance(row, table.RuleRow)}
    without = RULES.keys() - {row.name for row in found.values()}
    return sorted([*found.values(), *map(table.RuleRow, without)], key=lambda row: row.cls.__name__.lower())


def tests_of(name: str) -> list[Any]:
    """The test functions that a name of `Check.tests` stands for."""
    file, _, test = name.partition("::")
    module = importlib.import_module(file)
    return [getattr(module, test)] if test else [v for k, v in vars(module).items() if k.startswith("test_")]


def words(code: CodeType) -> Iterator[Any]:
    """Names and constants of a function and of those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        yield from words(constant) if isinstance(constant, CodeType) else [constant]


def values(test: Any) -> Iterator[Any]:
    """What a test is run over, with tuples taken apart."""
    left = [mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    while left:
        value = left.pop()
        value = getattr(value, "values", value) if type(value).__name__ == "ParameterSet" else value
        left.extend(value) if isinstance(value, tuple | list) else (yield value)


def covers(check: Check, row: Any) -> bool:
    """Whether some test that makes a check has to do with a row."""
    own = ROOT / "tests" / f"test_{row.name}.py"
    if own.exists() and any(check.own in test.__name__ for test in tests_of(own.stem)):
        return True
    names = {row.name, row.cls.__name__}
    for test in (test for name in check.tests for test in tests_of(name)):
        for value in (*values(test), *words(inspect.unwrap(test).__code__)):
            if value is row or (isinstance(value, str) and value in names):
                return True
    return False


def about(row: Any) -> str:
    """A line on a rule: class, first line of its file, and the work that it names first."""
    text = sys.modules[row.cls.__module__].__doc__ or ""
    paper = re.search(r'Source: (.*?\(\d{4}\), "[^"]+")', " ".join(text.split()))
    assert paper, row.name
    return f"- `{row.cls.__name__}`: {text.splitlines()[0]} {paper[1]}."


def generated() -> str:
    """The table and the list, between the two marker lines."""
    every = rows()
    head = ["rule", "options", *(check.heading for check in CHECKS)]
    labels: dict[tuple[str, ...], list[str]] = {}
    for row in every:  # those of one rule that are checked alike share a line
        cells = [check.cell(row) if check.cell else (YES if covers(check, row) else NO) for check in CHECKS]
        labels.setdefault((f"`{row.cls.__name__}`", *cells), []).append(row.label)
    lines = [head, ["---"] * len(head), *([rule, ", ".join(of), *cells] for (rule, *cells), of in labels.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    meanings = "\n".join(f"- **{check.heading}**: {check.meaning}" for check in CHECKS)
    rules = "\n".join(dict.fromkeys(about(row) for row in every))
    return f"{BEGIN}\n\n{rules}\n\n{table}\n\n{meanings}\n\n{END}"


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + generated() + rest.partition(END)[2]


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests are read, not run
    PAGE.write_text(page(), encoding="utf-8")
