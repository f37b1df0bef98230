"""What README shows is what there is."""

import ast
import re
from pathlib import Path

import pytest

import vq4dit
from vq4dit.cli.main import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_compile_and_use_public_names_only(snippet):
    names = re.findall(r"vq4dit\.(\w+)", snippet)
    ast.parse(snippet)
    assert set(names) <= set(vq4dit.__all__)


def test_the_loading_snippet_runs(quantized_folder, monkeypatch, tmp_path):
    snippet = next(s for s in SNIPPETS if 'from_pretrained("emoji-2bit")' in s)
    (tmp_path / "emoji-2bit").symlink_to(quantized_folder)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(snippet.replace("rocket", "fox").replace("num_inference_steps=25", "num_inference_steps=2"), variables)
    assert variables["image"].size == (8, 8)


def test_the_quantizing_snippet_runs(model_folder, monkeypatch, tmp_path):
    snippet = next(s for s in SNIPPETS if "vq4dit.quantize(" in s)
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("assets/emoji-dit", model_folder).replace("bits=2", 'bits=2, recipe="kmeans"'), {})
    assert (tmp_path / "emoji-2bit" / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_every_command_in_readme_parses():
    lines = re.findall(r"python -m vq4dit ((?:quantize|inspect|sample|compare|push) [^`\n]*)", README)
    assert len(lines) >= 5
    for line in lines:
        build_parser().parse_args(line.split())


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
