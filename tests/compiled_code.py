"""What tests ask most often of compiled code, without the third of a second that disassembling it takes."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack."""
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    return int(registers), int(stack)


def barriers(asm: Mapping[str, Any]) -> int:
    """In PTX; the assembler adds none and drops none."""
    return len(re.findall(r"\bbar(?:rier)?\.", asm["ptx"]))
