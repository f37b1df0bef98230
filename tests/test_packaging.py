"""What `pip install` brings is complete, and what is missing is said in one sentence."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vq4dit
from vq4dit.extras import of_extra
from vq4dit.version import VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
IF_THERE = {"peft", "hf_xet"}  # used where somebody else brought them
OURS_ON_A_SPACE = {"spaces"}  # imported by app.py, and only where a Space lends GPUs


def lines(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text().splitlines() if line.strip() and line[0] not in "#-"}


def name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


def imported(paths: list[Path]) -> set[str]:
    """The packages that modules import, whether at their top or inside."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    outside = {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - {"vq4dit"} - IF_THERE
    return {name(IMPORTED_AS.get(package, package)) for package in outside}


def test_requirements_are_the_dependencies_and_both_extras():
    assert lines(ROOT / "requirements.txt") == {*PROJECT["dependencies"], *EXTRAS["cli"], *EXTRAS["app"]}


def test_the_page_is_written_for_the_gradio_that_a_space_brings():
    (version,) = re.findall(r"^sdk_version: (\S+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert f"gradio[oauth]=={version}" in EXTRAS["app"]


def test_every_package_that_is_imported_is_declared():
    package = ROOT / "vq4dit"
    page = [*package.glob("web/*.py"), ROOT / "app.py"]
    library = [path for path in package.rglob("*.py") if path not in page]
    declared = {extra: {name(line) for line in EXTRAS[extra]} for extra in EXTRAS}
    always = {name(line) for line in PROJECT["dependencies"]}
    assert imported(library) - always - declared["cli"] == set()
    assert imported(page) - always - declared["app"] == set()


def test_the_version_is_said_once():
    assert vq4dit.__version__ == VERSION and "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


@pytest.mark.slow
def test_a_wheel_holds_every_module_the_style_the_icon_and_the_mark_of_types(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path, "."]
    subprocess.run(command, cwd=_copy_of_sources(tmp_path / "sources"), check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"vq4dit-{VERSION}-")
    found = {path for path in zipfile.ZipFile(wheel).namelist() if path.startswith("vq4dit/")}
    sources = [path for path in (ROOT / "vq4dit").rglob("*") if path.suffix in (".py", ".css", ".png", ".typed")]
    assert found == {path.relative_to(ROOT).as_posix() for path in sources}


def _copy_of_sources(folder: Path) -> Path:
    """Building leaves folders behind; those of the checkout stay as they are."""
    folder.mkdir()
    for kept in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / kept, folder)
    shutil.copytree(ROOT / "vq4dit", folder / "vq4dit", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    ("program", "missing", "door"),
    [
        (["-m", "vq4dit", "inspect", "x"], "rich", "the command line"),
        (["-m", "vq4dit", "--help"], "torchmetrics", "the command line"),
        (["app.py"], "gradio", "the app"),
    ],
    ids=["rich", "torchmetrics", "gradio"],
)
def test_a_missing_extra_is_one_sentence(tmp_path, program, missing, door):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    finished = subprocess.run([sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stdout == ""
    assert re.fullmatch(
        rf"{door} needs {missing}, which is not installed: pip install .* installs all that it needs\n", finished.stderr
    )


def test_a_mistake_of_ours_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError), of_extra("cli", "the command line"):
        raise ModuleNotFoundError("No module named 'vq4dit.nowhere'", name="vq4dit.nowhere")


def test_a_deprecated_package_of_somebody_else_is_not_spoken_of(tmp_path):
    remark = "The pynvml package is deprecated. Please install nvidia-ml-py instead."
    (tmp_path / "pynvml.py").write_text(f"import warnings\nwarnings.warn({remark!r}, FutureWarning)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    finished = subprocess.run(
        [sys.executable, "-m", "vq4dit", "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0 and finished.stderr == ""
