"""What a program does wrong is said at once, by a `ValueError` that names what was wanted and what was given."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.evaluation.compare import write_comparison
from vq4dit.evaluation.images import SamplePair
from vq4dit.evaluation.metrics import Comparison

COMPARISON = Comparison(*[0.0] * 3, *[1] * 2, *[0.1] * 2, *[1] * 3, 4.0, 0)


@pytest.fixture(scope="module")
def quantized():
    return vq4dit.quantize(new_pipeline(), quick_settings(recipe="kmeans"))


class Number(float):
    def __repr__(self) -> str:
        return f"float('{super().__repr__()}')"


NAN, INF = Number("nan"), Number("inf")
WRONG_SETTINGS = {
    "bits": [[2], 2.0, "2", True, None, 5],
    "seed": ["x", 1.5, None, True, NAN],
    "keep": ["*.ff.*", [1], ("*.ff.*", None)],
    "recipe": ["finest", ["best"], None],
    "calibration": [{"steps": 3}, None, "fast"],
}
WRONG_CONSTANTS = {
    "steps": [NAN, INF, 2.0, "2", 0, None, True],
    "num_candidates": [2.0, [2], 9],
    "rmsprop_alpha": [NAN, INF, "4", None],
    "hardening_end": [NAN, 2.0, "0.5"],
    "logits_learning_rate": [INF, None],
}


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, vq4dit
from vq4dit import CalibrationConfig, Job, QuantizationSettings
from diffusers import DiTPipeline
pipeline = DiTPipeline.from_pretrained(sys.argv[1])
for expression in sys.stdin.read().splitlines():
    try:
        print("nothing was wrong with", eval(expression))
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def told(model_folder: str, expressions: list[str], cwd: Path) -> list[str]:
    """What is raised by each of them. In a process of its own: the type checks of the test run would come first."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, model_folder]
    finished = subprocess.run(
        command, input="\n".join(expressions), capture_output=True, text=True, cwd=cwd, env=environment, check=True
    )
    return finished.stdout.splitlines()


def test_what_is_no_setting_is_told_by_its_name(tmp_path, model_folder):
    wrong = [(name, f"QuantizationSettings({name}={value!r})") for name, values in WRONG_SETTINGS.items() for value in values]
    wrong += [(name, f"CalibrationConfig({name}={value!r})") for name, values in WRONG_CONSTANTS.items() for value in values]
    found = told(model_folder, [expression for _, expression in wrong], tmp_path)
    assert len(found) == len(wrong)
    for (name, expression), line in zip(wrong, found, strict=True):
        assert line.startswith("ValueError") and name in line, f"{expression}: {line}"


def test_settings_of_another_kind_are_refused(tmp_path, model_folder):
    others = ["{'bits': 2}", "'best'", "2", "CalibrationConfig()", "{}", "()"]
    calls = [f"vq4dit.quantize(pipeline, {other})" for other in others]
    calls += [f"Job.open('out.job', {other}, pipeline, resume=False)" for other in others]
    for call, line in zip(calls, told(model_folder, calls, tmp_path), strict=True):
        assert line.startswith("ValueError settings must be QuantizationSettings"), f"{call}: {line}"
    assert not list(tmp_path.iterdir())


def test_numbers_and_lists_of_other_kinds_are_taken_for_what_they_are(tmp_path, model_folder):
    calls = [
        "QuantizationSettings(bits=__import__('numpy').int64(3), keep=['*.ff.*'], seed=True + 3) "
        "== QuantizationSettings(bits=3, keep=('*.ff.*',), seed=4)",
        "hash(QuantizationSettings(keep=['*.ff.*'])) == hash(QuantizationSettings(keep=('*.ff.*',)))",
        "type(CalibrationConfig(rmsprop_alpha=1).rmsprop_alpha) is float",
    ]
    assert told(model_folder, calls, tmp_path) == ["nothing was wrong with True"] * 3


@pytest.mark.parametrize("what", [None, "out", torch.nn.Linear(2, 2)], ids=["None", "text", "linear"])
def test_a_job_is_of_a_pipeline(tmp_path, what):
    with pytest.raises(ValueError, match="a pipeline with a transformer is wanted, got a"):
        vq4dit.Job.open(tmp_path / "out.job", quick_settings(), what, resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["transformer", "nothing", "text"])
def test_only_pipelines_are_saved(tmp_path, quantized, what):
    given = {"transformer": quantized.transformer, "nothing": None, "text": "emoji-2bit"}[what]
    with pytest.raises(ValueError, match="a quantized pipeline is wanted"):
        vq4dit.save(given, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["never quantized", "dequantized"])
def test_only_quantized_pipelines_are_saved(tmp_path, pipeline, how):
    if how == "dequantized":
        pipeline = vq4dit.dequantize(vq4dit.quantize(pipeline, quick_settings(recipe="kmeans")))
    with pytest.raises(ValueError, match="nothing in this pipeline is quantized.*save_pretrained"):
        vq4dit.save(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["missing", "a file", "facebook/DiT-XL-2-256"])
def test_a_source_is_a_folder(tmp_path, quantized, source):
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(ValueError, match="source must be the folder of the original"):
        vq4dit.save(quantized, tmp_path / "out", source=source if "/" in source else tmp_path / source)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_folders_may_be_text_and_begin_at_home(tmp_path, quantized, model_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    vq4dit.save(quantized, "~/models/out", scratch="~/scratch", source=model_folder)
    assert (tmp_path / "models" / "out" / "model_index.json").exists() and not Path("~").exists()
    image = np.zeros((8, 8, 3))
    write_comparison("~/compared", COMPARISON, [SamplePair(0, 0, image, image)], {0: "cat"})
    assert (tmp_path / "compared" / "report.json").exists()
    vq4dit.Job.open("~/out.job", quick_settings(), new_pipeline(), resume=False).close()
    assert (tmp_path / "out.job" / "job.json").exists() and not Path("~").exists()
