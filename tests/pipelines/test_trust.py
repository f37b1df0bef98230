"""A stranger's folder is weights to read, never a program to run: every way to smuggle one in is refused, at every door."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vq4dit.cli.main import main
from vq4dit.config import QuantizationSettings
from vq4dit.errors import FormatError, VQ4DiTError
from vq4dit.hub.push import Pushed, same_image
from vq4dit.pipelines.inspect import inspect
from vq4dit.pipelines.load import load_pipeline
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.workspace import Workspace

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "it-ran"


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "stranger"))


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def shards(folder: Path, part: str, name: str) -> None:
    """Replace a component's weights by an index that names one file."""
    whole = folder / part / WEIGHTS
    tensors = load_file(whole)
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / part / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def pickle_at(path: Path, mark: Path) -> None:
    torch.save(Bomb(mark), path)


def code(path: Path, mark: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil:\n    pass\n")


# --- the ways; each gets (folder, mark) and makes the folder hostile ---


def an_index_that_names_a_pickle(folder, mark):
    shards(folder, "transformer", "weights.bin")
    pickle_at(folder / "transformer" / "weights.bin", mark)


def an_index_of_the_vae_that_names_a_pickle(folder, mark):
    shards(folder, "vae", "weights.bin")
    pickle_at(folder / "vae" / "weights.bin", mark)
    save_file({"x": torch.zeros(1)}, folder / "vae" / "decoy.safetensors")


def an_index_that_leads_out(folder, mark):
    pickle_at(folder.parent / "outside.bin", mark)
    shards(folder, "vae", "../../outside.bin")


def an_index_with_an_absolute_path(folder, mark):
    save_file(load_file(folder / "vae" / WEIGHTS), folder.parent / "outside.safetensors")
    shards(folder, "vae", str(folder.parent / "outside.safetensors"))


def a_vae_that_is_only_pickled(folder, mark):
    (folder / "vae" / WEIGHTS).unlink()
    pickle_at(folder / "vae" / "diffusion_pytorch_model.bin", mark)


def a_link_to_a_pickle(folder, mark):
    pickle_at(folder.parent / "outside.bin", mark)
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / WEIGHTS).symlink_to(folder.parent / "outside.bin")


def a_pipeline_of_its_own(folder, mark):
    code(folder / "pipeline.py", mark)
    edit(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def a_pipeline_nobody_knows(folder, mark):
    code(folder / "EvilPipeline.py", mark)
    edit(folder / "model_index.json", _class_name="EvilPipeline")


def a_component_of_its_own(folder, mark):
    code(folder / "vae" / "vae.py", mark)
    edit(folder / "model_index.json", vae=["vae", "Evil"])


def a_module_beside_the_command(folder, mark):
    code(folder / "evil.py", mark)
    edit(folder / "model_index.json", vae=["evil", "Evil"])


def a_component_that_is_a_word(folder, mark):
    code(folder / "e.py", mark)
    edit(folder / "model_index.json", scheduler="eE")


def a_component_that_is_a_function_of_diffusers(folder, mark):
    edit(folder / "model_index.json", vae=["diffusers", "load_image"])


def a_component_that_is_another_pipeline(folder, mark):
    edit(folder / "model_index.json", vae=["diffusers", "StableDiffusionPipeline"])


def a_component_by_way_of_a_module_of_diffusers(folder, mark):
    edit(folder / "model_index.json", vae=["pipeline_utils", "PreTrainedModel"])


def a_component_that_is_a_function_of_transformers(folder, mark):
    edit(folder / "model_index.json", vae=["transformers", "pipeline"])


def a_component_that_is_a_path_of_transformers(folder, mark):
    edit(folder / "model_index.json", vae=["transformers", "__file__"])


def a_component_that_is_a_class_of_no_part(folder, mark):
    edit(folder / "model_index.json", vae=["transformers", "Trainer"])


def a_component_that_is_the_base_of_all_models(folder, mark):
    edit(folder / "model_index.json", vae=["diffusers", "ModelMixin"])


def a_component_that_is_the_base_of_all_encoders(folder, mark):
    edit(folder / "model_index.json", vae=["transformers", "PreTrainedModel"])


def a_component_that_is_the_pipeline_of_a_package(folder, mark):
    edit(folder / "model_index.json", vae=["stable_diffusion", "StableDiffusionPipeline"])


def an_adapter_to_a_model_elsewhere(folder, mark):
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    (folder / "text_encoder").mkdir()
    edit(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path="/elsewhere")


def weights_named_by_a_config(folder, mark):
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    (folder / "text_encoder").mkdir()
    edit(folder / "text_encoder" / "config.json", transformers_weights="adapter_model.bin")


def kernels_named_by_a_config(folder, mark):
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    (folder / "text_encoder").mkdir()
    edit(folder / "text_encoder" / "config.json", _attn_implementation="stranger/kernels")


def a_processor_with_code_of_its_own(folder, mark):
    edit(folder / "model_index.json", processor=["transformers", "CLIPProcessor"])
    (folder / "processor").mkdir()
    edit(folder / "processor" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Evil", None]})


WAYS = [value for name, value in list(globals().items()) if name.startswith(("a_", "an_", "weights_", "kernels_"))]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
def test_what_could_run_code_is_refused_before_anything_is_loaded(folder, mark, way, monkeypatch):
    way(folder, mark)
    monkeypatch.chdir(folder)  # `python -m` looks for modules here first
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(VQ4DiTError):
        load_pipeline(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    "way", [an_index_of_the_vae_that_names_a_pickle, a_module_beside_the_command], ids=lambda w: w.__name__
)
def test_every_command_refuses_in_one_paragraph(folder, model_folder, mark, way, tmp_path, capsys):
    way(folder, mark)
    out = tmp_path / "out"
    for command in (
        ["quantize", folder, "--output", out],
        ["sample", folder, "--labels", "cat", "--output", tmp_path / "x.png"],
        ["compare", folder, model_folder, "--output", out],
        ["compare", model_folder, folder, "--output", out],
    ):
        assert main([str(word) for word in command]) == 1
        said = capsys.readouterr().err
        assert "code" in said and "Traceback" not in said
    assert not out.exists() and not mark.exists()


@every_way
def test_the_app_refuses_too(folder, mark, way, tmp_path):
    way(folder, mark)
    catalog, workspace = Catalog(tmp_path, tmp_path), Workspace(tmp_path / "jobs")
    project = workspace.open(workspace.visitor(None), "folder:stranger", QuantizationSettings(recipe="kmeans"))
    with pytest.raises(VQ4DiTError):
        catalog.card("folder:stranger")
        Loader(catalog).original(project)
    assert not mark.exists()


@pytest.mark.parametrize("way", [an_index_of_the_vae_that_names_a_pickle, a_component_of_its_own], ids=lambda w: w.__name__)
def test_a_repository_of_the_hub_is_looked_at_before_it_is_loaded(hub, ann, folder, model_folder, mark, way):
    way(folder, mark)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.add_repo("ann/evil", files)
    with pytest.raises(VQ4DiTError, match="code"):
        load_pipeline("ann/evil", token=ann.token)
    with pytest.raises(VQ4DiTError, match="code"):  # `push --verify` downloads and loads
        same_image(Path(model_folder), Pushed("ann/evil", "main", "", False, 1, 1, False), ann)
    assert not mark.exists()


def test_pickles_beside_safetensors_are_passed_over(folder, mark):
    """Many repositories hold both, of old."""
    for part in ("transformer", "vae"):
        pickle_at(folder / part / "diffusion_pytorch_model.bin", mark)
    edit(folder / "vae" / "diffusion_pytorch_model.bin.index.json", weight_map={"x": "diffusion_pytorch_model.bin"})
    code(folder / "pipeline.py", mark)
    load_pipeline(str(folder))
    assert not mark.exists()


def test_shards_are_loaded_and_one_that_is_missing_is_told(folder):
    pipeline = load_pipeline(str(folder))
    shutil.rmtree(folder / "transformer")
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="300KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    load_pipeline(str(folder))
    next((folder / "transformer").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(FormatError, match="there is no such file: download the model again"):
        load_pipeline(str(folder))


def test_a_pipeline_with_text_encoders_is_not_suspected(folder):
    """Only the classes are named here: nothing of them is imported."""
    edit(
        folder / "model_index.json",
        _class_name="PixArtAlphaPipeline",
        tokenizer=["transformers", "T5Tokenizer"],
        text_encoder=["transformers", "T5EncoderModel"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=[None, None],
        sizes=[64, 64],
    )
    assert inspect(str(folder)).num_blocks == 2
