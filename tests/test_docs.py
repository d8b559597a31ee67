"""Pages that are made from the code and the tests say what these say."""

import checks
from table import RULES, SPARSE_RULES


def test_the_page_of_rules_is_up_to_date() -> None:
    assert checks.PAGE.read_text(encoding="utf-8") == checks.page(), "run python tests/checks.py"


def test_the_table_tells_what_is_checked_from_what_is_not() -> None:
    check = {check.heading: check for check in checks.CHECKS}
    row = {row.name: row for row in (*RULES, *SPARSE_RULES)}
    assert checks.covers(check["torch's database"], row["adam"])
    assert not checks.covers(check["torch's database"], row["lion"])
    assert checks.covers(check["package"], row["lion"]) and not checks.covers(check["package"], row["adam"])
    assert checks.covers(check["masks"], row["sparse_adam"])
