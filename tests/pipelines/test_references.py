"""A result that refers to its base for what is not quantized is the same pipeline as one that holds a copy, or is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from referring import SETTINGS, contents, index_of, made
from tiny import new_pipeline

import vq4dit
from vq4dit.cli.main import main
from vq4dit.disk import space
from vq4dit.errors import FormatError, HubError, JobError, UnsupportedModelError, VQ4DiTError
from vq4dit.pipelines.inspect import inspect
from vq4dit.pipelines.load import load_pipeline, source_folder
from vq4dit.pipelines.provenance import Origin
from vq4dit.pipelines.references import COMMIT, KEY, check_base
from vq4dit.recipes.estimate import estimate


@pytest.fixture
def base(hub, model_folder) -> str:
    hub.add_repo("ann/base", contents(Path(model_folder)))
    return "ann/base"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """As on the machine of somebody who never loaded the base."""

    def begin(name: str = "cache") -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name))

    return begin


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def result(base, kept, tmp_path_factory, tmp_path) -> Path:
    """The base by reference; made once, since its commit is the same in all tests."""
    if "result" not in kept:
        kept["result"] = made(base, tmp_path_factory.mktemp("kept") / "q")
    return Path(shutil.copytree(kept["result"], tmp_path / "q"))


def changed(folder: Path, target: Path, **entries: object) -> Path:
    """A copy of a result, of whose reference some entries are others."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    index[KEY] |= entries
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def drawn(pipeline, **call: object) -> np.ndarray:
    conditions = {"prompt": "a cat"} if call else {"class_labels": [0, 1]}
    generator = torch.Generator().manual_seed(0)
    result = pipeline(**conditions, **call, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(result.frames if "frames" in result else result.images)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def failure(capsys, *words: object) -> str:
    capsys.readouterr()
    assert run(*words) == 1
    return " ".join(capsys.readouterr().err.split())


# --- the same pipeline ---


@pytest.mark.parametrize("name", ["pixart-sigma", "flux", "wan22"])
def test_copy_and_reference_draw_the_same_bit_for_bit(hub, tmp_path, name, empty_cache):
    tiny_pipelines.build(name).save_pretrained(tmp_path / "original", max_shard_size="50KB")  # shards and their index
    hub.add_repo(f"ann/{name}", contents(tmp_path / "original"))
    copy, reference = (made(f"ann/{name}", tmp_path / way, way) for way in ("copy", "reference"))
    empty_cache()
    hub.requests.clear()
    call = tiny_pipelines.CALLS[name]
    assert np.array_equal(*(drawn(load_pipeline(str(folder)), **call) for folder in (copy, reference)))
    assert not hub.count("GET .*/resolve/.*/transformer(_2)?/")  # which nobody needs of the base


def test_a_base_in_a_half_type_is_referenced_as_it_is(hub, tmp_path, empty_cache):
    new_pipeline().to(torch.float16).save_pretrained(tmp_path / "original", variant="fp16")
    hub.add_repo("ann/half", contents(tmp_path / "original"))
    copy, reference = (made("ann/half", tmp_path / way, way) for way in ("copy", "reference"))
    empty_cache()
    assert np.array_equal(*(drawn(load_pipeline(str(folder))) for folder in (copy, reference)))


def test_another_variant_that_came_into_the_cache_is_not_taken_instead(hub, model_folder, tmp_path, empty_cache):
    new_pipeline().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    other = contents(tmp_path / "half")
    whole = {name: data for name, data in contents(Path(model_folder)).items() if not name.startswith("transformer/")}
    hub.add_repo("ann/both", whole | {name: data for name, data in other.items() if name not in whole})
    empty_cache()
    folder = made("ann/both", tmp_path / "q")
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in index_of(folder)[KEY]["files"]
    before = drawn(load_pipeline(str(folder)))
    snapshot_download("ann/both")
    assert np.array_equal(drawn(load_pipeline(str(folder))), before)


def test_a_reference_result_holds_no_weights_but_the_transformers_and_all_of_the_index(hub, base, tmp_path):
    copy, reference = made(base, tmp_path / "copy", "copy"), made(base, tmp_path / "reference")
    gone = contents(copy).keys() - contents(reference).keys()
    assert gone == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    same = contents(reference).keys() - {"model_index.json", "vq4dit.json"}
    assert all(contents(copy)[name] == contents(reference)[name] for name in same)
    entry = index_of(reference).pop(KEY)
    assert {name: value for name, value in index_of(reference).items() if name != KEY} == index_of(copy)
    assert entry["model"] == "ann/base" and entry["revision"] == hub.repos["ann/base"].refs["main"]
    assert entry["files"] == {name: len(contents(copy)[name]) for name in gone}


def test_what_was_loaded_by_reference_is_saved_with_everything_and_without_a_path_of_this_machine(base, tmp_path):
    copy = made(base, tmp_path / "copy", "copy")
    vq4dit.save(load_pipeline(str(made(base, tmp_path / "reference"))), tmp_path / "again")
    names = {name for name in contents(copy) if name.endswith(".safetensors")}
    assert all(contents(tmp_path / "again")[name] == contents(copy)[name] for name in names)
    assert not any(str(tmp_path).encode() in data or b"snapshots" in data for data in contents(tmp_path / "again").values())


def test_diffusers_alone_fails_and_draws_nothing_with_something_else(base, result):
    with pytest.raises(OSError, match="no file named config.json found in directory"):
        DiffusionPipeline.from_pretrained(result)
    whole = DiffusionPipeline.from_pretrained(result, vae=new_pipeline().vae)  # a part that is given needs no reference
    assert np.array_equal(drawn(whole), drawn(load_pipeline(str(result))))


# --- the terminal ---


def test_the_whole_way_in_a_terminal(base, tmp_path, capsys):
    assert run("quantize", base, "--output", tmp_path / "q", "--recipe", "kmeans", "--components", "reference", "--json") == 0
    assert KEY in index_of(tmp_path / "q") and not (tmp_path / "q" / "vae").exists()
    assert run("sample", tmp_path / "q", "--labels", "cat", "--steps", 1, "--output", tmp_path / "cat.png") == 0
    assert run("compare", base, tmp_path / "q", "--steps", 1, "--output", tmp_path / "c") == 0
    again = ["quantize", base, "--output", tmp_path / "q", "--recipe", "kmeans", "--resume"]
    assert run(*again, "--components", "reference") == 0  # it is finished
    assert "vae differs. Pass --overwrite" in failure(capsys, *again)
    assert run(*again, "--overwrite") == 0 and KEY not in index_of(tmp_path / "q")
    assert "vae differs. Pass --overwrite" in failure(capsys, *again, "--components", "reference")


def test_a_folder_has_nothing_to_refer_to_and_that_is_said_before_the_work(model_folder, tmp_path, capsys):
    said = failure(capsys, "quantize", model_folder, "--output", tmp_path / "q", "--components", "reference")
    assert "only of a repository on the Hub (owner/name) at a commit, got" in said and "take --components copy" in said
    assert not (tmp_path / "q").exists() and not (tmp_path / "q.job").exists()


@pytest.mark.parametrize("revision", [None, "", "main", "abcdef0", "A" * 40, "0" * 41])
def test_only_a_commit_can_be_referenced(revision):
    with pytest.raises(
        VQ4DiTError, match="at a commit, got 'ann/base' (at revision .*|without a commit.*): take --components copy"
    ):
        check_base("ann/base", revision)


def test_a_save_that_cannot_know_the_base_is_refused(base, tmp_path, model_folder):
    quantized = vq4dit.quantize(new_pipeline(), SETTINGS)
    with pytest.raises(ValueError, match="needs source"):
        vq4dit.save(quantized, tmp_path / "q", components="reference")
    with pytest.raises(VQ4DiTError, match="can be referenced only of a repository"):
        vq4dit.save(quantized, tmp_path / "q", components="reference", source=model_folder)
    assert not (tmp_path / "q").exists()


def test_sizes_and_estimates_know_what_is_copied(base, model_folder):
    found = inspect(base)
    vae = (Path(model_folder) / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    assert found.other_bytes == inspect(model_folder).other_bytes == {"vae": vae}
    costs = [estimate(found, SETTINGS, "cpu", way).disk_bytes for way in ("copy", "reference")]
    assert costs[0] - costs[1] == vae and costs[0] == estimate(found, SETTINGS, "cpu").disk_bytes


# --- a base that cannot be had ---


def test_without_a_network_the_cache_will_do(base, result, monkeypatch, empty_cache):
    empty_cache()
    before = drawn(load_pipeline(str(result)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(drawn(load_pipeline(str(result))), before)
    empty_cache("another")
    with pytest.raises(HubError, match=f"fetch vae of {base} at commit {COMMIT.pattern}: offline.*Unset.*--components copy"):
        load_pipeline(str(result))


@pytest.mark.parametrize("state", ["removed", "private", "gated", "without the commit", "without a file"])
def test_a_base_that_is_gone_is_told_with_its_commit_and_a_way_out(hub, base, result, empty_cache, state):
    repo = hub.repos[base]
    empty_cache()
    if state == "removed":
        del hub.repos[base]
    elif state == "without the commit":
        hub.repos[base] = type(repo)()
        hub.repos[base].commit("main", repo.head, "history was rewritten")
    elif state == "without a file":
        del repo.head["vae/config.json"]
    else:
        setattr(repo, state, True)
    with pytest.raises(HubError, match=f"fetch vae of {base} at commit {COMMIT.pattern}: .*--components copy"):
        load_pipeline(str(result))


def test_a_private_base_is_read_with_the_login_that_is_given(hub, base, result, ann, empty_cache):
    hub.repos[base].private = True
    empty_cache()
    assert load_pipeline(str(result), token=ann.token).vae is not None


def test_a_later_commit_of_the_base_changes_nothing(hub, base, result, empty_cache):
    before = drawn(load_pipeline(str(result)))
    hub.repos[base].commit("main", {}, "everything is gone")
    empty_cache()
    assert np.array_equal(drawn(load_pipeline(str(result))), before)


def test_files_of_another_size_than_those_that_were_quantized_are_refused(base, result, tmp_path):
    files = index_of(result)[KEY]["files"]
    with pytest.raises(FormatError, match="bytes in vae/config.json at commit .*, not the 1 that were quantized"):
        load_pipeline(str(changed(result, tmp_path / "r", files=files | {"vae/config.json": 1})))


def test_more_than_was_promised_is_not_even_fetched(hub, base, result, tmp_path, empty_cache):
    files = index_of(result)[KEY]["files"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    empty_cache()
    with pytest.raises(FormatError, match=f"bytes in {weights} at commit .*, not the 9 that"):
        load_pipeline(str(changed(result, tmp_path / "r", files=files | {weights: 9})))
    assert not hub.count("/resolve/")


def test_a_branch_that_is_called_like_a_commit_is_none(hub, base, result, tmp_path, empty_cache):
    hub.repos[base].commit("f" * 40, dict(hub.repos[base].head), "on a branch")
    empty_cache()
    with pytest.raises(FormatError, match="has a branch or tag called f{40}, and no commit"):
        load_pipeline(str(changed(result, tmp_path / "r", revision="f" * 40)))


def test_what_does_not_fit_on_the_disk_is_not_fetched(hub, base, result, monkeypatch, empty_cache):
    empty_cache()
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1))
    with pytest.raises(JobError, match="the disk has 1 bytes left"):
        load_pipeline(str(result))


# --- what a stranger's index may say ---

REFUSED = {
    "a folder of this machine": {"model": "/etc"},
    "a folder above": {"model": "../base"},
    "a name without an owner": {"model": "base"},
    "a name with a colon": {"model": "hf://ann/base"},
    "no name": {"model": None},
    "a branch": {"revision": "main"},
    "a short commit": {"revision": "abcdef0"},
    "no commit": {"revision": None},
    "a commit with a line behind it": {"revision": "0" * 40 + "\n"},
    "no files": {"files": {}},
    "a list of files": {"files": ["vae/config.json"]},
    "another entry": {"trust_remote_code": True},
    **{
        name: {"files": {name: 5}}
        for name in (
            "../secret.safetensors",
            "vae/../../secret.safetensors",
            "/etc/passwd",
            "vae/diffusion_pytorch_model.bin",
            "vae/pytorch_model.pt",
            "vae/modeling.py",
            "vae/a/b.safetensors",
            "vae/*.safetensors",
            "vae/adapter_config.json",
            "model_index.json",
            "unet/config.json",  # no part of this pipeline
            "scheduler/config.json",  # without weights
        )
    },
    "bytes below zero": {"files": {"vae/config.json": -1}},
    "bytes in words": {"files": {"vae/config.json": "5"}},
    "bytes that are true": {"files": {"vae/config.json": True}},
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory, quantized_folder) -> Path:
    """A result with a reference to a repository that nobody will ask for."""
    folder = Path(shutil.copytree(quantized_folder, tmp_path_factory.mktemp("honest") / "q"))
    files = {f"vae/{path.name}": path.stat().st_size for path in (folder / "vae").iterdir()}
    shutil.rmtree(folder / "vae")
    entry = {KEY: {"model": "ann/base", "revision": "0" * 40, "files": files}}
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | entry))
    return folder


@pytest.mark.parametrize("entries", REFUSED.values(), ids=REFUSED.keys())
def test_a_reference_to_anything_but_safetensors_of_a_commit_is_refused_before_anything_is_asked(
    hub, honest, tmp_path, entries
):
    folder = changed(honest, tmp_path / "q", **entries)
    with pytest.raises(FormatError, match=f"{KEY} must .*, found .*: do not trust this model, or download"):
        load_pipeline(str(folder))
    assert not hub.requests


@pytest.mark.parametrize("entry", [None, [], "ann/base", {}, {"model": "ann/base"}], ids=str)
def test_a_reference_of_another_shape_is_refused(honest, tmp_path, entry):
    folder = Path(shutil.copytree(honest, tmp_path / "q"))
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | {KEY: entry}))
    with pytest.raises(FormatError, match=f"{KEY} must have model, revision and files"):
        load_pipeline(str(folder))


def test_the_quantized_part_itself_cannot_come_from_elsewhere(honest, tmp_path, hub):
    names = {f"transformer/{name}": 5 for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    with pytest.raises(FormatError, match="holds transformer/, and says that it is transformer of ann/base"):
        load_pipeline(str(changed(honest, tmp_path / "q", files=names)))


def test_a_folder_of_that_name_beside_us_is_not_what_is_meant(hub, base, result, tmp_path, monkeypatch, empty_cache):
    before = drawn(load_pipeline(str(result)))
    other = new_pipeline()
    with torch.no_grad():
        for parameter in other.vae.parameters():
            parameter.zero_()
    other.save_pretrained(tmp_path / base)
    monkeypatch.chdir(tmp_path)
    empty_cache()
    assert np.array_equal(drawn(load_pipeline(str(result))), before)


@pytest.mark.parametrize("file", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_base_is_looked_at_like_every_other_model(hub, model_folder, honest, tmp_path, file):
    files = contents(Path(model_folder))
    if file.endswith(".json"):
        broken = json.dumps(json.loads(files[file]) | {"block_out_channels": [2**20]}).encode()
    else:
        broken = files[file][:-64]
    repo = hub.add_repo("ann/broken", files | {file: broken})
    sizes = {name: len(repo.head[name]) for name in files if name.startswith("vae/")}
    folder = changed(honest, tmp_path / "q", model="ann/broken", revision=repo.refs["main"], files=sizes)
    with pytest.raises(FormatError, match="vae"):
        load_pipeline(str(folder))


def test_an_origin_without_a_commit_is_no_base(tmp_path, base):
    quantized = vq4dit.quantize(load_pipeline(base), SETTINGS)
    with pytest.raises(VQ4DiTError, match="at revision 'main'"):
        vq4dit.save(
            quantized,
            tmp_path / "q",
            components="reference",
            source=source_folder(base),
            origin=Origin(model=base, revision="main"),
        )


def test_an_original_with_a_reference_is_refused_since_nobody_may_read_by_it_what_others_fetched(base, result, hub, tmp_path):
    """Its text encoder, say, would be a gated repository's, out of a cache that many logins fill, and then in a result."""
    folder = Path(shutil.copytree(source_folder(base), tmp_path / "original", symlinks=False))
    shutil.rmtree(folder / "vae")
    entry = {KEY: index_of(result)[KEY]}
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | entry))
    hub.add_repo("ann/sly", contents(folder))
    for model in (str(folder), "ann/sly"):
        with pytest.raises(UnsupportedModelError, match="parts that are another repository's"):
            inspect(model)


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a/b", "a b", ""])
def test_a_part_has_the_name_of_a_folder_of_the_pipeline(model_folder, tmp_path, name):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "model_index.json").write_text(json.dumps(index_of(folder) | {name: ["diffusers", "DiTTransformer2DModel"]}))
    for look in (inspect, load_pipeline):
        with pytest.raises(FormatError, match="cannot be the name of a part"):
            look(str(folder))
