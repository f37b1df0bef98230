import json
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from tiny import new_pipeline, quick_settings

from vq4dit import quantize, save
from vq4dit.errors import UnsupportedModelError
from vq4dit.models.positions import Positions
from vq4dit.pipelines.inspect import inspect, predict_size
from vq4dit.pipelines.skeleton import empty_transformer

DIT_XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}


@pytest.fixture(scope="module")
def dit_xl() -> DiTTransformer2DModel:
    return empty_transformer(DIT_XL_2)


@pytest.mark.parametrize("bits, megabytes", [(2, 179.6), (3, 262.8), (4, 346.6)])
def test_dit_xl_weighs_what_the_arithmetic_says(dit_xl, bits, megabytes):
    prediction = predict_size(dit_xl, bits)
    assert len(prediction.layers) == 196
    assert prediction.quantized_weights == 668_860_416
    assert prediction.file_bytes / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_the_accounting_of_the_paper_is_reproduced(dit_xl):
    accounting = predict_size(dit_xl, 2, recipe="paper").paper_accounting()
    assert accounting["original_mib"] == pytest.approx(2553.35, abs=0.01)
    assert accounting["assignments_mib"] == pytest.approx(159.47, abs=0.01)
    assert accounting["codebooks_mib"] == pytest.approx(0.77, abs=0.01)
    assert accounting["biases_mib"] == pytest.approx(1.85, abs=0.01)
    assert accounting["total_mib"] == pytest.approx(162.08, abs=0.01)
    assert accounting["ratio"] == pytest.approx(15.75, abs=0.005)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_best_promises_the_bytes_of_paper(dit_xl, bits):
    """In all quantized layers together; each sets a byte aside for every row and column; the rest is for integers."""
    best, paper = (predict_size(dit_xl, bits, recipe=recipe) for recipe in ("best", "paper"))
    assert best.bits_per_weight == paper.bits_per_weight
    assert best.file_bytes == pytest.approx(paper.file_bytes, rel=0.001)  # there are more tensors to name
    for layer in best.layers:
        assert layer.codebook_bytes == layer.rows + layer.columns + 8


@pytest.mark.parametrize("recipe", ["kmeans", "best"])
def test_a_prediction_is_what_is_written(tmp_path, recipe):
    """The file within 1 %; each layer to the byte, or, where the recipe shares bits out among layers, all together."""
    pipeline = new_pipeline()
    prediction = predict_size(pipeline.transformer, 2, recipe=recipe)
    settings = quick_settings(recipe=recipe)
    save(quantize(pipeline, settings), tmp_path / "q")
    path = tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert prediction.file_bytes == pytest.approx(path.stat().st_size, rel=0.01)
    stored = load_file(path)
    found = {
        layer.name: sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(f"{layer.name}."))
        for layer in prediction.layers
    }
    if recipe == "best":
        assert sum(found.values()) == pytest.approx(sum(layer.num_bytes for layer in prediction.layers), rel=0.01)
    else:
        assert found == {layer.name: layer.num_bytes for layer in prediction.layers}


def test_nothing_is_read_but_headers(model_folder, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", read)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", read)
    inspection = inspect(model_folder)
    assert inspection.num_blocks == 2
    assert inspection.file_bytes > inspection.predictions[0].file_bytes
    assert {tensor.device.type for tensor in empty_transformer(DIT_XL_2).parameters()} == {"meta"}


def test_kept_layers_are_listed_with_the_reason(model_folder):
    kept = {layer.name: layer.reason for layer in inspect(model_folder, ["*.0.ff.*"]).predictions[0].kept}
    assert kept["transformer_blocks.0.ff.net.2"] == "kept by '*.0.ff.*'"
    assert kept["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"] == "embedder"


def test_an_unknown_class_is_refused():
    with pytest.raises(UnsupportedModelError, match="'NoSuchModel' is not in diffusers"):
        empty_transformer({"_class_name": "NoSuchModel"})


def test_the_json_of_an_inspection_is_plain(model_folder):
    import dataclasses

    json.dumps(dataclasses.asdict(inspect(model_folder)))


def test_a_pipeline_that_nothing_can_be_made_of_has_positions_as_usual(tmp_path, model_folder):
    """Its layers are told all the same; whoever loads it is told what is wrong."""
    found = inspect(model_folder)
    assert found.positions == Positions(picture=16, passes=2)
    shutil.copytree(model_folder, tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "config.json").write_text("{}")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    broken = inspect(str(tmp_path / "broken"))
    assert broken.positions == Positions() and broken.predictions == found.predictions


def test_an_argument_that_the_call_does_not_take_is_told_before_anything_is_counted(model_folder):
    with pytest.raises(ValueError, match="takes no argument 'height'"):
        inspect(model_folder, call={"height": 64})
