"""A published result that refers to its base: small, and whoever follows its card has the same pipeline."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from hub_fixtures import publish
from referring import contents, index_of, made
from tiny import new_pipeline

from vq4dit.cli.main import main
from vq4dit.errors import HubError
from vq4dit.hub.base import Base
from vq4dit.hub.model_card import model_card
from vq4dit.hub.push import same_image
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.references import KEY


@pytest.fixture
def base(hub, model_folder) -> str:
    hub.add_repo("ann/base", contents(Path(model_folder)), card={"license": "mit"})
    return "ann/base"


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def images(pipeline, **call: object) -> np.ndarray:
    result = pipeline(**call, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np")
    return np.asarray(result.frames if "frames" in result else result.images)


def test_what_was_pushed_holds_no_part_of_the_base_and_loads_from_the_hub(hub, base, ann, tmp_path):
    folder = made(base, tmp_path / "q")
    pushed = publish(folder, ann)
    names = set(hub.repos["ann/tiny"].head)
    assert names - {".gitattributes", "README.md"} == contents(folder).keys()
    assert not any(name.startswith("vae/") for name in names)
    assert same_image(folder, pushed, ann)
    there = load_pipeline("ann/tiny", token=ann.token)
    assert np.array_equal(*(images(p, class_labels=[0]) for p in (there, load_pipeline(str(folder)))))


@pytest.mark.parametrize("name", ["dit", "flux", "wan22"])
def test_the_cards_code_gives_the_same_pipeline(hub, base, ann, tmp_path, name):
    if name != "dit":
        tiny_pipelines.build(name).save_pretrained(tmp_path / "original")
        hub.add_repo("ann/base", contents(tmp_path / "original"))
    folder = made(base, tmp_path / "q")
    publish(folder, ann)
    code = snippet(hub.repos["ann/tiny"].head["README.md"].decode())
    commit = hub.repos[base].refs["main"]
    assert f'.from_pretrained("ann/base", revision="{commit}", transformer=transformer' in code
    told: dict = {}
    exec(re.split("\n(image|video) = ", code)[0], told)
    call = {"class_labels": [0]} if name == "dit" else {"prompt": "a cat", **tiny_pipelines.CALLS[name]}
    assert np.array_equal(*(images(p, **call) for p in (told["pipeline"], load_pipeline(str(folder)))))


def test_the_card_names_what_is_not_in_the_repository_and_where_it_is(hub, base, tmp_path):
    card = model_card(made(base, tmp_path / "q"), "ann/tiny", Base(model=base, revision=hub.repos[base].refs["main"]))
    commit, size = hub.repos[base].refs["main"], sum(index_of(tmp_path / "q")[KEY]["files"].values())
    assert f"does not hold the rest of the pipeline. It is that of [ann/base]({hub.url}/ann/base)" in card
    assert f"at commit `{commit}`: vae, {size / 1e3:.1f} kB." in card and "base_model: ann/base" in card
    copy = model_card(made(base, tmp_path / "copy", "copy"), "ann/tiny", Base(model=base))
    assert "does not hold" not in copy and 'DiTPipeline.from_pretrained("ann/tiny")' in snippet(copy)


def test_a_reference_that_follows_a_copy_leaves_no_part_of_the_copy_behind(hub, base, ann, tmp_path):
    publish(made(base, tmp_path / "copy", "copy"), ann)
    assert any(name.startswith("vae/") for name in hub.repos["ann/tiny"].head)
    folder = made(base, tmp_path / "q")
    pushed = publish(folder, ann, existing="commit")
    assert not any(name.startswith("vae/") for name in hub.repos["ann/tiny"].head)
    assert same_image(folder, pushed, ann) and publish(folder, ann, existing="commit").was_there


def test_a_private_base_is_read_with_the_login_that_pushes(hub, base, ann, tmp_path, monkeypatch):
    hub.repos[base].private = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = made(base, tmp_path / "q", token=ann.token)
    pushed = publish(folder, ann, private=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    assert same_image(folder, pushed, ann)


def test_push_in_a_terminal_verifies_a_reference(hub, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    assert main(["push", str(made(base, tmp_path / "q")), "tiny", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_image"] is True


def test_the_cards_code_names_the_variant_where_the_base_has_no_other(hub, ann, tmp_path):
    new_pipeline().save_pretrained(tmp_path / "original", variant="fp16")
    hub.add_repo("ann/base", contents(tmp_path / "original"))
    folder = made("ann/base", tmp_path / "q")
    publish(folder, ann)
    code = snippet(hub.repos["ann/tiny"].head["README.md"].decode())
    assert 'variant="fp16", transformer=transformer' in code
    told: dict = {}
    exec(re.split("\n(image|video) = ", code)[0], told)
    assert np.array_equal(*(images(p, class_labels=[0]) for p in (told["pipeline"], load_pipeline(str(folder)))))


def test_a_push_to_the_base_itself_would_take_away_what_is_referred_to_and_is_refused(hub, base, tmp_path):
    with pytest.raises(HubError, match="ann/base has the parts that this model refers to"):
        model_card(made(base, tmp_path / "q"), "ann/base", Base(model=base, revision=hub.repos[base].refs["main"]))
