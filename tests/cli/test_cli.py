"""The commands as a new user types them, and everything they can get wrong."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import new_pipeline, new_transformer

from vq4dit import CalibrationConfig, Job, QuantizationSettings
from vq4dit.cli import sample as sampling
from vq4dit.cli.main import build_parser, main
from vq4dit.cli.quantize import settings_of
from vq4dit.disk import folders
from vq4dit.evaluation import compare as comparisons


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def failure(capsys, *arguments: object) -> str:
    """What a failing command says on standard error."""
    assert run(*arguments) == 1
    return " ".join(capsys.readouterr().err.split())


def quick(model, output, *more: object) -> list[object]:
    return ["quantize", model, "--output", output, "--recipe", "paper", "--steps", 3, *more]


@pytest.fixture(autouse=True)
def loading_bars_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_the_whole_way_from_a_model_to_a_report(tmp_path, model_folder, capsys):
    assert run("inspect", model_folder, "--recipe", "paper", "--json") == 0
    predicted = json.loads(capsys.readouterr().out)
    assert run(*quick(model_folder, tmp_path / "q", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 14 and 0 < report["layers"][0]["relative_error"] < 0.2
    assert report["transformer_bytes"] < report["original_bytes"] / 4
    assert report["transformer_bytes"] == pytest.approx(predicted["predictions"][0]["file_bytes"], rel=0.01)
    assert not (tmp_path / "q.job").exists()
    assert run("sample", tmp_path / "q", "--labels", "cat, 2", "--steps", 2, "--output", tmp_path / "grid.png") == 0
    assert Image.open(tmp_path / "grid.png").size == (18, 8)
    capsys.readouterr()
    assert run("compare", model_folder, tmp_path / "q", "--steps", 2, "--output", tmp_path / "cmp", "--layers", "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "cmp" / "report.json").read_text()) == compared
    assert 0 < compared["noise_nmse"] < 1 and compared["num_pairs"] == 3
    parts = json.loads((tmp_path / "cmp" / "layers.json").read_text())
    assert list(parts) == [layer["name"] for layer in report["layers"]] and all(0 < part < 1 for part in parts.values())
    names = {path.name for path in (tmp_path / "cmp").iterdir()}
    assert {"pairs.png", "cat-seed0-original.png", "dog-seed1-quantized.png", "fox-seed2-difference.png"} <= names


def test_tables_are_printed_for_people(tmp_path, model_folder, capsys):
    assert run("inspect", model_folder) == 0
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    assert run("compare", model_folder, tmp_path / "q", "--steps", 1, "--output", tmp_path / "c", "--layers") == 0
    shown = capsys.readouterr().out
    columns = ("relative error", "noise_nmse of it alone", "of the sum of all")
    for words in ("16 bit: embedder", "transformer_blocks.1.ff.net.2", "smaller", "noise_nmse", *columns):
        assert words in shown


def test_a_quantized_model_compared_with_another_original_is_refused_before_anything_is_drawn(tmp_path, model_folder, capsys):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    other = new_pipeline()
    other.register_modules(transformer=new_transformer(num_layers=1))
    other.save_pretrained(tmp_path / "other")
    assert run("compare", tmp_path / "other", tmp_path / "q", "--output", tmp_path / "c") == 1
    assert "compare it with the model it was made from" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c").exists()


def test_a_quantized_model_compared_with_itself_has_no_layer_to_blame(tmp_path, model_folder, capsys):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    assert run("compare", tmp_path / "q", tmp_path / "q", "--steps", 1, "--output", tmp_path / "c", "--layers") == 0
    assert "0.0%" in capsys.readouterr().out


def test_a_model_compared_with_itself_has_no_error(tmp_path, model_folder, capsys):
    assert run("compare", model_folder, model_folder, "--steps", 1, "--output", tmp_path / "c", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["noise_nmse"] == 0 and report["ssim"] == pytest.approx(1) and report["psnr_db"] > 100


@pytest.mark.parametrize("command", [[], ["inspect"], ["quantize"], ["sample"], ["compare"], ["push"]], ids=str)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*command, "--help")
    assert stopped.value.code == 0 and "usage: python -m vq4dit" in capsys.readouterr().out


# --- bad input ---


def test_bits_5_is_wrong_usage(model_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("quantize", model_folder, "--output", "x", "--bits", 5)
    assert stopped.value.code == 2 and "invalid choice: 5" in capsys.readouterr().err


def test_a_missing_folder_is_told(tmp_path, capsys):
    said = failure(capsys, "inspect", tmp_path / "nowhere")
    assert "there is no folder" in said and "check the path" in said


def test_a_hub_id_without_network_is_told(tmp_path, capsys):
    said = failure(capsys, "quantize", "nobody/no-such-dit", "--output", tmp_path / "q")
    assert "the Hugging Face Hub cannot be reached" in said and "nobody/no-such-dit" in said


def test_a_folder_that_is_no_pipeline_is_told(tmp_path, capsys):
    said = failure(capsys, "inspect", tmp_path)
    assert "no model_index.json" in said and "DiT-XL-2-256" in said


def test_a_unet_pipeline_is_refused_by_name(tmp_path, capsys):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = failure(capsys, "quantize", tmp_path, "--output", tmp_path / "q")
    assert "StableDiffusionPipeline with a UNet" in said and "vq4dit quantizes pipelines with a diffusion transformer" in said


def test_a_quantized_model_is_refused(tmp_path, quantized_folder, capsys):
    said = failure(capsys, "quantize", quantized_folder, "--output", tmp_path / "q")
    assert "quantized already (vq4dit): start from the original model" in said


def test_a_full_output_folder_is_refused_before_any_work(tmp_path, model_folder, capsys):
    (tmp_path / "file").write_text("mine")
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path)
    assert "is not empty" in said and "--overwrite" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_overwrite_replaces_a_result_of_ours(tmp_path, model_folder):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    assert run(*quick(model_folder, tmp_path / "q", "--overwrite", "--bits", 3)) == 0
    assert json.loads((tmp_path / "q" / "vq4dit.json").read_text())["settings"]["bits"] == 3


@pytest.mark.parametrize("theirs", ["precious.txt", "model_index.json"])
def test_a_folder_that_is_no_result_is_never_replaced(tmp_path, model_folder, capsys, theirs):
    (tmp_path / theirs).write_text("{}")
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path, "--overwrite")
    assert "none of our results" in said and [path.name for path in tmp_path.iterdir()] == [theirs]


@pytest.mark.parametrize("model", ["q.job", "q.job/model", "q.job/layers"])
def test_a_model_in_the_folder_of_the_job_is_refused_and_stays(tmp_path, model_folder, capsys, model):
    shutil.copytree(model_folder, tmp_path / model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = failure(capsys, *quick(tmp_path / model, tmp_path / "q"))
    assert "q.job is no job of ours" in said and "move it away, or choose another output" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("beside", ["nothing", "an empty job folder", "a user's folder", "a job"])
def test_resume_does_not_replace_the_finished_result_of_another_model(tmp_path, model_folder, capsys, beside):
    new_pipeline(num_layers=1).save_pretrained(tmp_path / "other")
    assert run(*quick(tmp_path / "other", tmp_path / "q")) == 0
    made = (tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    if beside != "nothing":
        (tmp_path / "q.job").mkdir()
    if beside == "a user's folder":
        (tmp_path / "q.job" / "notes.txt").write_text("mine")
    if beside == "a job":
        settings = QuantizationSettings(recipe="paper", calibration=CalibrationConfig(steps=3))
        Job.open(tmp_path / "q.job", settings, new_pipeline(), resume=False).close()
    capsys.readouterr()
    said = failure(capsys, *quick(model_folder, tmp_path / "q", "--resume"))
    assert "q is not empty" in said or "q.job is no job of ours" in said
    assert (tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == made
    assert beside != "a user's folder" or (tmp_path / "q.job" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "layers/")], ids=str)
def test_resuming_what_is_done_clears_what_is_left_of_its_job(tmp_path, model_folder, left):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    (tmp_path / "q.job").mkdir()
    for name in left:
        (tmp_path / "q.job" / name).mkdir() if name.endswith("/") else (tmp_path / "q.job" / name).touch()
    assert run(*quick(model_folder, tmp_path / "q", "--resume")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_resuming_what_is_done_says_so_again_and_changes_nothing(tmp_path, model_folder, capsys):
    assert run(*quick(model_folder, tmp_path / "q", "--json")) == 0
    first = json.loads(capsys.readouterr().out)
    made = (tmp_path / "q" / "model_index.json").stat().st_ino
    assert run(*quick(model_folder, tmp_path / "q", "--resume", "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["layers"] == first["layers"] and (tmp_path / "q" / "model_index.json").stat().st_ino == made
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_resuming_what_is_done_does_not_mind_what_lies_beside_it(tmp_path, model_folder, capsys):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    (tmp_path / "q" / "notes.txt").write_text("mine")
    assert run(*quick(model_folder, tmp_path / "q", "--resume")) == 0
    assert (tmp_path / "q" / "notes.txt").read_text() == "mine" and "lost" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "transformer/config.json", "model_index.json"])
@pytest.mark.parametrize("content", [None, b"{}", "flipped"], ids=["gone", "another", "a flipped bit"])
def test_resuming_notices_that_what_is_done_was_damaged(tmp_path, model_folder, capsys, name, content):
    assert run(*quick(model_folder, tmp_path / "q")) == 0
    path = tmp_path / "q" / name
    before = bytearray(path.read_bytes())
    before[-9] ^= 1
    path.unlink() if content is None else path.write_bytes(before if content == "flipped" else content)
    said = failure(capsys, *quick(model_folder, tmp_path / "q", "--resume"))
    assert f"not as it was written: {name} changed or is missing. Move the folder away and repeat the command" in said
    assert path.exists() or content is None
    assert run(*quick(model_folder, tmp_path / "q", "--resume", "--overwrite")) == (0 if content is None else 1)


@pytest.mark.parametrize("part", ["vae", "scheduler"])
def test_resuming_notices_that_another_part_is_there_now(tmp_path, model_folder, capsys, part):
    model = shutil.copytree(model_folder, tmp_path / "model")
    assert run(*quick(model, tmp_path / "q")) == 0
    config = next((model / part).glob("*config.json"))
    config.write_text(config.read_text() + "\n")
    said = failure(capsys, *quick(model, tmp_path / "q", "--resume"))
    assert f"of other parts than the model has now: {part} differs. Pass --overwrite" in said
    assert run(*quick(model, tmp_path / "q", "--resume", "--overwrite")) == 0
    assert (tmp_path / "q" / part / config.name).read_text() == config.read_text()
    assert run(*quick(model, tmp_path / "q", "--resume")) == 0


def test_what_comes_at_the_last_moment_outlives_the_job_and_is_told(tmp_path, model_folder, capsys, monkeypatch):
    take_place = folders._take_place

    def slow(work, folder):
        (folder / "notes.txt").write_text("mine")
        take_place(work, folder)

    assert run(*quick(model_folder, tmp_path / "q")) == 0
    monkeypatch.setattr(folders, "_take_place", slow)
    assert run(*quick(model_folder, tmp_path / "q", "--overwrite")) == 0
    (kept,) = tmp_path.glob("vq4dit-kept-*")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "note: " in said and f"is now in {kept}: notes.txt" in said and [path.name for path in kept.iterdir()] == ["notes.txt"]
    )


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\nlicense: 2026-01-01\n---\n"], ids=repr)
def test_a_base_whose_card_is_broken_can_be_quantized(tmp_path, model_folder, card):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "README.md").write_text(card)
    assert run(*quick(base, tmp_path / "q")) == 0


@pytest.mark.parametrize("command", ["quantize", "sample", "compare"])
@pytest.mark.parametrize("output", ["", " ", "\udcff", "~nobody-of-that-name/x"], ids=repr)
def test_an_output_without_a_name_is_wrong_usage(model_folder, capsys, command, output):
    models = [model_folder] * (2 if command == "compare" else 1)
    with pytest.raises(SystemExit) as stopped:
        run(command, *models, "--labels" if command == "sample" else "--seed", 0, f"--output={output}")
    assert stopped.value.code == 2 and "argument --output" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "sample", "compare"])
@pytest.mark.parametrize("output", ["n" * 256, "d/" + "n" * 256 + "/q", "/proc/q", "/dev/null/q"], ids=lambda name: name[:9])
def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, model_folder, capsys, monkeypatch, command, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vq4dit.cli.quantize.load_pipeline", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr("vq4dit.cli.compare.load_pipeline", lambda *_, **__: pytest.fail("the work began"))
    models = [model_folder] * (2 if command == "compare" else 1)
    name = f"{output}/x.png" if command == "sample" else output
    said = failure(capsys, command, *models, "--labels" if command == "sample" else "--seed", 0, "--output", name)
    assert "cannot be used (" in said and "choose another output" in said and not list(tmp_path.iterdir())


def test_a_job_folder_whose_name_is_too_long_is_told_before_the_work(tmp_path, model_folder, capsys):
    assert "cannot be used (File name too long)" in failure(capsys, *quick(model_folder, tmp_path / ("n" * 252)))


# --- pictures and comparisons ---


def sample(model, output) -> list[object]:
    return ["sample", model, "--labels", "cat", "--steps", 1, "--output", output]


def test_a_picture_of_ours_is_replaced_and_no_other(tmp_path, model_folder, capsys):
    assert run(*sample(model_folder, tmp_path / "a.png")) == 0
    assert run(*sample(model_folder, tmp_path / "a.png"), "--seed", 1) == 0
    with Image.open(tmp_path / "a.png") as image:
        changed = image.rotate(90)
        changed.save(tmp_path / "b.png", pnginfo=PngInfo(image))
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_text("not a picture")
    shutil.copy(tmp_path / "a.png", tmp_path / "e.png")  # the best of all, kept under a name of its own
    for name in "bcde":
        before = (tmp_path / f"{name}.png").read_bytes()
        assert "was not drawn by `sample`" in failure(capsys, *sample(model_folder, tmp_path / f"{name}.png"))
        assert (tmp_path / f"{name}.png").read_bytes() == before


class PngInfo(PngImagePlugin.PngInfo):
    """The text chunks of a picture, as a program that changes it keeps them."""

    def __init__(self, image):
        super().__init__()
        for key, value in image.text.items():
            self.add_text(key, value)


def compare(model, output, *more: object) -> list[object]:
    return ["compare", model, model, "--steps", 1, "--output", output, *more]


def test_a_comparison_of_ours_is_replaced_as_a_whole(tmp_path, model_folder):
    assert run(*compare(model_folder, tmp_path / "c", "--layers", "--labels", "cat,dog")) == 0
    assert run(*compare(model_folder, tmp_path / "c", "--overwrite", "--labels", "fox", "--seed", 5)) == 0
    drawn = {f"fox-seed5-{kind}.png" for kind in ("original", "quantized", "difference")}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"report.json", "pairs.png", "vq4dit.json", *drawn}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_sample_that_somebody_put_into_a_comparison_is_not_replaced_with_it(tmp_path, model_folder, capsys):
    assert run(*compare(model_folder, tmp_path / "c", "--labels", "cat")) == 0
    assert run(*sample(model_folder, tmp_path / "c" / "best-of-all.png")) == 0
    assert "would be lost: best-of-all.png" in failure(capsys, *compare(model_folder, tmp_path / "c", "--overwrite"))


@pytest.mark.parametrize("theirs", ["report.json", "notes.txt", "cat-seed0-original.png", "pairs.png", "layers.json"])
def test_a_comparison_with_somebody_elses_file_is_not_replaced(tmp_path, model_folder, capsys, theirs):
    assert run(*compare(model_folder, tmp_path / "c", "--labels", "cat")) == 0
    (tmp_path / "c" / theirs).write_text('{"figures": "mine"}')
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    said = failure(capsys, *compare(model_folder, tmp_path / "c", "--overwrite"))
    assert f"not ours and would be lost: {theirs}" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def add_a_comment(path):
    with Image.open(path) as image:
        chunks = PngImagePlugin.PngInfo()
        for key, value in (*image.text.items(), ("Comment", "mine")):
            chunks.add_text(key, value)
        image.save(path, pnginfo=chunks)


EDITS = {
    "figures": ("report.json", lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))),
    "layers": ("layers.json", lambda path: path.write_text('{"a": 1.0}')),
    "a comment in a picture": ("cat-seed0-original.png", add_a_comment),
    "something behind a picture": ("pairs.png", lambda path: path.write_bytes(path.read_bytes() + b"PK")),
    "the record": ("vq4dit.json", lambda path: path.write_text(path.read_text() + " ")),
}


@pytest.mark.parametrize(("name", "edit"), EDITS.values(), ids=EDITS.keys())
def test_a_comparison_that_somebody_edited_is_not_replaced(tmp_path, model_folder, capsys, name, edit):
    assert run(*compare(model_folder, tmp_path / "c", "--labels", "cat", "--layers")) == 0
    edit(tmp_path / "c" / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    said = failure(capsys, *compare(model_folder, tmp_path / "c", "--overwrite"))
    assert name in said and "choose another output" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_a_picture_that_came_while_a_sample_was_drawn_is_not_replaced(tmp_path, model_folder, capsys, monkeypatch):
    def slow(*arguments, **options):
        (tmp_path / "a.png").write_text("mine")
        return draw(*arguments, **options)

    draw = sampling.sample
    monkeypatch.setattr(sampling, "sample", slow)
    assert "was not drawn by `sample`" in failure(capsys, *sample(model_folder, tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_text() == "mine"


@pytest.mark.parametrize(
    "edit", [add_a_comment, lambda path: path.write_bytes(path.read_bytes() + b"PK")], ids=["comment", "end"]
)
def test_a_sample_to_which_somebody_added_is_not_replaced(tmp_path, model_folder, capsys, edit):
    assert run(*sample(model_folder, tmp_path / "a.png")) == 0
    assert run(*sample(model_folder, tmp_path / "a.png")) == 0
    edit(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    assert "was not drawn by `sample`" in failure(capsys, *sample(model_folder, tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_disk_that_fills_up_leaves_no_half_a_comparison(tmp_path, model_folder, capsys, monkeypatch):
    def full(path, image):
        if path.name == "pairs.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, image)

    write = comparisons.write_picture
    with monkeypatch.context() as patched:
        patched.setattr(comparisons, "write_picture", full)
        said = failure(capsys, *compare(model_folder, tmp_path / "c"))
        assert "the disk is full" in said and "0.0 MB" not in said and not list(tmp_path.iterdir())
    assert run(*compare(model_folder, tmp_path / "c")) == 0


def test_classes_whose_names_cannot_be_file_names_are_drawn(tmp_path, model_folder):
    index = json.loads((Path(model_folder) / "model_index.json").read_text())
    names = ["../up", "a\0b", "w" * 300, "猫" * 150, "con", ".", "/", "\ud800"]
    named = shutil.copytree(model_folder, tmp_path / "model")
    (named / "model_index.json").write_text(json.dumps(index | {"id2label": {str(i): name for i, name in enumerate(names)}}))
    assert run(*compare(named, tmp_path / "c", "--labels", ",".join(map(str, range(8))))) == 0
    assert len(list((tmp_path / "c").iterdir())) == 3 + 3 * 8 and {path.name for path in tmp_path.iterdir()} == {"c", "model"}


@pytest.mark.parametrize("output", ["model", "model/", "model/../model", "."])
def test_the_model_itself_is_never_replaced(tmp_path, model_folder, capsys, monkeypatch, output):
    model = shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    said = failure(capsys, "quantize", model, "--output", output, "--overwrite")
    assert "choose another output" in said and (model / "model_index.json").exists()


def test_patterns_with_brackets_are_shown_whole(tmp_path, model_folder, capsys):
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path / "q", "--keep", "*.to_[xy]")
    assert "'*.to_[xy]'" in said


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--steps", "-1"], ["--guidance", "nan"], ["--output", "x.xyz"], ["--output", "."]],
    ids=lambda arguments: " ".join(arguments),
)
def test_wrong_numbers_and_names_are_wrong_usage(model_folder, arguments):
    with pytest.raises(SystemExit) as stopped:
        run("sample", model_folder, "--labels", "cat", "--output", "x.png", *arguments)
    assert stopped.value.code == 2


def test_an_output_below_a_file_is_told(tmp_path, model_folder, capsys):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in failure(capsys, *quick(model_folder, tmp_path / "file" / "q"))


def test_three_bits_do_not_need_two(tmp_path, capsys):
    new_pipeline(num_attention_heads=1, attention_head_dim=16).save_pretrained(tmp_path / "mini")
    assert "256 codewords" in failure(capsys, "quantize", tmp_path / "mini", "--output", tmp_path / "q")
    assert run(*quick(tmp_path / "mini", tmp_path / "q", "--bits", 3)) == 0


def test_a_keep_pattern_that_matches_nothing_is_told(tmp_path, model_folder, capsys):
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path / "q", "--keep", "*.mlp.*")
    assert "no linear layer of a block matches '*.mlp.*'" in said and "transformer_blocks.0" in said


def test_nan_weights_are_told_before_any_work(tmp_path, model_folder, capsys):
    broken = shutil.copytree(model_folder, tmp_path / "nan")
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.1.ff.net.2.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    said = failure(capsys, "quantize", broken, "--output", tmp_path / "q")
    assert "transformer_blocks.1.ff.net.2.weight has values that are not finite" in said
    assert not (tmp_path / "q").exists() and not (tmp_path / "q.job").exists()


def test_a_truncated_model_is_told(tmp_path, model_folder, capsys):
    broken = shutil.copytree(model_folder, tmp_path / "cut")
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated or damaged" in failure(capsys, "quantize", broken, "--output", tmp_path / "q")


def test_pickled_weights_are_never_loaded(tmp_path, model_folder, capsys):
    pickled = shutil.copytree(model_folder, tmp_path / "pickled")
    path = pickled / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "no safetensors in transformer/" in failure(capsys, "quantize", pickled, "--output", tmp_path / "q")


def test_an_unknown_class_is_told(tmp_path, model_folder, capsys):
    said = failure(capsys, "sample", model_folder, "--labels", "whale", "--output", tmp_path / "x.png")
    assert "there is no class 'whale'; there are 3, such as cat, dog, fox" in said


def test_a_model_too_small_for_any_codebook_is_told(tmp_path, capsys):
    new_pipeline(num_attention_heads=1, attention_head_dim=8).save_pretrained(tmp_path / "mini")
    assert "large enough to quantize" in failure(capsys, "quantize", tmp_path / "mini", "--output", tmp_path / "q")


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("best", ["--steps", 3]),
        ("kmeans", ["--trajectories", 1]),
        ("best", ["--candidates", 1]),
        ("best", ["--ratio-start", "uniform"]),
        ("paper", ["--tokens", 640]),
    ],
)
def test_an_option_that_the_recipe_would_not_heed_is_refused(tmp_path, model_folder, capsys, recipe, option):
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path / "q", "--recipe", recipe, *option)
    heeding = "best" if recipe == "paper" else "paper"
    assert f"{option[0]} belongs to the recipe {heeding}, and the recipe is {recipe}" in said and f"--recipe {heeding}" in said
    assert not (tmp_path / "q.job").exists()


def test_tokens_that_are_asked_for_are_those_of_a_large_model_too():
    chosen = settings_of(build_parser().parse_args(["quantize", "m", "--output", "q", "--tokens", "640"])).entropy_coding
    assert chosen.tokens == chosen.of_large().tokens == 640


def test_ctrl_c_leaves_no_half_written_result_and_resume_finishes(tmp_path, model_folder):
    command = [sys.executable, "-W", "ignore", "-m", "vq4dit"]
    # 400 steps take so long that the last one is never there before Ctrl-C is
    arguments = [str(a) for a in quick(model_folder, tmp_path / "q", "--steps", 400)]
    process = subprocess.Popen(
        command + arguments,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are deaf to Ctrl-C
    )
    layers = tmp_path / "q.job" / "layers"
    while len(list(layers.glob("*.safetensors"))) < 14 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said
    assert not (tmp_path / "q").exists() and (tmp_path / "q.job" / "job.json").exists()
    assert run(*quick(model_folder, tmp_path / "q", "--steps", 400)) == 1  # an unfinished job is not overwritten
    assert run(*quick(model_folder, tmp_path / "q", "--steps", 300, "--resume")) == 1  # other settings
    assert run(*quick(model_folder, tmp_path / "q", "--steps", 400, "--resume")) == 0
    assert (tmp_path / "q" / "model_index.json").exists() and not (tmp_path / "q.job").exists()


def test_killed_between_saving_and_cleaning_up_it_can_be_resumed(tmp_path, model_folder, monkeypatch):
    def killed(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vq4dit.disk.job.Job.remove", killed)
        assert run(*quick(model_folder, tmp_path / "q")) == 130
    saved = (tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert run(*quick(model_folder, tmp_path / "q", "--resume")) == 0
    assert (tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == saved
    assert not (tmp_path / "q.job").exists()


# --- what is known before the work ---


@pytest.mark.parametrize("command", ["quantize", "sample", "compare"])
def test_a_disk_without_room_for_the_result_is_told_before_the_work(tmp_path, model_folder, capsys, monkeypatch, command):
    monkeypatch.setattr("vq4dit.disk.space.shutil.disk_usage", lambda folder: SimpleNamespace(free=150))
    for work in ("vq4dit.cli.quantize.run", "vq4dit.cli.sample.sample", "vq4dit.cli.compare.compare"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work began"))
    models = [model_folder] * (2 if command == "compare" else 1)
    output = tmp_path / "new" / ("x.png" if command == "sample" else "x")
    said = failure(capsys, command, *models, "--labels" if command == "sample" else "--seed", 0, "--output", output)
    assert "the disk has 150 bytes left and this needs" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "compare"])
def test_more_steps_than_there_are_is_told_before_the_work(tmp_path, model_folder, capsys, command):
    models = [model_folder] * (2 if command == "compare" else 1)
    output = tmp_path / "x.png"
    said = failure(capsys, command, *models, "--labels", 0, "--steps", 1001, "--output", output)
    assert "there are at most 1000 denoising steps" in said and "1001 were asked for: take fewer steps" in said
    assert "sampling" not in said and "measuring" not in said and not list(tmp_path.iterdir())


def test_a_comparison_that_cannot_take_its_place_is_kept(tmp_path, model_folder, capsys, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("vq4dit.disk.folders._take_place", refused)
    said = failure(capsys, *compare(model_folder, tmp_path / "c"))
    (kept,) = tmp_path.iterdir()
    assert f"What was made is whole and lies in {kept}" in said and (kept / "report.json").exists()
