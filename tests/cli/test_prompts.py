"""The commands on pipelines of prompts: what is drawn, what a packed model remembers, and how films are shown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import build

from vq4dit.cli import compare as comparing
from vq4dit.cli import quantize as quantizing
from vq4dit.cli import sample as sampling
from vq4dit.cli.main import main
from vq4dit.evaluation.compare import write_comparison
from vq4dit.evaluation.images import SamplePair, image_bytes
from vq4dit.evaluation.metrics import Comparison
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.provenance import read_origin, recorded_call, write_origin

CALL = {"guidance_scale": 3.0, "height": 32, "width": 32}
TOLD = ["--call", "height=32", "--call", "width=32", "--guidance", "3"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def failure(capsys, *arguments: object) -> str:
    assert run(*arguments) == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "flux"
    build("flux").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, flux) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "flux"
    call = ["--call", "guidance_scale=3", "--call", "height=32", "--call", "width=32"]
    assert run("quantize", flux, "--recipe", "kmeans", *call, "--output", folder) == 0
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("film") / "ltx"
    build("ltx").save_pretrained(folder)
    return folder


@pytest.fixture
def heard(monkeypatch):
    """What the pipelines of `sample` and `compare` are asked for; nothing is drawn."""
    asked: list[dict] = []

    def draw(pipeline, conditions, seeds, **told):
        asked.append({"conditions": conditions, **told})
        return np.zeros((len(conditions), 8, 8, 3), dtype=np.float32)

    def measure(original, quantized, *sizes, **told):
        asked.append(told)
        pair = SamplePair(told["conditions"][0], 0, *np.zeros((2, 12, 12, 3), dtype=np.float32))
        return Comparison(0.1, 30.0, 0.9, 100, 10, 1.0, 1.0, 1, 1, 1, 3.0, 0), [pair]

    monkeypatch.setattr(sampling, "sample", draw)
    monkeypatch.setattr(comparing, "compare", measure)
    return asked


def sample(model, output, *more: object) -> list[object]:
    return ["sample", model, "--steps", 1, "--output", output, *more]


def compare(original, quantized, output, *more: object) -> list[object]:
    return ["compare", original, quantized, "--steps", 1, "--output", output, *more]


def test_the_whole_way_from_prompts_to_a_report(tmp_path, flux, capsys):
    (tmp_path / "prompts.txt").write_text("a red apple\n# not this\na blue car\n")
    made = ["quantize", flux, "--prompts", tmp_path / "prompts.txt", *TOLD[:4], "--call", "guidance_scale=3"]
    quick = ["--recipe", "paper", "--steps", 2, "--trajectories", 1, "--keep", "single*", "--keep", "transformer_blocks.1.*"]
    assert run(*made, *quick, "--output", tmp_path / "q") == 0
    settings = read_origin(tmp_path / "q").settings
    assert settings["call"] == CALL and len(settings["prompts"]) == 2
    assert not any(b"red apple" in path.read_bytes() for path in (tmp_path / "q").rglob("*") if path.is_file())  # they are mine
    assert run(*sample(tmp_path / "q", tmp_path / "a.png", "--prompts", tmp_path / "prompts.txt")) == 0
    assert Image.open(tmp_path / "a.png").size == (2 * 32 + 2, 32) and not (tmp_path / "a.webp").exists()
    capsys.readouterr()
    assert run(*compare(flux, tmp_path / "q", tmp_path / "c", "--prompt", "a cat", "--prompt", "../a b?", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["noise_nmse"] < 1 and report["num_pairs"] == 2 and report["guidance_scale"] == 3
    assert report["call"] == {"height": 32, "width": 32}
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert {"a-cat-seed0-original.png", "a-b-seed1-difference.png"} <= names and len(names) == 3 + 2 * 3


@pytest.mark.parametrize("command", ["sample", "compare"])
def test_classes_asked_of_a_pipeline_of_prompts_are_refused_with_what_it_wants(tmp_path, flux, capsys, command):
    models = [flux] * (2 if command == "compare" else 1)
    said = failure(capsys, command, *models, "--labels", "cat", "--output", tmp_path / "x.png")
    assert "FluxPipeline draws from prompts, not from classes: say --prompt TEXT or --prompts FILE instead" in said


@pytest.mark.parametrize("command", ["sample", "compare", "quantize"])
def test_prompts_given_to_a_pipeline_of_classes_are_refused_with_what_it_wants(tmp_path, model_folder, capsys, command):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    models = [model_folder] * (2 if command == "compare" else 1)
    said = failure(capsys, command, *models, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "x.png")
    assert "DiTPipeline draws from classes, not from prompts: say --labels A,B" in said
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_prompts_that_the_recipe_would_not_heed_are_refused(tmp_path, flux, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    made = ["quantize", flux, "--recipe", "kmeans", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "q"]
    assert "the recipe kmeans calibrates nothing" in failure(capsys, *made)


def test_an_argument_that_the_pipeline_does_not_take_is_told_before_the_work(tmp_path, flux, capsys, monkeypatch):
    monkeypatch.setattr(quantizing, "run", lambda *_, **__: pytest.fail("the work began"))
    told = ["--call", "cfg=3", "--output"]
    for command in (
        ["quantize", flux, "--recipe", "kmeans", *told, tmp_path / "q"],
        ["quantize", flux, *told, tmp_path / "q"],
        ["sample", flux, "--prompt", "cat", *told, tmp_path / "a.png"],
        ["compare", flux, flux, *told, tmp_path / "c"],
    ):
        assert "FluxPipeline takes no argument 'cfg'; it takes prompt, " in failure(capsys, *command)
    assert not list(tmp_path.iterdir())


# --- what a packed model remembers ---


def test_a_packed_model_is_drawn_with_what_it_was_calibrated_with(tmp_path, packed, heard):
    assert recorded_call(str(packed)) == CALL
    assert run(*sample(packed, tmp_path / "a.png", "--prompt", "cat")) == 0
    assert heard[-1]["call"] == CALL and heard[-1]["conditions"] == ["cat"]
    assert run(*sample(packed, tmp_path / "a.png", "--prompt", "cat", "--guidance", 7, "--call", "height=64")) == 0
    assert heard[-1]["call"] == CALL | {"guidance_scale": 7.0, "height": 64}


def test_an_original_is_drawn_as_its_pipeline_does_by_default(tmp_path, flux, heard):
    assert run(*sample(flux, tmp_path / "a.png", "--prompt", "cat")) == 0 and heard[-1]["call"] == {}


def test_of_two_models_the_quantized_one_says_how_both_are_drawn(tmp_path, flux, packed, heard):
    assert run(*compare(flux, packed, tmp_path / "c")) == 0
    assert heard[-1]["call"] == CALL and heard[-1]["conditions"] == list(HELD_OUT[:8]) and heard[-1]["prompts"] == HELD_OUT


def test_the_error_is_measured_on_the_prompts_that_were_given(tmp_path, flux, packed, heard):
    assert run(*compare(flux, packed, tmp_path / "c", "--prompt", "cat")) == 0
    assert heard[-1]["conditions"] == heard[-1]["prompts"] == ["cat"]


def test_a_record_of_an_earlier_version_or_none_at_all_says_nothing(tmp_path, quantized_folder):
    old = shutil.copytree(quantized_folder, tmp_path / "old")
    record = json.loads((old / "vq4dit.json").read_text())
    del record["settings"]["call"]
    (old / "vq4dit.json").write_text(json.dumps(record))
    assert recorded_call(str(old)) == {}
    (old / "vq4dit.json").unlink()
    assert recorded_call(str(old)) == {} == recorded_call("nobody/no-such-dit")


@pytest.mark.parametrize(
    "call", [[], "x", {"prompt": "cat"}, {"sigmas": [1]}, {"a b": 1}, {"generator": 1}, {"scale": float("inf")}], ids=repr
)
def test_a_strangers_record_of_what_no_call_can_be_told_is_refused(tmp_path, packed, capsys, call):
    strange = shutil.copytree(packed, tmp_path / "strange")
    record = json.loads((strange / "vq4dit.json").read_text())
    record["settings"]["call"] = call
    (strange / "vq4dit.json").write_text(json.dumps(record))
    if call == []:  # no arguments, whichever way that is written
        assert recorded_call(str(strange)) == {}
        return
    said = failure(capsys, *sample(strange, tmp_path / "a.png", "--prompt", "cat"))
    assert "vq4dit.json is damaged (call " in said and not (tmp_path / "a.png").exists()


def test_a_recorded_argument_that_the_pipeline_does_not_take_is_refused(tmp_path, packed, capsys):
    strange = shutil.copytree(packed, tmp_path / "strange")
    origin = read_origin(strange)
    origin.settings["call"] = {"cfg": 3}
    write_origin(strange, origin)
    assert "takes no argument 'cfg'" in failure(capsys, *sample(strange, tmp_path / "a.png", "--prompt", "cat"))


# --- films and names ---

SMALL = ["--call", "height=32", "--call", "width=32", "--call", "num_frames=9"]


def test_a_film_is_a_strip_and_moves_in_a_preview(tmp_path, film):
    asked = [*sample(film, tmp_path / "a.png", *SMALL), "--prompt", "a cat", "--prompt", "a dog"]
    assert run(*asked) == 0 and run(*asked, "--seed", 1) == 0
    assert Image.open(tmp_path / "a.png").size == (8 * 32 + 7 * 2, 2 * 32 + 2)
    with Image.open(tmp_path / "a.webp") as preview:
        assert preview.size == (2 * 32 + 2, 32) and preview.n_frames == 9
    assert run(*compare(film, film, tmp_path / "c", *SMALL, "--prompt", "cat")) == 0
    assert run(*compare(film, film, tmp_path / "c", *SMALL, "--prompt", "cat", "--overwrite")) == 0
    assert {path.name for path in (tmp_path / "c").glob("pairs.*")} == {"pairs.png", "pairs.webp"}
    assert Image.open(tmp_path / "c" / "pairs.png").size == (8 * 32 + 7 * 2, 3 * 32 + 2 * 2)


def altered(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"mine"),
        lambda path: path.write_bytes(altered(path.read_bytes())),
        lambda path: path.write_bytes(path.read_bytes() + b"mine"),
        lambda path: Image.open(path).save(path, save_all=True),
        lambda path: path.rename(path.with_name("b.webp")),
    ],
    ids=["empty", "another", "a flipped bit", "something behind it", "saved again", "another name"],
)
def test_a_preview_that_somebody_changed_is_not_replaced(tmp_path, film, capsys, change):
    asked = [*SMALL, "--prompt", "a cat"]
    assert run(*sample(film, tmp_path / "a.png", *asked)) == 0
    change(tmp_path / "a.webp")
    (theirs,) = tmp_path.glob("*.webp")
    before = theirs.read_bytes()
    said = failure(capsys, *sample(film, theirs.with_suffix(".png"), *asked))
    assert f"{theirs} is there already and was not drawn by `sample`" in said and theirs.read_bytes() == before


FIGURES = Comparison(0.1, 30.0, 0.9, 100, 10, 1.0, 1.0, 1, 1, 1, 0.0, 0)


def test_pairs_that_would_get_the_same_name_get_a_number(tmp_path):
    image = np.zeros((12, 12, 3), dtype=np.float32)
    prompts = ["a cat", "A cat!", "a cat", "!!!", "../..", "x" * 300, "x" * 301]
    write_comparison(tmp_path / "c", FIGURES, [SamplePair(prompt, 0, image, image) for prompt in prompts], {})
    names = {path.name.removesuffix("-original.png") for path in (tmp_path / "c").glob("*-original.png")}
    assert names >= {"a-cat-seed0", "A-cat-seed0-1", "a-cat-seed0-2", "prompt-seed0", "prompt-seed0-4"}
    assert len({name.casefold() for name in names}) == len(prompts)
    assert all(len(name) < 150 for name in names)


@pytest.mark.parametrize(("name", "most"), [("flux", 32), ("ltx", 32), ("pixart-sigma", 16), ("latte", 32)])
def test_a_picture_takes_no_more_than_was_expected(name, most):
    pipeline = build(name)
    told = {"height": most, "width": most}
    assert image_bytes(pipeline, told) >= 3 * most**2 and image_bytes(pipeline) > 1000
