"""A push to the loopback Hub, and the model back from it."""

import shutil

import pytest
from hub_fixtures import publish

from vq4dit.cli_push import write_card
from vq4dit.errors import HubError, JobError
from vq4dit.hub import same_image


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
