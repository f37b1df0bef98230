"""The card says what is so, calls unmeasured what was not measured, and its snippet runs."""

import ast
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_fixtures import publish
from markdown_it import MarkdownIt
from test_printable import NASTY
from tiny_pipelines import build

import vq4dit
from vq4dit.cli.main import main
from vq4dit.errors import FormatError, HubError, VQ4DiTError
from vq4dit.hub.account import look_up_base
from vq4dit.hub.base import Base, default_name, default_visibility
from vq4dit.hub.markdown import plain
from vq4dit.hub.model_card import model_card, read_report, source
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.pipelines.provenance import COPIED, Origin, copied, folder_metadata, origin_of, read_origin, write_origin

COMMIT = "0123456789" * 4
BASE = Base(model="facebook/DiT-XL-2-256", revision=COMMIT, metadata={"license": "cc-by-nc-4.0", "language": "en"})


@pytest.fixture(scope="module")
def reports(tmp_path_factory, model_folder, quantized_folder):
    """What `compare` writes of the tiny model."""
    folder = tmp_path_factory.mktemp("reports") / "compared"
    assert main(["compare", model_folder, str(quantized_folder), "--steps", "2", "--output", str(folder)]) == 0
    return folder


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_metadata_names_base_relation_and_licence(quantized_folder):
    found = metadata(model_card(quantized_folder, "ann/tiny", BASE))
    assert found["base_model"] == "facebook/DiT-XL-2-256" and found["base_model_relation"] == "quantized"
    assert found["license"] == "cc-by-nc-4.0" and found["language"] == "en" and found["library_name"] == "diffusers"
    assert "2-bit" in found["tags"] and "pipeline_tag" not in found


def test_a_licence_file_of_the_base_is_linked_where_it_is(quantized_folder):
    base = dataclasses.replace(BASE, metadata={"license": "other", "license_name": "free", "license_link": "LICENSE.md"})
    link = metadata(model_card(quantized_folder, "ann/tiny", base))["license_link"]
    assert link.endswith(f"/facebook/DiT-XL-2-256/blob/{COMMIT}/LICENSE.md")


def test_base_commit_bits_recipe_and_kept_layers_are_told(quantized_folder):
    card = model_card(quantized_folder, "ann/tiny", BASE)
    for words in (
        f"commit `{COMMIT}`",
        "bits per weight: 2 (256 codewords of 4 weights in 14 layers)",
        "recipe: `kmeans`, plain k-means",
        "14 linear layers are quantized",
        "`transformer_blocks.*.norm1.emb.timestep_embedder.linear_1` (2 layers): embedder",
        "- versions: diffusers ",
    ):
        assert words in card


def test_a_folder_as_base_is_called_so(quantized_folder):
    card = model_card(quantized_folder, "ann/tiny", Base())
    assert "Base model: a folder that is not on the Hub" in card and "base_model" not in metadata(card)
    assert "not known: ask the author" in card


def test_what_nobody_measured_is_called_so(quantized_folder):
    card = model_card(quantized_folder, "ann/tiny", BASE)
    assert "Nobody compared this model with its base" in card and "samples.png" not in card
    size = f"{tensor_bytes(str(quantized_folder)):,}"
    assert f"| **this model**, 2 bits, recipe `kmeans` | {size} | not measured | not measured | not measured |" in card


def test_measured_figures_are_those_of_compare(quantized_folder, reports):
    report = read_report(reports)
    card = model_card(quantized_folder, "ann/tiny", BASE, report)
    assert f"| {report.noise_nmse:.4f} | {report.psnr_db:.2f} | {report.ssim:.4f} |" in card
    assert f"| base | {report.original_bytes:,} |" in card and "![pairs of images](samples.png)" in card
    assert f"rest on {report.num_pairs} pairs" in card


def test_plain_kmeans_has_a_row_beside_another_recipe(tmp_path, quantized_folder, reports):
    settings = vq4dit.QuantizationSettings(recipe="best", call={"guidance_scale": 5.0}, prompts=("a cat", "a dog"))
    copy = shutil.copytree(quantized_folder, tmp_path / "best")
    told = json.loads((copy / "transformer" / "config.json").read_text())
    told["quantization_config"]["recipe"] = "best"
    (copy / "transformer" / "config.json").write_text(json.dumps(told))
    earlier = settings.to_dict()
    earlier["calibration"] |= {"tuning_steps": 200, "guidance_scale": 4.0}  # constants of an earlier version
    write_origin(copy, Origin(model=BASE.model, revision=COMMIT, settings=earlier, versions={"torch": "2.13"}))
    report = read_report(reports)
    card = model_card(copy, "ann/tiny", BASE, report)
    assert "| plain k-means, same bits | not measured | not measured" in card and "torch 2.13" in card
    assert "guidance_scale 4.0" in card and "tuning_steps 200" in card and "ratio_start" not in card
    assert "- sampled with: guidance_scale 5.0\n- calibrated on 2 prompts of its maker's choice\n" in card
    card = model_card(copy, "ann/tiny", BASE, report, dataclasses.replace(report, noise_nmse=0.5))
    assert f"| plain k-means, same bits | {report.quantized_bytes:,} | 0.5000 |" in card


def test_figures_of_another_file_or_another_measurement_are_refused(quantized_folder, reports):
    report = read_report(reports)
    with pytest.raises(HubError, match="compare again"):
        model_card(quantized_folder, "ann/tiny", BASE, dataclasses.replace(report, quantized_bytes=1))
    with pytest.raises(HubError, match="with equal options"):
        model_card(quantized_folder, "ann/tiny", BASE, report, dataclasses.replace(report, seed=7))
    with pytest.raises(HubError, match="with equal options"):
        model_card(quantized_folder, "ann/tiny", BASE, report, dataclasses.replace(report, call={"height": 64}))


def test_a_model_that_is_not_quantized_gets_no_card(model_folder):
    with pytest.raises(HubError, match="quantize first"):
        model_card(Path(model_folder), "ann/tiny", BASE)


@pytest.mark.parametrize(
    ("base", "private", "reason"),
    [
        (Base(metadata={"license": "apache-2.0"}), False, "apache-2.0, allows it"),
        (Base(metadata={"license": "cc-by-nc-4.0"}), True, "does not allow commercial use"),
        (Base(metadata={"license": "other", "license_name": "flux-1-dev-non-commercial-license"}), True, "commercial"),
        (Base(metadata={"license": "other"}), True, "not known"),
        (Base(), True, "not known"),
        (Base(model="a/b", metadata={"license": "mit"}, restricted="gated"), True, "a/b is gated"),
    ],
)
def test_the_default_visibility_follows_the_licence(base, private, reason):
    found, told = default_visibility(base)
    assert found is private and reason in told


def test_default_names_tell_base_and_bits():
    assert default_name("facebook/DiT-XL-2-256", 2) == "DiT-XL-2-256-vq4dit-2bit"
    assert default_name("my odd folder!", 4) == "my-odd-folder-vq4dit-4bit"


def test_the_origin_of_a_folder_holds_its_licence_but_no_path():
    emoji = Path(__file__).parents[2] / "assets" / "emoji-dit"
    origin = origin_of(str(emoji), None, vq4dit.QuantizationSettings())
    assert origin.metadata["license"] == "apache-2.0" and origin.model == origin.revision == ""
    assert str(emoji) not in json.dumps(dataclasses.asdict(origin)) and folder_metadata(emoji) == origin.metadata


def test_the_space_is_named_as_the_source(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "ann/vq4dit")
    assert source().endswith("/spaces/ann/vq4dit")


def test_the_base_is_looked_up_with_its_licence(hub, ann):
    hub.add_repo("corp/base", gated=True, card={"license": "mit", "tags": ["x"]})
    found = look_up_base(Origin(model="corp/base", revision=COMMIT), ann.token)
    assert found == Base(model="corp/base", revision=COMMIT, metadata={"license": "mit"}, restricted="gated")
    gone = look_up_base(Origin(model="corp/gone", revision=COMMIT), ann.token)
    assert gone.metadata == {} and default_visibility(gone)[0]


def test_the_snippet_of_the_card_runs_in_a_fresh_process(hub, ann, quantized_folder, tmp_path):
    publish(quantized_folder, ann)
    snippet = re.search(r"```python\n(.*?)```", hub.repos["ann/tiny"].head["README.md"].decode(), re.DOTALL)[1]
    program = snippet.replace("num_inference_steps=25", "num_inference_steps=2, output_type='np'") + (
        f"import numpy\nnumpy.save({str(tmp_path / 'a.npy')!r}, image)\n"
    )
    settings = {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "home")}
    seeded = "import torch\n" + program.replace("image = ", "torch.manual_seed(3)\nimage = ")
    done = subprocess.run(
        [sys.executable, "-c", seeded], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    image = np.load(tmp_path / "a.npy")
    local: dict = {}
    here = seeded.replace('"ann/tiny"', repr(str(quantized_folder))).replace("a.npy", "b.npy")
    exec(here, local)
    assert np.array_equal(image, np.load(tmp_path / "b.npy"))


# --- pipelines of prompts ---


def of_prompts(name: str, folder: Path, **call) -> Path:
    """A tiny packed pipeline of prompts, saved."""
    settings = vq4dit.QuantizationSettings(recipe="kmeans", call=call)
    vq4dit.save(vq4dit.quantize(build(name), settings), folder)
    return folder


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.parametrize(
    ("name", "tag", "drawn"),
    [("flux", "text-to-image", "image = {}.images[0]"), ("ltx", "text-to-video", "video = {}.frames[0]")],
)
def test_a_pipeline_of_prompts_is_loaded_and_drawn_as_it_was_calibrated(tmp_path, name, tag, drawn):
    folder = of_prompts(name, tmp_path / name, guidance_scale=2.5, height=32, width=32)
    card = model_card(folder, "ann/tiny", BASE)
    assert metadata(card)["pipeline_tag"] == tag and "- sampled with: guidance_scale 2.5, height 32, width 32\n" in card
    told = f'pipeline("{HELD_OUT[0]}", guidance_scale=2.5, height=32, width=32)'
    assert snippet_of(card).splitlines()[-1] == drawn.format(told)
    tagged = dataclasses.replace(BASE, metadata={"pipeline_tag": "image-to-image"})
    assert metadata(model_card(folder, "ann/tiny", tagged))["pipeline_tag"] == "image-to-image"


def test_a_text_that_the_call_was_told_stays_one_text_in_the_snippet(tmp_path):
    folder = of_prompts("flux", tmp_path / "flux", negative_prompt=BAD + "```\n\"' \\`", true_cfg_scale=3)
    card = model_card(folder, "ann/tiny", BASE)
    assert card.count("```") == 4 and "<script" not in card and "\n# Heading" not in card
    *_, drawing = ast.parse(snippet_of(card)).body
    call = next(node for node in ast.walk(drawing) if isinstance(node, ast.Call))
    told = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert told == {"negative_prompt": BAD + "```\n\"' \\`", "true_cfg_scale": 3}


def test_what_the_pipeline_does_not_take_is_not_in_the_snippet(tmp_path, stranger):
    write_origin(stranger, Origin(settings={"call": {"cfg": 3, "guidance_scale": 2.0, "exec": "x"}}))
    last = snippet_of(model_card(stranger, "ann/tiny", BASE)).splitlines()[-1]
    assert last == "image = pipeline([0], num_inference_steps=25, guidance_scale=2.0).images[0]  # class 0"


# --- a stranger's folder ---

BAD = (
    "x\n\n# Heading\n<script>alert(1)</script> | `rm -rf /` [a](javascript:x) ![b](http://evil.example/b) @everyone\n---\n"
    "license: mit"
)


@pytest.fixture
def stranger(quantized_folder, tmp_path):
    """A packed folder to spoil."""
    return Path(shutil.copytree(quantized_folder, tmp_path / "stranger"))


def spoil(folder: Path, **changes) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def assert_harmless(card: str) -> None:
    """Our own headings and code blocks and no others, our own metadata, and nothing that a browser would run or fetch."""
    front, body = card.split("---\n", 2)[1:]
    assert set(yaml.safe_load(front)) <= {"library_name", "tags", "base_model", "base_model_relation", *COPIED}
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == 7 and "# Heading" not in headings
    assert body.count("```") == 4 and "<script" not in card and "](javascript" not in card
    links = set(re.findall(r"(?<!\\)\]\(([^)]*)\)", body)) - {"https://arxiv.org/abs/2408.17131", "samples.png"}
    assert all("evil" not in link for link in links)
    snippet = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    assert len(snippet.splitlines()) <= 5 and "rm -rf" not in snippet
    compile(snippet, "card", "exec")


@pytest.mark.parametrize("name", ["bits", "recipe", "seed"])
@pytest.mark.parametrize("value", [BAD, None, [2], {"x": 1}, 2.5, True, "2 bits"], ids=repr)
def test_what_stands_in_the_cards_code_and_tables_must_be_what_it_is_called(stranger, name, value):
    spoil(stranger, **{name: value})
    with pytest.raises(VQ4DiTError):
        model_card(stranger, "ann/tiny", BASE)


@pytest.mark.parametrize("value", [BAD, "os; import os", ["pipeline", "Evil"], None, "DiffusionPipeline"], ids=repr)
def test_the_snippet_names_only_a_pipeline_of_diffusers(stranger, value):
    index = json.loads((stranger / "model_index.json").read_text())
    (stranger / "model_index.json").write_text(json.dumps(index | {"_class_name": value}))
    with pytest.raises(VQ4DiTError, match="is not in diffusers|must name a pipeline"):
        model_card(stranger, "ann/tiny", BASE)


@pytest.mark.parametrize("name", ["license", "license_name", "license_link", "language", "pipeline_tag"])
@pytest.mark.parametrize(
    "value", [BAD, [BAD], {"x": BAD}, 7, "javascript:alert(1)<script>"], ids=lambda value: type(value).__name__
)
def test_what_a_base_says_of_itself_is_copied_only_if_it_can_be_that(stranger, name, value):
    base = dataclasses.replace(BASE, metadata={"license": "mit"} | {name: value})
    card = model_card(stranger, "ann/tiny", base)
    assert_harmless(card)
    assert name not in metadata(card)
    assert "<" not in default_visibility(base)[1]


def test_licences_as_people_write_them_are_copied():
    for told in (
        {"license": "cc-by-nc-4.0", "language": ["en", "zh"], "pipeline_tag": "text-to-image"},
        {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md"},
        {"license": "other", "license_name": "Stability AI Community (2024)", "license_link": "https://stability.ai/license"},
        {"license": "openrail++", "license_link": "https://huggingface.co/a/b-c/blob/main/LICENSE"},
    ):
        assert copied(told) == told


@pytest.mark.parametrize(
    "origin",
    [
        Origin(settings={"keep": ["*[!<script>alert(1)</script>|# x]*norm1.linear"], "recipe": BAD}),
        Origin(versions={"torch": BAD, BAD: "2.13", f"<script>{NASTY}": "1"}),
        Origin(settings={"calibration": {"guidance_scale": BAD, BAD: BAD, "steps": [BAD]}}),
        Origin(settings={"call": {"negative_prompt": BAD, "cfg": NASTY}, "prompts": [BAD]}),
    ],
    ids=["keep", "versions", "calibration", "call"],
)
@pytest.mark.parametrize("recipe", ["best", "paper", "kmeans", "unheard-of"])
def test_the_record_of_a_stranger_is_told_in_plain_words(stranger, origin, recipe):
    write_origin(stranger, origin)
    spoil(stranger, recipe=recipe)
    assert_harmless(model_card(stranger, "ann/tiny", BASE))


@pytest.mark.parametrize(
    "record",
    [
        {"model": BAD},
        {"model": "../../etc"},
        {"model": "ann/x](javascript:y)"},
        {"model": ["ann/x"]},
        {"model": "ann/x", "revision": BAD},
        {"revision": 7},
        {"settings": []},
        {"settings": {"keep": "x"}},
        {"settings": {"keep": [1]}},
        {"settings": {"calibration": [1]}},
        {"settings": {"call": BAD}},
        {"settings": {"call": {BAD: 1}}},
        {"settings": {"call": {"scale": [BAD]}}},
        {"settings": {"prompts": BAD}},
        {"settings": {"prompts": [1]}},
        {"versions": "x"},
        {"metadata": [1]},
        [],
    ],
    ids=lambda record: repr(record)[:40],
)
def test_a_record_that_cannot_be_is_damaged(stranger, record):
    (stranger / "vq4dit.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match="vq4dit.json (is damaged|must hold a JSON object).*delete it"):
        read_origin(stranger)


@pytest.mark.parametrize("name", [BAD, "a b/c", "ann/x)", "ann", "ann/é", "../x"], ids=repr)
def test_a_card_is_only_for_what_can_be_the_name_of_a_repository(quantized_folder, name):
    with pytest.raises(HubError, match="cannot be the name of a repository"):
        model_card(quantized_folder, name, BASE)
    with pytest.raises(HubError, match="cannot be the name of a repository"):
        model_card(quantized_folder, "ann/tiny", dataclasses.replace(BASE, model=name))
    with pytest.raises(HubError, match="cannot be a commit"):
        model_card(quantized_folder, "ann/tiny", dataclasses.replace(BASE, revision=BAD))


@pytest.mark.parametrize("value", [BAD, None, [1], True, float("nan"), float("inf")], ids=repr)
def test_a_report_holds_numbers(tmp_path, reports, value):
    figures = json.loads((reports / "report.json").read_text())
    for name in ("num_pairs", "psnr_db"):
        (tmp_path / "report.json").write_text(json.dumps(figures | {name: value}))
        with pytest.raises(HubError, match=f"report.json: {name} must be a number, found"):
            read_report(tmp_path)
    for call in ([BAD], {"x": [value]}, {"prompt": "x"}, BAD):
        (tmp_path / "report.json").write_text(json.dumps(figures | {"call": call}))
        with pytest.raises(HubError, match="no report.json that can be read .call "):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(HubError, match="no report.json that can be read"):
        read_report(tmp_path)


def test_plain_words_stay_readable():
    assert plain("kept by '*.0.ff.*'") == r"kept by '\*.0.ff.\*'"
    assert plain("guidance_scale 4.0, 10^8 (a-b)") == "guidance_scale 4.0, 10^8 (a-b)"
    assert plain("a\n\n# b") == r"a \# b" and len(plain("x" * 999)) == 200


ADDRESS = re.compile(r"\bwww\.|\b(?:https?|ftp|ssh)://|[\w.+-]@\w|(?:^|\s)@\w", re.IGNORECASE)


@pytest.mark.parametrize(
    "told",
    [
        "www.evil.example",
        "WWW.Evil.example/x",
        "HTTP://evil.example",
        "see https://evil.example.",
        "ftp://evil.example",
        "(http://www.evil.example)",
        "mailto:ann@evil.example",
        "ann.b+c@evil.example",
        "xmpp:a@evil.example/x",
        "@everyone",
    ],
)
def test_no_address_becomes_a_link_by_itself(told):
    """Neither as it stands there, nor where a reader has undone the escapes before it looks for addresses."""
    assert ADDRESS.search(told)
    written = plain(told)
    assert not ADDRESS.search(written) and not ADDRESS.search(written.replace("\\", ""))
    assert html.unescape(written.replace("\\", "").replace("<!-- -->", "")) == told
    rendered = MarkdownIt("commonmark").render(written)
    assert "<a" not in rendered and not ADDRESS.search(re.sub("<p>|</p>", "", rendered))
