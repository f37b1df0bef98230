"""Saving replaces nothing but results of ours, and leaves the parts that are not quantized as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.disk import record
from vq4dit.disk.job import fingerprint
from vq4dit.disk.record import recorded
from vq4dit.errors import FormatError, JobError
from vq4dit.pipelines.inventory import is_of_pipeline, part_files, pipeline_files, without_variant
from vq4dit.pipelines.provenance import Origin, made_by, origin_of, read_origin
from vq4dit.pipelines.save import is_result, result_files

VAE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def quantized():
    return vq4dit.quantize(new_pipeline(), quick_settings(recipe="kmeans"))


@pytest.fixture
def half(tmp_path) -> Path:
    """The tiny pipeline as it is often published: in fp16."""
    new_pipeline().to(torch.float16).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(path: Path, content: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


# --- what is replaced ---


def test_a_result_of_ours_is_replaced_when_asked_to(tmp_path, quantized):
    vq4dit.save(quantized, str(tmp_path / "out"), max_shard_size="60KB")
    vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert set(contents(tmp_path / "out")) == result_files(tmp_path / "out") == {*recorded(tmp_path / "out"), "vq4dit.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("extra", [None, "lora.safetensors", ".git/config", "vq4dit.json"])
def test_an_original_model_is_never_replaced(tmp_path, quantized, model_folder, extra):
    shutil.copytree(model_folder, tmp_path / "out")
    if extra:
        put(tmp_path / "out" / extra, "{}")
    before = contents(tmp_path)
    with pytest.raises(JobError, match="none of our results"):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "theirs",
    ["lora.safetensors", ".git/config", "README.md", "vae/.env", "transformer/notes.txt", "text_encoder/model.safetensors"]
    + [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ],
)
def test_a_result_with_somebody_elses_file_is_not_replaced_and_the_file_is_named(tmp_path, quantized, theirs):
    vq4dit.save(quantized, tmp_path / "out")
    put(tmp_path / "out" / theirs)
    before = contents(tmp_path)
    with pytest.raises(JobError, match=f"holds what is not ours and would be lost: .*{Path(theirs).name}"):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


CHANGES = {
    "weights of their own": lambda out: (out / "vae" / VAE).write_bytes(b"mine"),
    "other weights of that size": lambda out: (out / "vae" / VAE).write_bytes(bytes((out / "vae" / VAE).stat().st_size)),
    "an edited scheduler": lambda out: put(out / "scheduler" / "scheduler_config.json", '{"beta_end": 1}'),
    "a part in the index": lambda out: (
        put(out / "model_index.json", (out / "model_index.json").read_text().replace("{", '{"tagger": ["t", "T"],', 1)),
        put(out / "tagger" / "config.json", "{}"),
    ),
    "an edited record": lambda out: put(out / "vq4dit.json", (out / "vq4dit.json").read_text() + " "),
    **{
        name: lambda out, name=name: put(out / name, "{}")
        for name in ("vae/preprocessor_config.json", "vae/tokenizer.json", "scheduler/vocab.txt", "transformer/merges.txt")
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_result_that_somebody_changed_is_not_replaced(tmp_path, quantized, change):
    vq4dit.save(quantized, tmp_path / "out")
    change(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(JobError, match="(would be lost|may be replaced).*[Mm]ove .*away, or choose another output"):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_a_result_of_an_earlier_version_loads_and_is_not_replaced(tmp_path, quantized):
    vq4dit.save(quantized, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "vq4dit.json").read_text())
    put(tmp_path / "out" / "vq4dit.json", json.dumps({key: said[key] for key in said if key not in ("files", "seal")}))
    assert read_origin(tmp_path / "out").settings == said["settings"]
    assert is_result(tmp_path / "out", quick_settings(recipe="kmeans"), fingerprint(new_pipeline()))
    DiTPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(
        JobError, match="is of an earlier version, and does not tell which files are ours. Move the folder away"
    ):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "vae/../../secret", "", ".", "vae//config.json", "a\\b"])
def test_a_strangers_record_names_only_what_lies_below_its_folder(tmp_path, name):
    put(tmp_path / "out" / "vae" / "config.json", "{}")
    put(tmp_path / "secret")
    values = {"files": {name: [4, "0" * 64]}}
    (tmp_path / "out" / "vq4dit.json").write_bytes(record._encoded(values | {"seal": record._seal(values)}))
    assert recorded(tmp_path / "out") is None


def test_a_result_may_be_read_by_whoever_may_read_what_others_write(tmp_path, quantized):
    vq4dit.save(quantized, tmp_path / "out")
    put(tmp_path / "other")
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_left_overs_of_nobody_known_beside_the_output_stay(tmp_path, quantized):
    for name in (".out.partial", ".out.previous"):
        put(tmp_path / name / "thesis.txt")
    vq4dit.save(quantized, tmp_path / "out")
    vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.partial", ".out.previous"}
    assert (tmp_path / ".out.previous" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("state", ["empty", "missing", "ours"])
def test_saving_to_a_link_writes_where_it_leads(tmp_path, quantized, state):
    target = tmp_path / "disk" / "models"
    target.parent.mkdir()
    if state == "empty":
        target.mkdir()
    if state == "ours":
        vq4dit.save(quantized, target)
    (tmp_path / "link").symlink_to(target, target_is_directory=True)
    vq4dit.save(quantized, tmp_path / "link", overwrite=state == "ours")
    assert (tmp_path / "link").is_symlink() and (target / "model_index.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"} and len(list(target.parent.iterdir())) == 1


def test_a_folder_without_a_name_is_no_place(quantized):
    with pytest.raises(ValueError, match="must have a name"):
        vq4dit.save(quantized, "")


# --- parts that are copied ---


def save(quantized, source: Path, **more) -> Path:
    vq4dit.save(quantized, source.parent / "out", source=source, **more)
    return source.parent / "out"


def test_what_is_not_quantized_is_copied_byte_for_byte(quantized, half):
    (half / "vae" / "config.json").write_text((half / "vae" / "config.json").read_text() + "\n")  # as somebody wrote it
    before, after = contents(half), contents(save(quantized, half))
    same = {name for name in after if before.get(name) == after[name]}
    assert same == {"model_index.json", "vae/config.json", f"vae/{VAE}", "scheduler/scheduler_config.json"}
    assert after.keys() == before.keys() | {"vq4dit.json"}


def test_the_index_says_of_copied_parts_what_it_said(quantized, half):
    index = json.loads((half / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]  # loads what DDIM wrote
    (half / "model_index.json").write_text(json.dumps(index))
    found = json.loads((save(quantized, half) / "model_index.json").read_text())
    assert found["scheduler"] == index["scheduler"] and found["id2label"] == index["id2label"]
    assert found["transformer"] == index["transformer"] and "_name_or_path" not in found
    assert type(DiTPipeline.from_pretrained(half.parent / "out").scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_only_files_that_would_be_loaded_are_copied(quantized, half):
    for name in ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.bin", ".env", "notes.txt"):
        put(half / "vae" / name)
    put(half / "unused" / "config.json", "{}")
    after = contents(save(quantized, half))
    assert {name for name in after if name.startswith(("vae/", "unused/"))} == {"vae/config.json", f"vae/{VAE}"}


def test_the_shards_of_an_index_are_copied_and_a_file_beside_them_is_not(quantized, half):
    tensors = load_file(half / "vae" / VAE)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, half / "vae" / shard, metadata={"format": "pt"})
    places = {key: shard for shard, keys in shards.items() for key in keys}
    put(half / "vae" / f"{VAE}.index.json", json.dumps({"metadata": {}, "weight_map": places}))
    found = {path.name for path in (save(quantized, half) / "vae").iterdir()}
    assert found == {"config.json", f"{VAE}.index.json", *shards}
    DiTPipeline.from_pretrained(half.parent / "out")


@pytest.mark.parametrize("shard", ["5GB", "10KB"], ids=["one file", "shards"])
def test_a_variant_is_copied_under_the_name_that_is_loaded_without_one(tmp_path, quantized, shard):
    model = new_pipeline().to(torch.float16)
    model.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard)
    out = save(quantized, tmp_path / "half")
    sizes = [sum(path.stat().st_size for path in (folder / "vae").glob("*.safetensors")) for folder in (out, tmp_path / "half")]
    assert sizes[0] == sizes[1]
    loaded = DiTPipeline.from_pretrained(out).vae.state_dict()
    assert all(torch.equal(tensor.float(), loaded[name]) for name, tensor in model.vae.state_dict().items())


def test_a_tokenizers_vocabulary_belongs_to_it_and_other_files_do_not(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "spiece.model", "secret.txt", "scheduler_config.json"):
        put(tmp_path / name, "{}")
    assert part_files(tmp_path, "T5TokenizerFast") == ["tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model"]
    assert part_files(tmp_path, "DDIMScheduler") == ["scheduler_config.json"]


FILES_OF_PARTS = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.txt")


@pytest.mark.parametrize(
    ("class_name", "wanted"),
    [
        ("AutoencoderKL", {"config.json"}),
        ("T5EncoderModel", {"config.json"}),
        ("FlowMatchEulerDiscreteScheduler", {"scheduler_config.json"}),
        ("CLIPTokenizer", {"tokenizer_config.json", "vocab.txt"}),
        ("CLIPImageProcessor", {"preprocessor_config.json", "tokenizer_config.json", "vocab.txt"}),
        ("CLIPFeatureExtractor", {"preprocessor_config.json", "tokenizer_config.json", "vocab.txt"}),
    ],
)
def test_a_part_has_the_files_of_its_kind_and_no_others(tmp_path, class_name, wanted):
    for name in FILES_OF_PARTS:
        put(tmp_path / name, "{}")
    assert set(part_files(tmp_path, class_name)) == wanted


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"../up": ["a", "b"]}', '{"vae": 1}', '{"vae": [null, null]}', "[" * 100_000], ids=repr
)
def test_an_index_that_names_no_part_of_the_folder_names_nothing(tmp_path, index):
    put(tmp_path / "model" / "model_index.json", index)
    put(tmp_path / "model" / "vae" / "config.json")
    put(tmp_path / "up" / "config.json")
    assert pipeline_files(tmp_path / "model") == ["model_index.json"]


@pytest.mark.parametrize("shard", ["../../up/x.safetensors", "/x.safetensors", "x.bin", ".safetensors", 7], ids=repr)
def test_an_index_of_shards_names_only_files_beside_it(tmp_path, shard):
    put(tmp_path / "up" / "x.safetensors")
    put(tmp_path / "model" / "vae" / "x.bin")
    put(tmp_path / "model" / "vae" / f"{VAE}.index.json", json.dumps({"weight_map": {"key": shard}}))
    assert part_files(tmp_path / "model" / "vae", "AutoencoderKL") == []


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "model.safetensors", "model.safetensors.index.json", "config.json"]
    + ["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"],
)
def test_a_name_without_a_variant_stays(name):
    assert without_variant(name) == name


def test_names_of_variants():
    assert without_variant("model.fp16.safetensors") == "model.safetensors"
    assert without_variant(f"{VAE}.index.bf16.json") == f"{VAE}.index.json"


def as_links(folder: Path, blobs: Path) -> None:
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(blobs / str(number))


def test_the_links_of_a_hub_cache_are_followed(tmp_path, quantized, half):
    snapshot = tmp_path / "models--ann--tiny" / "snapshots" / "0123456789abcdef"
    shutil.move(half, snapshot)
    before = contents(snapshot)
    as_links(snapshot, tmp_path / "models--ann--tiny" / "blobs")
    vq4dit.save(quantized, tmp_path / "out", source=snapshot)
    after = contents(tmp_path / "out")
    assert after[f"vae/{VAE}"] == before[f"vae/{VAE}"] and not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


BESIDE = {
    "blobs of no cache": ("model", "blobs/0"),
    "blobs around no cache": ("snapshots/model", "blobs/0"),
    "blobs of another repository": ("models--a--b/snapshots/0123", "models--c--d/blobs/0"),
    "a cache, but no blob": ("models--a--b/snapshots/0123", "models--a--b/secret"),
    "deep in the blobs": ("models--a--b/snapshots/0123", "models--a--b/blobs/deep/0"),
    "another file of the folder": ("model", "model/.env"),
}


@pytest.mark.parametrize(("folder", "target"), BESIDE.values(), ids=BESIDE.keys())
def test_a_link_is_of_the_pipeline_only_in_the_hubs_cache(tmp_path, folder, target):
    put(tmp_path / target)
    (tmp_path / folder / "vae").mkdir(parents=True)
    (tmp_path / folder / "vae" / "config.json").symlink_to(tmp_path / target)
    assert not is_of_pipeline(tmp_path / folder, "vae/config.json")


def test_a_link_into_its_own_blobs_is_of_a_snapshot(tmp_path):
    put(tmp_path / "models--a--b" / "blobs" / "0")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "vae" / "config.json").symlink_to("../../../blobs/0")
    (snapshot / "vae" / "gone.json").symlink_to("../../../blobs/1")
    (tmp_path / "cache").symlink_to(tmp_path / "models--a--b")  # as people who move their cache have it
    assert is_of_pipeline(snapshot, "vae/config.json") and not is_of_pipeline(snapshot, "vae/gone.json")
    assert is_of_pipeline(tmp_path / "cache" / "snapshots" / "0123", "vae/config.json")


def test_what_a_link_leads_to_outside_of_the_model_is_not_copied(tmp_path, quantized, half):
    put(tmp_path / "secret.json", json.dumps({"auths": "hf_secret"} | json.loads((half / "vae" / "config.json").read_text())))
    (half / "vae" / "config.json").unlink()
    (half / "vae" / "config.json").symlink_to(tmp_path / "secret.json")
    out = save(quantized, half)
    assert b"hf_secret" not in b"".join(contents(out).values())
    DiTPipeline.from_pretrained(out)


# --- how it was made ---


def test_the_record_says_how_it_was_made(quantized, half):
    settings = quick_settings(recipe="kmeans", keep=("*.ff.*",))
    out = save(quantized, half, origin=origin_of(str(half), None, settings))
    found = json.loads((out / "vq4dit.json").read_text())
    assert found["recipe"]["name"] == "kmeans" and found["recipe"]["version"] >= 10
    assert found["settings"] == settings.to_dict() and len(found["settings_hash"]) == 64
    assert {"vq4dit", "torch", "diffusers"} <= found["versions"].keys() and str(half) not in json.dumps(found)
    other = origin_of(str(half), None, quick_settings(recipe="kmeans", seed=1))
    assert other.settings_hash != found["settings_hash"]


def test_what_was_made_in_this_process_knows_how(tmp_path, quantized):
    vq4dit.save(quantized, tmp_path / "out")
    settings = quick_settings(recipe="kmeans")
    assert read_origin(tmp_path / "out") == made_by(settings, fingerprint(new_pipeline()))
    assert is_result(tmp_path / "out", settings, fingerprint(new_pipeline()))


def test_what_was_loaded_knows_as_much_as_its_configuration(tmp_path, quantized_folder):
    vq4dit.save(DiTPipeline.from_pretrained(quantized_folder), tmp_path / "out")
    assert read_origin(tmp_path / "out").settings == {"bits": 2, "recipe": "kmeans", "seed": 0}


def test_a_result_is_that_of_its_settings_and_its_model_only(tmp_path, quantized):
    settings = quick_settings(recipe="kmeans")
    made = Origin(settings=settings.to_dict(), fingerprint="abc", versions={"vq4dit": "1"})
    vq4dit.save(quantized, tmp_path / "out", origin=made)
    assert is_result(tmp_path / "out", settings) and is_result(tmp_path / "out", settings, "abc")
    assert not is_result(tmp_path / "out", settings, "abd")
    assert not is_result(tmp_path / "out", quick_settings(recipe="kmeans", keep=("*.ff.*",)))


@pytest.mark.parametrize(
    "content", ["{", "[]", "7", '{"settings": []}', '{"model": 5}', "[" * 100_000], ids=lambda text: text[:16]
)
def test_a_damaged_record_is_told(tmp_path, content):
    put(tmp_path / "vq4dit.json", content)
    with pytest.raises(FormatError, match="vq4dit.json .*delete it, and name the base"):
        read_origin(tmp_path)


@pytest.mark.parametrize(
    "card",
    ["---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: !!python/object:os.system x\n---\n", "---\n\tx\n---", "\x00"]
    + ["---\nlicense: 2026-01-01\nlanguage: {a: b}\n---\n", "---\nmodel-index: 7\n---\n", "---\n5\n---\n"],
    ids=repr,
)
def test_a_card_that_cannot_be_read_is_no_card(tmp_path, card):
    put(tmp_path / "README.md", card)
    assert origin_of(str(tmp_path), None, quick_settings()).metadata == {}


def test_a_card_that_is_no_text_is_no_card(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert origin_of(str(tmp_path), None, quick_settings()).metadata == {}
