"""`vq4dit.__all__` is the promise: sorted, complete, documented."""

import inspect
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import requires
from pathlib import Path

import pytest

import vq4dit

ROOT = Path(__file__).parents[1]


def test_public_names_are_sorted_and_listed_once():
    assert vq4dit.__all__ == sorted(set(vq4dit.__all__))


def test_public_names_are_all_there_is():
    public = {name for name, value in vars(vq4dit).items() if name[0] != "_" and not isinstance(value, types.ModuleType)}
    assert set(vq4dit.__all__) == public


@pytest.mark.parametrize("name", vq4dit.__all__)
def test_public_names_have_a_docstring_of_their_own(name):
    value = getattr(vq4dit, name)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and doc.strip()
    assert not doc.startswith(f"{name}("), "this is what dataclass writes where there is none"


def package_names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements if "extra ==" not in line)
    return {match[0].lower().replace("-", "_") for match in found if match}


def test_loading_and_sampling_need_no_more_than_the_packages_pip_installs(quantized_folder):
    """pyproject.toml's dependencies and what they bring; whatever else requirements.txt has is for terminal and app."""
    declared = package_names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    brought = set().union(*(package_names(requires(name) or []) for name in declared))
    blocked = package_names((ROOT / "requirements.txt").read_text().splitlines()) - declared - brought
    assert {"gradio", "rich", "torchmetrics", "transformers"} <= blocked  # they have the name they are imported by; others too
    blocked |= {"peft"}  # which diffusers imports where it is installed, and which imports transformers
    program = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(blocked)!r}))  # importing them fails
import torch, vq4dit
from diffusers import DiTPipeline
pipeline = DiTPipeline.from_pretrained({str(quantized_folder)!r})
images = pipeline([0], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
print(images.shape)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.strip() == "(1, 8, 8, 3)", finished.stderr
