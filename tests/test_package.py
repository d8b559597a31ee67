"""What is shipped: the wheel's contents, both ways to install, and what importing the package does not do."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"fusedopt": ROOT / "fusedopt", "fusedopt_kernels": ROOT / "kernels" / "fusedopt_kernels"}
BUILDS = pytest.mark.needs("pip", "setuptools>=77")
"""Builds use what is installed (no build isolation), so that no registry is needed."""


def run(*command: str | Path, path: tuple[Path, ...] = (), cwd: Path) -> str:
    """Standard output of a Python command that sees `path` before its own packages and nothing of this checkout."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds, so that building leaves no files in the tree and takes none from it."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("fusedopt", "kernels", "tests", "perf"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=source)
    (wheel,) = (source / "dist").iterdir()
    return wheel


@BUILDS
def test_wheel_holds_exactly_the_two_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = "fusedopt-0.1.0.dist-info"
    assert {name.split("/")[0] for name in names} == {*SOURCES, info}
    assert f"{info}/licenses/LICENSE" in names
    for package, folder in SOURCES.items():
        patterns = ("*.py", "py.typed", "*.md", "*.png", "*.json")
        files = {f"{package}/{path.relative_to(folder)}" for p in patterns for path in folder.rglob(p)}
        assert files == {name for name in names if name.startswith(f"{package}/")}


WHERE = "import fusedopt, fusedopt_kernels; print(fusedopt.__file__, fusedopt_kernels.__file__)"


@BUILDS
def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", "site", wheel, cwd=tmp_path)
    files = run("-c", WHERE, path=(tmp_path / "site",), cwd=tmp_path).split()
    assert files == [str(tmp_path / "site" / package / "__init__.py") for package in SOURCES]
    main = "from importlib.metadata import entry_points; (e,) = entry_points(name='fusedopt'); print(e.value)"
    assert run("-c", main, path=(tmp_path / "site",), cwd=tmp_path).strip() == "fusedopt.cli:main"


@BUILDS
def test_editable_install_imports_the_checkout(source: Path, tmp_path: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", "site")
    run("-m", "pip", "install", *options, "--editable", source, cwd=tmp_path)
    # A --target folder is no site folder: its .pth file must be asked for. -S, so that nothing else can answer; hence
    # importing the package needs no dependency.
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); {WHERE}"
    files = run("-S", "-c", code, cwd=tmp_path).split()
    assert files == [str(source / "fusedopt/__init__.py"), str(source / "kernels/fusedopt_kernels/__init__.py")]


def test_import_leaves_triton_and_its_mode_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys; import fusedopt, fusedopt.rules;"
        "assert 'triton' not in sys.modules and 'TRITON_INTERPRET' not in os.environ;"
        "os.environ['TRITON_INTERPRET'] = '1'; fusedopt.AdamW; from fusedopt_kernels import numerics;"
        "assert numerics.INTERPRETED"
    )
    run("-c", code, path=(ROOT, ROOT / "kernels"), cwd=tmp_path)


def test_console_help_needs_neither_torch_nor_triton(tmp_path: Path) -> None:
    code = (
        "import sys; from fusedopt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'triton'} & set(sys.modules), 'imported'"
    )
    assert "train" in run("-c", code, path=(ROOT, ROOT / "kernels"), cwd=tmp_path)
