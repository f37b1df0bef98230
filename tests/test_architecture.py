"""The import graph points one way, from package to package and from module to module, and the library never prints."""

import ast
import builtins
import dis
import graphlib
import importlib
import inspect
import types
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vq4dit"
ORDER = "leaves < disk < kernels < layers < models < pipelines < recipes < evaluation < hub < cli, projects < web"
HEIGHT = {name: height for height, names in enumerate(ORDER.split(" < ")) for name in names.split(", ")}

FORMER = {"inspection", "loading"}  # scripts of the time before the packages import these; nothing of ours does
SOURCES = sorted(path for path in PACKAGE.rglob("[!_]*.py") if path.stem not in FORMER)


def module_name(path: Path) -> str:
    """ "layers", or "web.page" in a sub-package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in SOURCES}
every_module = pytest.mark.parametrize("source", SOURCES, ids=module_name)


def package(module: str) -> str:
    """ "layers" of "layers.codebook"; what stands beside the packages is a leaf."""
    return module.partition(".")[0] if "." in module else "leaves"


def internal_imports(source: str) -> set[str]:
    """The modules named by `from vq4dit.module import name` and `from vq4dit.package import module`."""
    nodes = ast.walk(ast.parse(source))
    found = (n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vq4dit."))
    named = {f"{n.module}.{alias.name}".split(".", 1)[1] for n in found for alias in n.names}
    return {name if name in MODULES else name.rpartition(".")[0] for name in named}


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


@every_module
def test_imports_point_down(source):
    here = package(module_name(source))
    others = {name for name in internal_imports(source.read_text()) if package(name) != here}
    not_below = {name for name in others if HEIGHT[package(name)] >= HEIGHT[here]}
    assert not not_below, f"{module_name(source)} may not import from {sorted(not_below)}: {ORDER}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: internal_imports(path.read_text()) for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("graph", [{"a": {"b"}, "b": {"a"}}])
def test_a_circle_is_noticed(graph):
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())


@every_module
def test_the_package_imports_itself_in_one_form_only(source):
    assert forbidden_imports(source.read_text()) == []


def global_names(code: types.CodeType) -> set[str]:
    """All that is looked up in the module or among the builtins, by functions in functions too."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def functions_of(module: types.ModuleType) -> list[types.CodeType]:
    code = compile(Path(str(module.__file__)).read_text(), str(module.__file__), "exec", dont_inherit=True)
    bodies = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [f for f in bodies if f.co_flags & inspect.CO_OPTIMIZED] + [
        f for body in bodies for f in body.co_consts if isinstance(f, types.CodeType) and f.co_flags & inspect.CO_OPTIMIZED
    ]


@every_module
def test_functions_look_up_only_names_that_are_there(source):
    """A linter cannot tell: the shapes in annotations are strings, which look to it like names that are missing."""
    module = importlib.import_module(f"vq4dit.{module_name(source)}")
    known = {*vars(module), *dir(builtins)}
    assert {name for code in functions_of(module) for name in global_names(code)} <= known


@pytest.mark.parametrize("source", [path for path in SOURCES if package(module_name(path)) != "cli"], ids=module_name)
def test_the_library_never_prints(source):
    assert prints(source.read_text()) == []


def text_of_unsaid_encoding(source: str) -> list[int]:
    """Line numbers where a text file is read or written in whatever encoding the system prefers: not UTF-8 on Windows."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        named = {keyword.arg for keyword in call.keywords}
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
            of_a_distribution = call.func.attr == "read_text" and call.args
            found += [] if of_a_distribution or "encoding" in named else [call.lineno]
        elif isinstance(call.func, ast.Name) and call.func.id == "open":
            mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "'r'"
            found += [] if "b" in mode or "encoding" in named else [call.lineno]
    return found


@every_module
def test_text_is_utf_8_on_every_system(source):
    assert text_of_unsaid_encoding(source.read_text()) == []


def test_text_of_unsaid_encoding_is_noticed():
    lines = [
        "path.read_text()",
        "path.write_text(text)",
        "open(path)",
        "open(path, 'a')",
        "open(path, 'rb')",
        "d.read_text('x')",
    ]
    assert text_of_unsaid_encoding("\n".join(lines)) == [1, 2, 3, 4]
    assert text_of_unsaid_encoding("path.read_text(encoding='utf-8')\nopen(path, 'a', encoding='utf-8')") == []


@pytest.mark.parametrize(
    "line",
    ["import vq4dit", "import vq4dit.models.blocks as d", "from vq4dit import dit", "from . import dit", "from .dit import x"],
)
def test_other_forms_of_import_are_noticed(line):
    assert forbidden_imports(f"def f():\n    {line}") == [line]


def test_the_one_form_of_import_is_seen_wherever_it_stands():
    assert internal_imports("from vq4dit.models.blocks import a\ndef f():\n    from vq4dit.disk.job import b") == {
        "models.blocks",
        "disk.job",
    }
    assert forbidden_imports("from vq4dit.models.blocks import a\nimport torch\nfrom torch import nn") == []
    assert prints("console.print(1)\nfingerprint(2)\nprint(3)") == [3]
