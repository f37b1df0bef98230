"""No config describes more than its files hold: that is found in their headers, before anything is built or read."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import new_transformer

from vq4dit.cli.main import main
from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError
from vq4dit.models.rehearsal import rehearse
from vq4dit.pipelines.inspect import inspect
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.repository import TensorHeader, Weights
from vq4dit.pipelines.skeleton import check_tensors, empty_transformer
from vq4dit.projects.catalog import Catalog

BILLION = 10**9
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change(folder: Path, file: str = "transformer/config.json", **entries) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | entries))


def looks(folder: Path):
    """Everything that reads a stranger's folder without being asked twice."""
    yield lambda: inspect(str(folder))
    yield lambda: Catalog(folder, folder.parent).card(f"folder:{folder.name}")
    yield lambda: load_pipeline(str(folder))


@pytest.mark.parametrize("packed", [False, True], ids=["original", "packed"])
@pytest.mark.parametrize(
    "entries",
    [
        {"num_layers": BILLION},
        {"num_layers": 10**30},
        {"num_layers": 10**6},
        {"num_layers": 200},
        {"attention_head_dim": 10**6},
        {"num_attention_heads": 10**7},
        {"in_channels": BILLION},
        {"num_embeds_ada_norm": BILLION},
        {"sample_size": 20_000},
        {"sample_size": 10**6},
        {"patch_size": 10**5},
    ],
    ids=str,
)
def test_a_config_beyond_its_files_is_refused_at_once(model_folder, quantized_folder, tmp_path, entries, packed):
    folder = Path(shutil.copytree(quantized_folder if packed else model_folder, tmp_path / "model"))
    change(folder, **entries)
    for look in list(looks(folder))[2 * packed :]:  # a packed one is not looked at for quantizing
        started = time.monotonic()
        with pytest.raises(FormatError, match=r"config\.json"):
            look()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "file, entries",
    [
        ("vae/config.json", {"layers_per_block": BILLION}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("vae/config.json", {"latent_channels": BILLION}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": BILLION}),
    ],
    ids=str,
)
def test_other_parts_are_bounded_as_well(folder, file, entries):
    change(folder, file, **entries)
    with pytest.raises(FormatError, match=file):
        load_pipeline(str(folder))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"num_layers": "28"}, "num_layers cannot be '28'"),
        ({"num_layers": 2.5}, "num_layers is 2.5"),
        ({"num_layers": [2]}, r"num_layers is \[2\]"),
        ({"num_layers": {"a": 1}}, r"num_layers cannot be \{'a': 1\}"),
        ({"num_layers": None}, "num_layers is null"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": -2}, "patch_size is -2"),
        ({"attention_head_dim": -32}, "attention_head_dim is -32"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number, found nan"),
        ({"norm_eps": {"a": 1}}, "norm_eps cannot be"),
        ({"activation_fn": "no-such"}, "no-such"),
        ({"norm_type": ["ada"]}, "norm_type"),
        ({"dropout": "a"}, "dropout cannot be 'a'"),
    ],
    ids=str,
)
def test_the_entry_that_does_not_fit_is_named(folder, entries, words):
    change(folder, **entries)
    for look in looks(folder):
        with pytest.raises(FormatError, match=words):
            look()


@pytest.mark.parametrize("name", [None, 3, [], "", "NoSuchModel", "DiTPipeline", "logging", "DDIMScheduler", "a b"], ids=repr)
def test_a_class_that_is_no_model_is_refused(folder, name):
    change(folder, _class_name=name)
    for look in looks(folder):
        with pytest.raises(UnsupportedModelError, match="the transformer's class .* is not in diffusers .*: upgrade it"):
            look()


def test_no_layers_are_no_transformer(folder):
    change(folder, num_layers=0)
    with pytest.raises((FormatError, UnsupportedModelError)):
        inspect(str(folder))


def test_a_missing_tensor_is_named_before_the_work(folder, capsys):
    tensors = load_file(folder / FILE)
    tensors.pop("transformer_blocks.1.ff.net.2.weight")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    assert main(["quantize", str(folder), "--recipe", "kmeans", "--output", str(folder.parent / "out")]) == 1
    told = capsys.readouterr().err
    assert "lacks the tensor transformer_blocks.1.ff.net.2.weight" in told and "Traceback" not in told
    assert not list(folder.parent.glob("out*"))
    for look in looks(folder):
        with pytest.raises(FormatError, match=r"lacks the tensor transformer_blocks\.1\.ff\.net\.2\.weight"):
            look()


def test_a_tensor_that_other_parts_lack_is_named(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = tensors.popitem()[0]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"vae lacks the tensor {name}"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("entries", [{"num_layers": 1}, {"attention_bias": False}], ids=str)
def test_tensors_without_a_place_in_the_config_are_named(folder, entries):
    change(folder, **entries)
    with pytest.raises(FormatError, match="holds the tensor .* for which its config has no place"):
        inspect(str(folder))


def test_tensors_of_other_shapes_are_named():
    model = new_transformer()
    headers = {name: TensorHeader("F32", tuple(p.shape)) for name, p in model.named_parameters()}
    check_tensors(model, headers, "x")
    check_tensors(model, headers | {"old_name.weight": TensorHeader("F32", (1,))}, "x")  # what nobody reads any more
    with pytest.raises(FormatError, match=r"proj_out_1.bias has the shape \[7\], and its config describes \[128\]"):
        check_tensors(model, headers | {"proj_out_1.bias": TensorHeader("F32", (7,))}, "x")


def test_what_is_built_has_no_weights_and_is_as_large_as_its_files():
    config = dict(new_transformer().config)
    model = new_transformer()
    tensors = {name: TensorHeader("F32", tuple(p.shape)) for name, p in model.named_parameters()}
    found = empty_transformer(config | {"_class_name": "DiTTransformer2DModel"}, Weights((), 1, tensors))
    assert {p.device.type for p in found.parameters()} == {"meta"}
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    "file, entries, words",
    [
        ("scheduler/scheduler_config.json", {"steps_offset": 10**5}, "DiTPipeline does not work with .* its parts .*index"),
        ("scheduler/scheduler_config.json", {"prediction_type": "no-such"}, "DiTPipeline does not work .*no-such"),
        ("scheduler/scheduler_config.json", {"beta_start": 1e20}, "predicts values that are not finite"),
        ("model_index.json", {"id2label": {"5000": "cat"}}, "the labels go up to class 5000, and the transformer knows 1000"),
    ],
    ids=str,
)
def test_settings_that_fail_when_used_are_refused_before_the_work(folder, file, entries, words):
    change(folder, file, **entries)
    with pytest.raises(UnsupportedModelError, match=words):
        rehearse(load_pipeline(str(folder)), {})


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"id2label": [1]}, r"id2label must be an object of numbers and names, found \[1\]"),
        ({"id2label": {"a": "cat"}}, "id2label must give the numbers of classes names"),
        ({"id2label": {"0": 1}}, "id2label must give the numbers of classes names"),
        ({"id2label": {"-1": "cat"}}, "id2label must give the numbers of classes names"),
        ({"_class_name": None}, "_class_name must name a pipeline, found None"),
        ({"_class_name": ["code", "Own"]}, "_class_name must name a pipeline"),
        ({"transformer": "DiT"}, "transformer must be a library and a class of it, found 'DiT'"),
        ({"vae": ["diffusers", None]}, "vae must be a library and a class of it"),
        ({"scheduler": None}, "scheduler must be a library and a class of it, found None"),
    ],
    ids=str,
)
def test_an_index_that_names_no_parts_is_refused(folder, entries, words):
    change(folder, "model_index.json", **entries)
    for look in looks(folder):
        with pytest.raises(FormatError, match=words):
            look()


@pytest.mark.parametrize("quantization", [[], "vq4dit", {"quant_method": "vq4dit"}], ids=repr)
def test_what_is_said_of_a_quantization_is_an_object_of_ours(folder, quantization):
    change(folder, quantization_config=quantization)
    for look in looks(folder):
        with pytest.raises(FormatError, match="quantization_config"):
            look()


@pytest.mark.parametrize("entries", [{"bits": [1]}, {"dtype": "no-such"}, {"shared_embedders": [1]}, {"recipe": 3}], ids=str)
def test_settings_of_a_packed_model_are_of_their_kind(quantized_folder, tmp_path, entries):
    folder = Path(shutil.copytree(quantized_folder, tmp_path / "model"))
    made = json.loads((folder / "transformer/config.json").read_text())["quantization_config"]
    change(folder, quantization_config=made | entries)
    with pytest.raises(FormatError, match=f"quantization_config: {next(iter(entries))} must"):
        load_pipeline(str(folder))


def test_a_second_transformer_is_looked_at_like_the_first(folder):
    alone = inspect(str(folder))
    change(folder, "model_index.json", transformer_2=["diffusers", "DiTTransformer2DModel"])
    for look in looks(folder):
        with pytest.raises(VQ4DiTError, match="transformer_2/config.json"):
            look()
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    both = inspect(str(folder))
    assert (both.num_blocks, both.file_bytes) == (2 * alone.num_blocks, 2 * alone.file_bytes)
    (folder / "transformer_2" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel", "num_layers": 9}')
    with pytest.raises(FormatError, match="transformer_2"):
        inspect(str(folder))


def test_a_part_that_is_none_is_no_second_transformer(folder):
    change(folder, "model_index.json", transformer_2=[None, None])
    assert inspect(str(folder)).num_blocks == 2
