"""The import graph points one way: a module imports only from modules on lower rungs, and the library never prints."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vq4dit"
LADDER = [
    {"codebook", "packing", "errors", "progress"},  # no torch.nn, no diffusers
    {"config", "kmeans"},  # the settings; one codebook
    {"layers", "dit", "job"},  # one layer's states; which layers, which blocks; work on disk
    {"zero_data", "diffusers_quantizer", "loading"},  # what to learn from; save and load
    {"calibration", "inspection"},  # learn; what would become of a model
    {"quantization"},  # the recipe
    {"evaluation"},  # look at the result
    {"cli"},  # the door in the terminal
]
RUNG = {name: height for height, names in enumerate(LADDER) for name in names}
DOORS = {"cli"}  # may print

SOURCES = sorted(PACKAGE.glob("[!_]*.py"))
every_module = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def internal_imports(source: str) -> set[str]:
    """The modules named by `from vq4dit.module import name`."""
    nodes = ast.walk(ast.parse(source))
    return {n.module.split(".")[1] for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vq4dit.")}


def forbidden_imports(source: str) -> list[str]:
    """Imports of the package in any other form, which `internal_imports` would not see."""
    found = []
    for node in ast.walk(ast.parse(source)):
        relative = isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module == "vq4dit")
        whole = isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vq4dit" for alias in node.names)
        if relative or whole:
            found.append(ast.unparse(node))
    return found


def prints(source: str) -> list[int]:
    """Line numbers of calls of print()."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_every_module_stands_on_exactly_one_rung():
    found = {path.stem for path in PACKAGE.glob("[!_]*") if path.suffix == ".py" or (path / "__init__.py").exists()}
    standing = sorted(name for names in LADDER for name in names)
    assert standing == sorted(found)


@every_module
def test_imports_point_down(source):
    not_below = {name for name in internal_imports(source.read_text()) if RUNG[name] >= RUNG[source.stem]}
    assert not not_below, f"{source.stem} may not import from {sorted(not_below)}"


@every_module
def test_the_package_imports_itself_in_one_form_only(source):
    assert forbidden_imports(source.read_text()) == []


@pytest.mark.parametrize("source", [path for path in SOURCES if path.stem not in DOORS], ids=lambda path: path.stem)
def test_the_library_never_prints(source):
    assert prints(source.read_text()) == []


@pytest.mark.parametrize(
    "line", ["import vq4dit", "import vq4dit.dit as d", "from vq4dit import dit", "from . import dit", "from .dit import x"]
)
def test_other_forms_of_import_are_noticed(line):
    assert forbidden_imports(f"def f():\n    {line}") == [line]


def test_the_one_form_of_import_is_seen_wherever_it_stands():
    assert internal_imports("from vq4dit.dit import a\ndef f():\n    from vq4dit.job import b") == {"dit", "job"}
    assert forbidden_imports("from vq4dit.dit import a\nimport torch\nfrom torch import nn") == []
    assert prints("console.print(1)\nfingerprint(2)\nprint(3)") == [3]
