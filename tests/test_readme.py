"""What README and the other documents show is what there is."""

import ast
import re
from pathlib import Path

import pytest

import vq4dit
from vq4dit.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PLACES = ["*.md", "vq4dit/**/*.md", "tests/**/*.md", "assets/*/*.md"]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for place in PLACES for path in ROOT.glob(place)
}
README, LIBRARY = DOCUMENTS["README.md"], DOCUMENTS["vq4dit/pipelines/README.md"]
COMMAND = re.compile(r"python -m vq4dit ((?:quantize|inspect|sample|compare|push) [^`\n]*)")
every_document = pytest.mark.parametrize("name", sorted(DOCUMENTS))


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def headings(text: str) -> set[str]:
    """The anchors of a document."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def with_tiny_models(code: str, model: str) -> str:
    """A snippet on the tests' model, with as little work as there can be."""
    small = {"assets/emoji-dit": model, "rocket": "fox", "num_inference_steps=25": "num_inference_steps=2"}
    for shown, tiny in {**small, "bits=2": 'bits=2, recipe="kmeans"'}.items():
        code = code.replace(shown, tiny)
    return code


@pytest.mark.parametrize("snippet", [*snippets(README), *snippets(LIBRARY)])
def test_snippets_compile_and_use_public_names_only(snippet):
    names = re.findall(r"vq4dit\.(\w+)", snippet)
    ast.parse(snippet)
    assert set(names) <= set(vq4dit.__all__)


def test_the_loading_snippet_runs(quantized_folder, model_folder, monkeypatch, tmp_path):
    (snippet,) = snippets(README)
    (tmp_path / "emoji-2bit").symlink_to(quantized_folder)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(with_tiny_models(snippet, model_folder), variables)
    assert variables["image"].size == (8, 8) and len(snippet.strip().splitlines()) == 5


def test_the_snippets_of_the_library_run_one_after_the_other(model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    for snippet in snippets(LIBRARY):
        exec(with_tiny_models(snippet, model_folder), variables)
    assert (tmp_path / "emoji-2bit" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert variables["image"].size == (8, 8)
    assert not any(isinstance(module, vq4dit.VQLinear) for module in variables["ordinary"].transformer.modules())


def test_the_front_page_is_a_page_and_begins_with_the_settings_of_the_space():
    assert README.startswith("---\ntitle: vq4dit\n") and len(README.splitlines()) <= 150


def test_the_two_commands_for_a_fresh_checkout_are_a_line_each():
    first = "python3 -m venv .venv && . .venv/bin/activate && pip install -r "
    quantize = "requirements.txt && python -m vq4dit quantize assets/emoji-dit --bits 2 --output emoji-2bit"
    lines = README.splitlines()
    assert first + quantize in lines
    assert next(line for line in lines if "python -m pytest" in line) == f"{first}tests/requirements.txt && python -m pytest"


@pytest.mark.parametrize("line", sorted({line for text in DOCUMENTS.values() for line in COMMAND.findall(text)}))
def test_every_command_shown_parses(line):
    build_parser().parse_args(line.split())


def test_every_command_is_shown():
    assert {line.split()[0] for line in COMMAND.findall(DOCUMENTS["vq4dit/cli/README.md"])} == {
        "inspect",
        "quantize",
        "sample",
        "compare",
        "push",
    }


@every_document
def test_pictures_and_links_exist(name):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", DOCUMENTS[name]):
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        assert not anchor or anchor in headings(found.read_text(encoding="utf-8")), target


@every_document
def test_files_named_in_a_document_exist(name):
    for path in re.findall(r"`((?:vq4dit|tests|assets)/[\w/.-]+\.\w+)`", DOCUMENTS[name]):
        assert (ROOT / path).exists(), path
