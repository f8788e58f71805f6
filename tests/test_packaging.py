"""What is installed is what lies in the tree: the wheel's files, an import from elsewhere, and the editable install."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUBPACKAGES = ("ir", "passes", "codegen", "solvers")
DATA = {".cpp", ".h", ".j2", ".json"}

COMPILE = """
import torch, regraft
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
x = torch.ones(3, 4)
fast = regraft.compile(model, x)
assert len(fast.entries) == 1 and torch.allclose(fast(x), model(x), atol=1e-6)
fast.report.save_html("report.html")
print(regraft.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    """Run in a clean environment: nothing on the path but what the interpreter itself finds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tree, built from a copy, so that nothing is left in the tree."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and tests download nothing")
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    skipped = ("--exclude=__pycache__", "--exclude=*.egg-info")
    wanted = ["regraft", *SUBPACKAGES, "pyproject.toml"]
    wanted += [name for name in ("README.md", "LICENSE") if (ROOT / name).exists()]
    archive = out / "source.tar"
    run("tar", "-cf", archive, *skipped, *wanted, cwd=ROOT)
    run("tar", "-xf", archive, cwd=source)
    if not (source / "README.md").exists():
        (source / "README.md").write_text("regraft\n")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(*command, "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def tree_files() -> set[str]:
    """Every module and data file of the packages, by the name it has below ``regraft``."""
    found = set()
    for top in ("regraft", *SUBPACKAGES):
        prefix = Path("regraft") if top == "regraft" else Path("regraft") / top
        for folder, folders, names in os.walk(ROOT / top):  # does not follow the links in regraft/
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                if Path(name).suffix in {".py", *DATA} or name == "py.typed":
                    found.add((prefix / Path(folder, name).relative_to(ROOT / top)).as_posix())
    return found


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        declared = archive.read(entry_points).decode()
    expected = tree_files()
    assert {"regraft/py.typed", "regraft/ir/program.py", "regraft/solvers/__init__.py"} <= expected
    assert held == expected
    assert "regraft = regraft.cli.main:run" in declared and "regraft = regraft.dynamo:backend" in declared


def test_an_installed_wheel_compiles_a_model_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment, which sees this one's other packages by a path file behind its own."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=tmp_path)
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in ours))
    work = tmp_path / "work"
    work.mkdir()
    where = run(python, "-c", COMPILE, cwd=work).strip().splitlines()[-1]
    assert Path(where).is_relative_to(site)
    assert "<html" in (work / "report.html").read_text().lower()
    assert "optimize" in run(tmp_path / "env" / "bin" / "regraft", "--help", cwd=work)


def test_the_environment_of_the_tests_uses_the_tree(tmp_path: Path) -> None:
    """An editable install: elsewhere, the import is the tree's own."""
    code = "import regraft, regraft.ir.program as p; print(regraft.__file__); print(p.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("the tree is on the path, and not installed")
    face, program = (Path(line).resolve() for line in done.stdout.split())
    assert face == ROOT / "regraft" / "__init__.py" and program == ROOT / "ir" / "program.py"
