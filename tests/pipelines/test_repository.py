"""Which files of a pipeline count, in a folder, on the Hub, and in a copy of it without a network."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import new_pipeline

from vq4dit.errors import FormatError, VQ4DiTError
from vq4dit.pipelines.inspect import inspect, tensor_bytes
from vq4dit.pipelines.load import load_pipeline, pinned
from vq4dit.pipelines.repository import choose, hub_id, located, weights, weights_in

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The same transformer in shards, with their index."""
    folder = tmp_path_factory.mktemp("shards")
    new_pipeline().transformer.save_pretrained(folder, max_shard_size="300KB")
    return folder


def test_shards_left_over_from_another_save_do_not_count(folder, shards):
    alone = tensor_bytes(str(folder))
    for shard in shards.glob("*-of-*"):
        shutil.copy(shard, folder / "transformer")
    assert tensor_bytes(str(folder)) == inspect(str(folder)).file_bytes == alone


def test_a_single_file_left_over_beside_an_index_does_not_count(folder, shards):
    wanted = sum(shard.stat().st_size for shard in shards.glob("*-of-*"))
    for path in shards.iterdir():
        shutil.copy(path, folder / "transformer")
    found = weights(str(folder))
    assert found.num_bytes == wanted and SINGLE not in found.files
    assert found.tensors.keys() == weights_in(folder / "transformer").tensors.keys()


@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_a_folder_that_has_only_a_variant_is_read(tmp_path, variant):
    new_pipeline().save_pretrained(tmp_path, variant=variant)
    assert weights(str(tmp_path)).variant == variant
    assert (
        inspect(str(tmp_path)).file_bytes == (tmp_path / f"transformer/{SINGLE.replace('.', f'.{variant}.', 1)}").stat().st_size
    )
    assert load_pipeline(str(tmp_path)).transformer.config.num_layers == 2


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([SINGLE, "diffusion_pytorch_model.fp16.safetensors"], ((SINGLE,), None)),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"], "bf16"),
        (["diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "fp16"),
    ],
)
def test_the_most_exact_variant_is_chosen(names, chosen):
    wanted = chosen if isinstance(chosen, tuple) else ((f"diffusion_pytorch_model.{chosen}.safetensors",), chosen)
    assert choose(names, "x", lambda name: {}) == wanted


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {"a": "shard.safetensors"}},
        {"metadata": {}, "weight_map": []},
        {"metadata": {}, "weight_map": {}},
        {"metadata": {}, "weight_map": {"a": 1}},
        {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}},
        {"metadata": {}, "weight_map": {"a": "../vae/x.safetensors"}},
        {"metadata": {}, "weight_map": {"a": "missing.safetensors"}},
    ],
    ids=str,
)
def test_an_index_names_safetensors_beside_it_or_is_refused(folder, index):
    (folder / "transformer" / INDEX).write_text(json.dumps(index))
    for look in (inspect, load_pipeline):
        with pytest.raises(FormatError, match=INDEX):
            look(str(folder))


def test_a_part_without_safetensors_says_what_would_do(folder):
    (folder / "transformer" / SINGLE).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(VQ4DiTError, match=r"an index and its shards; a variant such as .fp16 will do\): vq4dit loads nothing"):
        inspect(str(folder))


def test_a_file_is_no_folder_and_the_way_out_is_told(folder):
    with pytest.raises(VQ4DiTError, match="is a file, and a pipeline is a folder .*: name the folder"):
        inspect(str(folder / "transformer" / SINGLE))


def test_names_that_the_file_system_does_not_take_are_refused(folder):
    for name in ("x" * 5000, "a/" + "x" * 5000):
        with pytest.raises(VQ4DiTError):
            inspect(name)


def test_folders_are_found_below_home_and_with_a_slash_behind(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert located("~/model") == folder == located(f"{folder}/")
    assert inspect("~/model").file_bytes == inspect(f"{folder}/").file_bytes


def test_a_repository_in_the_cache_is_looked_at_and_loaded_without_a_network(hub, model_folder, monkeypatch):
    files = {str(p.relative_to(model_folder)): p.read_bytes() for p in Path(model_folder).rglob("*") if p.is_file()}
    hub.add_repo("ann/cached", files)
    load_pipeline("ann/cached")
    online, commit = inspect("ann/cached"), pinned("ann/cached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pinned("ann/cached") == commit
    assert [p.file_bytes for p in inspect("ann/cached", revision=commit).predictions] == [
        p.file_bytes for p in online.predictions
    ]
    assert load_pipeline("ann/cached", revision=commit).transformer.config.num_layers == 2
    with pytest.raises(VQ4DiTError, match="check the path or the network"):
        inspect("ann/never-seen")


def test_a_variant_of_a_repository_is_loaded(hub, tmp_path):
    new_pipeline().save_pretrained(tmp_path, variant="fp16")
    hub.add_repo("ann/half", {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})
    assert inspect("ann/half").num_blocks == 2
    assert load_pipeline("ann/half").transformer.config.num_layers == 2


@pytest.mark.parametrize("kind", ["cut", "pipe"])
def test_a_damaged_safetensors_file_is_refused_by_name(folder, kind):
    path = folder / "transformer" / SINGLE
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        import os

        os.mkfifo(path)
    else:
        path.write_bytes(content[:-100])
    for look in (inspect, load_pipeline):
        with pytest.raises(FormatError, match=SINGLE):
            look(str(folder))


def test_an_empty_header_lacks_every_tensor(folder):
    save_file({}, folder / "transformer" / SINGLE)
    with pytest.raises(FormatError, match="lacks the tensor|describes a larger model"):
        inspect(str(folder))


@pytest.mark.parametrize(
    ("pasted", "name"),
    [
        ("https://huggingface.co/ann/tiny-dit", "ann/tiny-dit"),
        ("http://www.huggingface.co/ann/tiny-dit/", "ann/tiny-dit"),
        ("huggingface.co/ann/tiny.dit_2?library=diffusers", "ann/tiny.dit_2"),
        ("https://hf.co/ann/tiny-dit/tree/main#files", "ann/tiny-dit"),
        (" https://huggingface.co/ann/tiny-dit ", "ann/tiny-dit"),
    ],
)
def test_a_pasted_address_is_a_name(pasted, name):
    assert hub_id(pasted) == name


@pytest.mark.parametrize(
    "text",
    [
        "ann/tiny-dit",
        "./folder",
        "C:\\models\\dit",
        "https://huggingface.co/ann/tiny-dit/tree/fp16",  # another revision is another model
        "https://huggingface.co/datasets/ann/pictures",
        "https://huggingface.co/spaces/ann/app",
        "https://example.org/ann/tiny-dit",
        "https://huggingface.co.evil.org/ann/tiny-dit",
        "",
    ],
)
def test_anything_else_is_left_as_it_is(text):
    assert hub_id(text) == text


def test_a_mirror_of_the_hub_is_known_by_its_address(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    assert hub_id("https://mirror.example/ann/tiny-dit") == "ann/tiny-dit"
    assert hub_id("https://mirrorXexample/ann/tiny-dit") == "https://mirrorXexample/ann/tiny-dit"
