"""quantize -> save -> load -> same image; save again -> same bytes."""

import json
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.config import RECIPES
from vq4dit.evaluation.images import sample
from vq4dit.pipelines.decode_modes import packed_layers

LEARNED = pytest.mark.parametrize("recipe", ["paper", "best"])


def images(pipeline):
    return sample(pipeline, [0, 1, 2], [4, 5, 6], num_inference_steps=3)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "transformer").iterdir())}


def load(folder: Path, **arguments) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loaded_images_equal_those_before_saving_bit_by_bit(tmp_path, pipeline, bits, recipe):
    quantized = vq4dit.quantize(pipeline, quick_settings(bits=bits, recipe=recipe))
    before = images(quantized)
    vq4dit.save(quantized, tmp_path / "q")
    assert (before == images(load(tmp_path / "q"))).all()


def test_layers_of_different_widths_in_one_model_are_loaded_bit_by_bit(tmp_path, one_step_input):
    quantized, *others = (vq4dit.quantize(new_pipeline(), quick_settings(bits=bits, recipe="kmeans")) for bits in (2, 3, 4))
    for index, name in enumerate(packed_layers(quantized.transformer)):
        if index % 3:
            quantized.transformer.set_submodule(name, others[index % 3 - 1].transformer.get_submodule(name))
    shapes = {name: tuple(layer.codebook.shape) for name, layer in packed_layers(quantized.transformer).items()}
    assert set(shapes.values()) == {(256, 4), (64, 2), (256, 2)}
    before = images(quantized)
    vq4dit.save(quantized, tmp_path / "q")
    loaded = load(tmp_path / "q")
    assert {name: tuple(layer.codebook.shape) for name, layer in packed_layers(loaded.transformer).items()} == shapes
    assert (before == images(loaded)).all()
    alone = DiTTransformer2DModel.from_pretrained(tmp_path / "q", subfolder="transformer").eval()
    with torch.no_grad():
        wanted = quantized.transformer(**one_step_input).sample
        assert torch.equal(alone(**one_step_input).sample, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one-file", "sharded"])
def test_save_load_save_gives_the_same_bytes(tmp_path, pipeline, dtype, shard):
    vq4dit.save(vq4dit.quantize(pipeline, quick_settings(recipe="kmeans")), tmp_path / "a", max_shard_size=shard)
    loaded = load(tmp_path / "a", dtype=dtype)
    loaded.save_pretrained(tmp_path / "b", max_shard_size=shard)
    a, b = file_bytes(tmp_path / "a"), file_bytes(tmp_path / "b")
    configs = [json.loads(files.pop("config.json")) for files in (a, b)]
    assert configs[1].pop("_name_or_path") == str(tmp_path / "a" / "transformer")  # diffusers notes where it loaded from
    assert configs[0] == configs[1]
    assert a == b
    assert len(a) == (1 if shard == "5GB" else len(a)) and (shard == "5GB" or len(a) > 3)


@LEARNED
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, recipe):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        vq4dit.save(vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe, seed=seed)), tmp_path / name)
    a, b, c = (file_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bit_numbers_is_quantized_as_it_is(tmp_path, model_folder, recipe, dtype):
    pipeline = load(Path(model_folder), dtype=dtype)
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
    before = images(quantized)
    vq4dit.save(quantized, tmp_path / "q")
    assert (before == images(load(tmp_path / "q", dtype=dtype))).all()


@LEARNED
def test_training_mode_and_no_grad_change_nothing(recipe):
    results = []
    for mode, seed in ((False, 1), (True, 2)):
        pipeline = new_pipeline()
        torch.manual_seed(seed)
        pipeline.transformer.train(mode)
        with torch.no_grad():
            quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
        assert pipeline.transformer.training is mode
        results.append({name: tensor.clone() for name, tensor in quantized.transformer.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", ["proj_out_2.weight", "transformer_blocks.0.attn1.to_q.bias"])
def test_values_that_are_not_finite_are_refused_anywhere(pipeline, name):
    with torch.no_grad():
        pipeline.transformer.get_parameter(name).flatten()[0] = torch.nan
    with pytest.raises(vq4dit.UnsupportedModelError, match=f"{name} has values that are not finite"):
        vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))


def test_an_offloaded_pipeline_is_refused_by_the_name_of_what_is_not_there(pipeline):
    accelerate.cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(vq4dit.UnsupportedModelError, match="pos_embed.* is not in memory"):
        vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))


def test_a_pipeline_that_is_stored_in_fp8_is_refused(pipeline):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(vq4dit.UnsupportedModelError, match="is of type torch.float8_e4m3fn, as layerwise casting stores it"):
        vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))


def test_weights_that_no_fp16_codebook_holds_are_refused(pipeline):
    with torch.no_grad():
        pipeline.transformer.get_parameter("transformer_blocks.1.ff.net.2.weight")[0, 0] = 1e5
    with pytest.raises(vq4dit.UnsupportedModelError, match="above 65504.*--keep transformer_blocks.1.ff.net.2"):
        vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))


@LEARNED
def test_the_original_is_not_touched(pipeline, recipe):
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not packed_layers(pipeline.transformer)


def test_class_labels_survive(tmp_path, pipeline):
    vq4dit.save(vq4dit.quantize(pipeline, quick_settings(recipe="kmeans")), tmp_path / "q")
    assert load(tmp_path / "q").labels == {"cat": 0, "dog": 1, "fox": 2}


def test_shared_embedders_are_stored_once_and_shared_after_loading(quantized_folder):
    stored = load_file(quantized_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(".0.norm1.emb." in key for key in stored)
    assert not any(".1.norm1.emb." in key for key in stored)
    first, second = load(quantized_folder).transformer.transformer_blocks
    assert first.norm1.emb is second.norm1.emb


def test_embedders_that_differ_are_all_kept(tmp_path, pipeline):
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
    before = images(quantized)
    vq4dit.save(quantized, tmp_path / "q")
    assert (before == images(load(tmp_path / "q"))).all()


def test_no_path_of_this_machine_is_written(tmp_path, model_folder):
    original = load(Path(model_folder))
    vq4dit.save(vq4dit.quantize(original, quick_settings(recipe="kmeans")), tmp_path / "q")
    for path in (tmp_path / "q").rglob("*.json"):
        assert str(Path(model_folder).parent) not in path.read_text()


def test_kept_layers_stay_in_16_bit(tmp_path, pipeline):
    settings = quick_settings(recipe="kmeans", keep=("*.ff.*",))
    vq4dit.save(vq4dit.quantize(pipeline, settings), tmp_path / "q")
    stored = load_file(tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["transformer_blocks.0.ff.net.2.weight"].dtype == torch.float16
    assert "transformer_blocks.0.attn1.to_q.codebook" in stored
    assert images(load(tmp_path / "q")).shape == (3, 8, 8, 3)


def test_quantization_config_is_small_and_names_its_version(quantized_folder):
    config = json.loads((quantized_folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1 and config["quant_method"] == "vq4dit"
    assert len(json.dumps(config)) < 2048


def test_transformer_alone_loads_with_a_device_map(quantized_folder, one_step_input):
    models = [
        DiTTransformer2DModel.from_pretrained(quantized_folder, subfolder="transformer", **arguments).eval()
        for arguments in ({}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True})
    ]
    with torch.no_grad():
        wanted, *others = [model(**one_step_input).sample for model in models]
    assert all(torch.equal(wanted, other) for other in others)


def test_transformer_runs_offloaded_to_disk(tmp_path, quantized_folder, one_step_input):
    places = {"pos_embed": "cpu", "transformer_blocks": "disk", "proj_out_1": "cpu", "proj_out_2": "cpu"}
    arguments = {"subfolder": "transformer", "device_map": places, "offload_folder": str(tmp_path)}
    offloaded = DiTTransformer2DModel.from_pretrained(quantized_folder, **arguments)
    whole = DiTTransformer2DModel.from_pretrained(quantized_folder, subfolder="transformer")
    with torch.no_grad():
        assert torch.equal(offloaded(**one_step_input).sample, whole(**one_step_input).sample)
