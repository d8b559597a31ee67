"""Machine code written by hand, for the tests of `fusedopt inspect`."""

from fusedopt.inspect import sass

HEADER = """
 REG:8 STACK:0 SHARED:0
 Attribute: EIATTR_PARAM_CBANK
 Format: EIFMT_SVAL
 Value: 0x2 0x100210
"""


def code(*lines: str) -> sass.Code:
    """A kernel whose first instruction is at 0, one every 16 bytes."""
    return sass.parse(HEADER + "".join(f"/*{16 * i:04x}*/ {line} ; /* 0x0 */\n" for i, line in enumerate(lines)))
