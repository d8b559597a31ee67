"""The sections of fusedopt/docs/trainers.md as programs."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "fusedopt" / "docs" / "trainers.md"


def run(title: str) -> dict[str, Any]:
    """The names that a section's Python blocks leave."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), names)
    return names
