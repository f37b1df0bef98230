"""The import graph points one way: a module imports only from modules on lower rungs, and the library never prints."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vq4dit"
LADDER = [
    {
        "errors",
        "progress",
        "randomness",
        "locks",
        "extras",
        "version",
        "printable",
        "watched",
        "adapters",
        "surroundings",
        "interrupts",
        "revisions",
        "streams",
    },  # no diffusers
    {"devices", "json_files", "lazy_weight"},  # where the work is done; descriptions of strangers; a weight as others see it
    {"codebook", "packing", "record"},  # what we wrote into a folder
    {
        "files",
        "config",
        "kmeans",
        "hub_errors",
        "quiet",
        "markdown",
        "page_words",
        "terminal",
        "entropy_coding",
        "memory",
        "casts",
        "options",
    },  # settings; one codebook; failures; what may be loaded; what commands share; what is free
    {"folders"},  # whole or not at all
    {
        "bars",
        "held_weight",
        "dit",
        "job",
        "rate_allocation",
        "repository",
    },  # a decoded weight; which layers and blocks; work on disk; where bits go; a pipeline as files
    {"packed_linear"},  # a packed layer
    {
        "layers",
        "coded_layers",
        "origin",
        "pipeline_files",
        "skeleton",
        "trust",
    },  # the two kinds of packed layers; where a model comes from; one without weights
    {"error_feedback", "packed_tensors"},  # its integers; what both have in a file
    {
        "zero_data",
        "diffusers_quantizer",
        "loading",
        "student",
        "saving",
        "soft_layers",
    },  # what learns from what, save and load; a layer's states on its way
    {
        "calibration",
        "layer_by_layer",
        "sensitivity",
        "inspection",
    },  # learn; what would become of a model
    {"best"},  # one recipe, piece by piece
    {"quantization", "catalog", "workspace"},  # the recipe; which models there are; visitors' folders
    {
        "evaluation",
        "attribution",
        "estimate",
        "loader",
        "archive",
    },  # look at the result; what it will cost; pipelines in memory; one file
    {"model_card", "lease", "comparisons"},  # tell what it is; work for a while; pictures and figures as files
    {"account", "pairs", "uploading", "staging"},  # who is signed in; pictures one by one; one file to the Hub; what goes there
    {"hub"},  # give it away
    {
        "cli_push",
        "cli_compare",
        "cli_inspect",
        "publishing",
    },  # commands of the terminal; a visitor's project on its way to the Hub
    {"cli"},  # the door in the terminal
    {"web.words", "web.theme", "web.gpu", "web.gate"},  # the door in the browser: words, looks, lent GPUs, who may knock
    {"web.parts", "web.studio"},  # pieces of HTML; the library as the page needs it
    {"web.pictures", "web.push_parts"},  # comparisons; what is said of publishing
    {"web.answers", "web.push_answers"},  # event handlers
    {"web.push_panel", "web.compare_answers"},  # sign in and publish; event handlers of the comparison
    {"web.page"},  # layout and wiring
]
RUNG = {name: height for height, names in enumerate(LADDER) for name in names}
DOORS = {"cli", "cli_push", "cli_compare", "cli_inspect"}  # may print

SOURCES = sorted(PACKAGE.rglob("[!_]*.py"))


def module_name(path: Path) -> str:
    """ "layers", or "web.page" in a sub-package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


every_module = pytest.mark.parametrize("source", SOURCES, ids=module_name)


def internal_imports(source: str) -> set[str]:
    """The modules named by `from vq4dit.module import name`."""
    nodes = ast.walk(ast.parse(source))
    found = (n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vq4dit."))
    named = {f"{n.module}.{alias.name}".split(".", 1)[1] for n in found for alias in n.names}
    return {max((m for m in RUNG if f"{name}.".startswith(f"{m}.")), key=len, default=name) for name in named}


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
    standing = sorted(name for names in LADDER for name in names)
    assert standing == sorted(module_name(path) for path in SOURCES)


@every_module
def test_imports_point_down(source):
    rung = RUNG[module_name(source)]
    not_below = {name for name in internal_imports(source.read_text()) if RUNG[name] >= rung}
    assert not not_below, f"{module_name(source)} may not import from {sorted(not_below)}"


@every_module
def test_the_package_imports_itself_in_one_form_only(source):
    assert forbidden_imports(source.read_text()) == []


@pytest.mark.parametrize("source", [path for path in SOURCES if path.stem not in DOORS], ids=module_name)
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
    "line", ["import vq4dit", "import vq4dit.dit as d", "from vq4dit import dit", "from . import dit", "from .dit import x"]
)
def test_other_forms_of_import_are_noticed(line):
    assert forbidden_imports(f"def f():\n    {line}") == [line]


def test_the_one_form_of_import_is_seen_wherever_it_stands():
    assert internal_imports("from vq4dit.dit import a\ndef f():\n    from vq4dit.job import b") == {"dit", "job"}
    assert forbidden_imports("from vq4dit.dit import a\nimport torch\nfrom torch import nn") == []
    assert prints("console.print(1)\nfingerprint(2)\nprint(3)") == [3]
