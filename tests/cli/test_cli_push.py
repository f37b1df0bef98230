"""`push` as a user types it, and what it does with a repository that exists."""

import json
import shutil
from pathlib import Path

import pytest

from vq4dit.cli.main import main
from vq4dit.pipelines.provenance import read_origin

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def signed_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann", orgs=["acme"]))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """What the terminal makes of a folder, and its comparison with the original."""
    folder = tmp_path_factory.mktemp("made")
    run("quantize", model_folder, "--recipe", "kmeans", "--output", folder / "tiny")
    run("compare", model_folder, folder / "tiny", "--steps", 2, "--output", folder / "compared")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def failure(capsys, *arguments: object) -> str:
    assert run("push", *arguments) == 1
    return " ".join(capsys.readouterr().err.split())


def test_the_whole_way_from_a_folder_to_a_verified_repository(hub, made, capsys):
    report = made / "compared"
    assert run("push", made / "tiny", "--report", report, "--verify", "--json") == 0
    out = capsys.readouterr()
    pushed = json.loads(out.out)
    assert pushed["repo_id"] == "ann/tiny-vq4dit-2bit" and pushed["same_image"] is True and pushed["private"] is True
    assert "private, the licence of its base is not known" in out.err
    files = hub.repos["ann/tiny-vq4dit-2bit"].head
    assert {"README.md", "report.json", "samples.png", "vq4dit.json", WEIGHTS, "model_index.json"} <= set(files)
    assert json.loads(files["report.json"])["num_pairs"] == 3 and b"samples.png" in files["README.md"]


def test_a_second_push_of_the_same_sends_nothing(hub, made, capsys):
    assert run("push", made / "tiny", "tiny", "--public") == 0
    sent = hub.count("PUT |POST .*/commit/")
    assert run("push", made / "tiny", "tiny", "--public") == 0
    assert "was there already, nothing was sent" in capsys.readouterr().out and sent == hub.count("PUT |POST .*/commit/")


def test_a_base_from_the_hub_is_recorded_with_its_commit(hub, model_folder, tmp_path, capsys):

    files = {p.relative_to(model_folder).as_posix(): p.read_bytes() for p in Path(model_folder).rglob("*") if p.is_file()}
    base = hub.add_repo("corp/base", files, card={"license": "mit", "pipeline_tag": "unconditional-image-generation"})
    assert run("quantize", "corp/base", "--recipe", "kmeans", "--output", tmp_path / "q") == 0
    assert read_origin(tmp_path / "q").revision == base.refs["main"]
    assert run("push", tmp_path / "q") == 0
    card = hub.repos["ann/base-vq4dit-2bit"].head["README.md"].decode()
    assert f"commit `{base.refs['main']}`" in card and "base_model: corp/base" in card and "license: mit" in card
    assert "public, the licence of its base, mit, allows it" in capsys.readouterr().err


def test_the_card_can_be_seen_before_anything_is_sent(hub, made, tmp_path):
    assert run("push", made / "tiny", "acme/tiny", "--card", tmp_path / "card.md") == 0
    assert 'from_pretrained("acme/tiny")' in (tmp_path / "card.md").read_text() and not hub.repos


def test_an_existing_repository_is_a_choice(hub, made, capsys):
    old = {WEIGHTS.replace(".safetensors", "-00001-of-00002.safetensors"): b"old", "LICENSE": b"mine"}
    repo = hub.add_repo("acme/tiny", old)
    before = dict(repo.head)
    said = failure(capsys, made / "tiny", "acme/tiny", "--public")
    assert "has other content. Choose a new name, a pull request (--pr) or a new commit (--commit)" in said
    assert repo.head == before
    assert run("push", made / "tiny", "acme/tiny", "--public", "--pr", "--verify") == 0
    assert repo.head == before and WEIGHTS in repo.commits[repo.refs["refs/pr/1"]]
    assert "/acme/tiny/discussions/1" in capsys.readouterr().out
    assert run("push", made / "tiny", "acme/tiny", "--public", "--commit") == 0
    assert WEIGHTS in repo.head and repo.head["LICENSE"] == b"mine" and not old.keys() - {"LICENSE"} & repo.head.keys()


def test_a_private_push_never_lands_in_a_public_repository(hub, made, capsys):
    hub.add_repo("ann/tiny", {"config.json": b"{}"})
    assert "is public, this push shall be private" in failure(capsys, made / "tiny", "tiny", "--private", "--commit")
    assert set(hub.repos["ann/tiny"].head) == {".gitattributes", "config.json"}


def test_a_pull_request_needs_a_repository(hub, made, capsys):
    assert "to open a pull request on" in failure(capsys, made / "tiny", "new", "--pr") and not hub.repos


def test_nothing_but_the_model_and_its_card_is_published(hub, made, tmp_path):

    folder = shutil.copytree(made / "tiny", tmp_path / "tiny")
    (folder / ".env").write_text("secret")
    (folder / "notes.txt").write_text("mine")
    assert run("push", folder, "tiny", "--public") == 0
    assert set(hub.repos["ann/tiny"].head) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        WEIGHTS,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vq4dit.json",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rich-corp/tiny"], "may not publish as rich-corp"),
        (["bad name!"], "bad name!"),
        (["tiny", "--report", "/nowhere"], "has no report.json"),
    ],
    ids=["organisation", "name", "report"],
)
def test_wrong_input_is_told_before_anything_is_sent(hub, made, capsys, arguments, words):
    assert words in failure(capsys, made / "tiny", *arguments) and not hub.repos


def to_a_link(path, secret):
    path.unlink()
    path.symlink_to(secret)


STRANGE = {
    "a link": to_a_link,
    "a dangling link": lambda path, secret: to_a_link(path, secret / "nowhere"),
    "gone": lambda path, secret: path.unlink(),
    "another file": lambda path, secret: path.write_bytes(secret.read_bytes()),
    "a folder": lambda path, secret: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("has_record", [True, False], ids=["", "of an earlier version"])
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
def test_only_pictures_that_compare_drew_are_published(hub, made, tmp_path, capsys, change, has_record):
    report = shutil.copytree(made / "compared", tmp_path / "compared")
    if not has_record:
        (report / "vq4dit.json").unlink()
        assert run("push", made / "tiny", "tiny", "--report", report, "--card", tmp_path / "card.md") == 0
    (tmp_path / "id_rsa").write_text("secret")
    change(report / "pairs.png", tmp_path / "id_rsa")
    said = failure(capsys, made / "tiny", "tiny", "--report", report)
    assert f"{report / 'pairs.png'} is missing, or not as `compare` wrote it" in said and not hub.repos


def test_a_report_that_is_a_link_is_not_published(hub, made, tmp_path, capsys):
    report = shutil.copytree(made / "compared", tmp_path / "compared")
    shutil.move(report / "report.json", tmp_path / "report.json")
    (report / "report.json").symlink_to(tmp_path / "report.json")
    assert "report.json is missing, or not as" in failure(capsys, made / "tiny", "tiny", "--report", report) and not hub.repos


def test_an_original_model_is_not_pushed(hub, model_folder, capsys):
    assert "quantize first" in failure(capsys, model_folder, "tiny") and not hub.repos


def test_without_a_login_it_says_how_to_get_one(made, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in failure(capsys, made / "tiny", "tiny")


def test_interrupted_it_can_be_repeated(hub, made, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("vq4dit.hub.push._Attempt.commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("push", made / "tiny", "tiny", "--public") == 130
    assert "go on with the same command" in capsys.readouterr().err
    assert set(hub.repos["ann/tiny"].head) == {".gitattributes"}
    assert run("push", made / "tiny", "tiny", "--public") == 0 and hub.count("PUT /lfs/") == 2
