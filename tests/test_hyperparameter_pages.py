"""The pages on hyper-parameters and parameter groups say what the code does."""

import re
from pathlib import Path
from typing import Any

import pytest

from fusedopt import cli
from fusedopt.train import config, optimizers
from fusedopt.train.options import OPTIONS

DOCS = Path(__file__).parents[1] / "fusedopt" / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("groups.md", "hyperparameters.md")}
COLUMNS = (("text", "cpu"), ("translate", "cpu"), ("text", "cuda"), ("translate", "cuda"))


def test_the_page_on_groups_is_a_program() -> None:
    """Its Python blocks run in order; a text block after one is what that block printed."""
    lines: list[str] = []
    names: dict[str, Any] = {"print": lambda *args: lines.extend(" ".join(map(str, args)).split("\n"))}
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGES["groups.md"], re.DOTALL)
    assert len(blocks) == 16
    for language, block in blocks:
        if language == "python":
            lines.clear()
            exec(block, names)
        else:
            assert lines == block.rstrip("\n").split("\n")


def test_the_defaults_of_the_page_are_those_of_the_command() -> None:
    rows = re.findall(r"^\| `--([a-z0-9-]+)` \| (.*) \|$", PAGES["hyperparameters.md"], re.MULTILINE)
    assert len(rows) == 21
    found = [config.fill({"task": task}, device, optimizers.DEFAULTS) for task, device in COLUMNS]
    for name, cells in rows:
        values = [getattr(c, name.replace("-", "_")) for c in found]
        assert cells.split(" | ") == [f"{v:g}" if isinstance(v, float) else str(v) for v in values], name


def test_each_default_is_explained_below() -> None:
    page = PAGES["hyperparameters.md"]
    sections = page.split("\n## ")[2:]  # after the table and the section on tuning by hand
    for name in re.findall(r"^\| `(--[a-z0-9-]+)`", page, re.MULTILINE):
        assert any(re.search(rf"^[^\n]*`{name}\b", section.partition("\n\n")[2]) for section in sections), name


@pytest.mark.parametrize("page", PAGES)
def test_options_commands_and_links_of_the_page_exist(page: str) -> None:
    options = {name for option in OPTIONS for name in option.opts}
    assert set(re.findall(r"`(--[a-z0-9-]+)", PAGES[page])) <= options
    assert set(re.findall(r"`fusedopt (\w+)", PAGES[page])) <= set(cli.COMMANDS)
    for file, anchor in re.findall(r"\]\(([\w.]+\.md)#?([\w-]*)\)", PAGES[page]):
        headings = re.findall(r"^#+ (.*)$", (DOCS / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
