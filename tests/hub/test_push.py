"""A push to the loopback Hub, and the model back from it."""

import shutil

import pytest
from hub_fixtures import publish

from vq4dit.cli.push import write_card
from vq4dit.errors import HubError, JobError
from vq4dit.hub.push import same_image


def test_a_pushed_model_is_complete_and_gives_the_same_image(hub, ann, quantized_folder):
    pushed = publish(quantized_folder, ann)
    files = hub.repos["ann/tiny"].head
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(files)
    assert len(hub.repos["ann/tiny"].commits) == 2 and not pushed.was_there
    assert same_image(quantized_folder, pushed, ann)


def test_only_what_index_and_configurations_name_is_published(hub, ann, quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "q")
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "transformer" / "id_rsa").symlink_to(tmp_path / "id_rsa")
    (folder / "transformer" / "deep").symlink_to(tmp_path, target_is_directory=True)
    for name in (
        ".env",
        "vae/.env",
        "vae/notes.txt",
        "vae/diffusion_pytorch_model.bin",
        "transformer/old.safetensors",
        "README.md",
    ):
        (folder / name).write_bytes((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    publish(folder, ann)
    wanted = {path.relative_to(quantized_folder).as_posix() for path in quantized_folder.rglob("*") if path.is_file()}
    assert set(hub.repos["ann/tiny"].head) - {".gitattributes"} == wanted | {"README.md"}
    assert b"# tiny" in hub.repos["ann/tiny"].head["README.md"]


@pytest.mark.parametrize("name", ["vae/config.json", "vq4dit.json", "transformer/diffusion_pytorch_model.safetensors", "vae"])
def test_a_link_out_of_the_model_is_not_published(hub, ann, quantized_folder, tmp_path, name):
    folder = shutil.copytree(quantized_folder, tmp_path / "q")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError, match=f"{name}.* is a link to a file outside of the model's folder.*put a copy"):
        publish(folder, ann)
    assert "ann/tiny" not in hub.repos


def unrecorded(folder):
    (folder / "vq4dit.json").write_text("{}")
    return folder


@pytest.mark.parametrize("earlier", [False, True], ids=["", "of an earlier version"])
def test_a_link_to_another_file_of_the_folder_is_not_published(hub, ann, quantized_folder, tmp_path, earlier):
    folder = shutil.copytree(quantized_folder, tmp_path / "q")
    if earlier:
        unrecorded(folder)
    (folder / ".env").write_text((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("../.env")
    with pytest.raises(HubError, match="vae/config.json is a link to .* no part of the model"):
        publish(folder, ann)
    assert "ann/tiny" not in hub.repos


@pytest.mark.parametrize("earlier", [False, True], ids=["", "of an earlier version"])
def test_names_of_other_kinds_of_parts_are_not_published(hub, ann, quantized_folder, tmp_path, earlier):
    folder = shutil.copytree(quantized_folder, tmp_path / "q")
    wanted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if earlier:
        unrecorded(folder)
    for name in ("vae/vocab.txt", "vae/scheduler_config.json", "scheduler/config.json", "transformer/tokenizer.json"):
        (folder / name).write_text("{}")
    publish(folder, ann)
    assert set(hub.repos["ann/tiny"].head) - {".gitattributes", "README.md"} == wanted


@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_what_was_changed_since_it_was_made_is_not_published(hub, ann, quantized_folder, tmp_path, gone):
    folder = shutil.copytree(quantized_folder, tmp_path / "q")
    path = folder / "scheduler" / "scheduler_config.json"
    path.unlink() if gone else path.write_text(path.read_text() + "\n")
    with pytest.raises(HubError, match="scheduler_config.json is missing, or was changed since the model was quantized.*save"):
        publish(folder, ann)
    assert "ann/tiny" not in hub.repos


@pytest.mark.parametrize("kind", ["link", "dangling", "missing", "folder"])
def test_evidence_that_is_no_file_is_not_published(hub, ann, quantized_folder, tmp_path, kind):
    path = tmp_path / "pairs.png"
    if kind in ("link", "dangling"):
        (tmp_path / "id_rsa").write_text("secret") if kind == "link" else None
        path.symlink_to(tmp_path / "id_rsa")
    if kind == "folder":
        path.mkdir()
    with pytest.raises(HubError, match="pairs.png .for samples.png. is missing, or is a link, which is not published"):
        publish(quantized_folder, ann, extras={"samples.png": path})
    assert "ann/tiny" not in hub.repos


def test_a_card_to_look_at_replaces_no_file(tmp_path):
    write_card(tmp_path / "new" / "card.md", "the card")
    write_card(tmp_path / "new" / "card.md", "the card")
    write_card(tmp_path / "new" / "card.md", "another card")  # ours, and as we left it
    assert (tmp_path / "new" / "card.md").read_text().startswith("another card\n<!-- written by vq4dit, sha256 ")
    written = (tmp_path / "new" / "card.md").read_bytes()
    for theirs in (written.replace(b"another", b"a better"), written + b"more", b"the card", b"", written.partition(b"<")[0]):
        (tmp_path / "new" / "card.md").write_bytes(theirs)
        with pytest.raises(JobError, match="card.md is there already and says something else"):
            write_card(tmp_path / "new" / "card.md", "the card")
        assert (tmp_path / "new" / "card.md").read_bytes() == theirs
