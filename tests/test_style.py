"""Rules of the code base that a linter does not know. Each failure names the file and line."""

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
RULES = sorted(p for p in (ROOT / "fusedopt" / "rules").glob("*.py") if p.name != "__init__.py")

MEMORY = re.compile(r"load|store|atomic_\w+|program_id|num_programs|make_block_ptr|make_tensor_descriptor")
MAX_LINES = 300
MAX_PARAMETERS = 8


@cache
def tracked() -> tuple[Path, ...]:
    """Files that git has or would take; every file outside hidden folders where there is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if "__pycache__" not in p.parts]
        names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    return tuple(sorted(ROOT / name for name in names if name and (ROOT / name).is_file()))


PYTHON = [path for path in tracked() if path.suffix == ".py"]
SOURCE = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("fusedopt", "kernels", "perf")]


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path), str(path))


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def comments(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text(path)).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, lazily or not; relative imports keep their dots."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def test_the_checks_see_the_tree() -> None:
    assert ROOT / "tests" / "test_style.py" in PYTHON
    assert {path.relative_to(ROOT).parts[0] for path in SOURCE} >= {"fusedopt", "kernels"}
    assert len(RULES) >= 3


def test_memory_is_touched_under_kernels_only() -> None:
    """A rule sees values; pointers, masks and program ids belong to the engine. Tests may hold kernels of their own."""
    bad = [
        at(path, node.lineno)
        for path in SOURCE
        if not path.is_relative_to(KERNELS)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("tl", "triton.language")
        and MEMORY.fullmatch(node.attr)
    ]
    assert not bad


def test_imports_point_one_way() -> None:
    """fusedopt → fusedopt_kernels, never back; and `kernels` is a folder, not a package."""
    below = [path for path in SOURCE if path.is_relative_to(KERNELS)]
    back = [at(p, line) for p in below for line, name in imports(p) if re.match(r"fusedopt(\.|$)", name)]
    assert not back
    assert not (KERNELS / "__init__.py").exists()


def test_files_fit_one_reading() -> None:
    lengths = {str(path.relative_to(ROOT)): len(text(path).splitlines()) for path in PYTHON}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def _may_have_many_parameters(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Kernels, whose arguments are their interface, and the constructors that repeat torch.optim's."""
    if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return True
    return function.name == "__init__" and (path in RULES or path == ROOT / "fusedopt" / "optimizer.py")


def test_signatures_take_records_not_lists_of_arguments() -> None:
    bad = []
    for path in PYTHON:
        for function in functions(path):
            arguments = function.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS and not _may_have_many_parameters(path, function):
                bad.append(f"{at(path, function.lineno)} {function.name} takes {count}")
    assert not bad


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rule_names_its_source(path: Path) -> None:
    """The docstring of a rule says which paper or work it follows, with its year."""
    docstring = ast.get_docstring(tree(path)) or ""
    assert re.search(r"^Sources?:.*\b(19|20)\d\d\b", docstring, re.MULTILINE | re.DOTALL)


def test_every_rule_has_a_row_in_the_table() -> None:
    table = tree(ROOT / "tests" / "table.py")
    words = {node.value for node in ast.walk(table) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {path.stem for path in RULES} <= words


IGNORE = re.compile(
    r"#\s*(noqa(?P<noqa>:\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*)?"
    r"|type:\s*ignore(?P<type>\[[\w, -]+\])?"
    r"|pyright:\s*(ignore(?P<pyright>\[[\w, ]+\])?|(?P<file>\w+=\w+(,\s*\w+=\w+)*))"
    r"|fmt:\s*(off|skip)(?P<fmt>))"
)


def test_every_ignore_is_narrow_and_has_a_reason() -> None:
    """`# noqa: E402 why`, `# type: ignore[code]  # why`, or the reason in a comment on the line above."""
    bad = []
    for path in PYTHON:
        lines = text(path).splitlines()
        for line, comment in comments(path):
            found = IGNORE.search(comment)
            if not found or found["fmt"] is not None:  # `fmt` changes layout only: no check is lost
                continue
            narrow = any(found[kind] for kind in ("noqa", "type", "pyright", "file"))
            beside = comment[: found.start()] + comment[found.end() :]
            above = lines[line - 2].strip() if line > 1 else ""
            reason = len(re.findall(r"\w+", beside)) >= 2 or above.startswith("#")
            if not (narrow and reason):
                bad.append(at(path, line))
    assert not bad


def test_every_skip_has_a_reason() -> None:
    """Better than a skip: the markers `gpu` and `needs`, which are listed under NOT RUN HERE."""
    skips = re.compile(r"pytest\.(skip|xfail|importorskip|mark\.skip|mark\.skipif|mark\.xfail)")
    bad = []
    for path in PYTHON:
        reasoned = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and skips.fullmatch(ast.unparse(node.func)):
                direct = node.args and ast.unparse(node.func) in ("pytest.skip", "pytest.xfail")
                if direct or any(keyword.arg == "reason" for keyword in node.keywords):
                    reasoned.add(node.func)
        bad += [
            at(path, node.lineno)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and skips.fullmatch(ast.unparse(node)) and node not in reasoned
        ]
    assert not bad


def test_every_ignore_in_the_configuration_has_a_reason() -> None:
    config = ROOT / "pyproject.toml"
    entry = re.compile(r'\s*("(ignore|default)(:[^"]*)?"|"[A-Z]+\d+"|report\w+ = (false|"none")|"[^"]+" = \["[A-Z]+\d)')
    lines = enumerate(text(config).splitlines(), 1)
    assert not [at(config, n) for n, line in lines if entry.match(line) and "#" not in line]
    assert tomllib.loads(text(config))["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"


def test_nothing_names_one_machine() -> None:
    """No absolute path outside the system's own folders, and no package registry: a clone works anywhere."""
    path = re.compile(r"(?<![\w.:/~$*})\]>-])/(?!(usr|bin|dev|proc|sys|etc)/)[a-z][\w.-]*/[\w.-]+")
    registry = re.compile(
        r"(?i)https?://[^\s/]*(pypi|pythonhosted|npm|registry|mirror|proxy)|--(extra-)?index-url|find-links"
    )
    bad = []
    for file in tracked():
        if file == Path(__file__) or file.suffix in (".png", ".jsonl"):
            continue
        for n, line in enumerate(text(file).splitlines(), 1):
            if path.search(line) or registry.search(line):
                bad.append(f"{at(file, n)} {line.strip()[:80]}")
    assert not bad
