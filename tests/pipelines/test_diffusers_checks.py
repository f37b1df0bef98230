"""What diffusers checks of its own quantizers holds for ours, and what is done with any model is done with a packed one."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_model, save_model
from tiny import new_pipeline, new_transformer, quick_settings

import vq4dit
from vq4dit.config import VQ4DiTConfig
from vq4dit.pipelines.decode_modes import packed_layers

both_recipes = pytest.mark.parametrize("recipe", ["kmeans", "best"])
both_modes = pytest.mark.parametrize("mode", ["load", "forward"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """One packed pipeline of each kind of layers, as text."""
    folder = tmp_path_factory.mktemp("packed")
    for recipe in ("kmeans", "best"):
        vq4dit.save(vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe)), str(folder / recipe))
    return {recipe: str(folder / recipe) for recipe in ("kmeans", "best")}


def load(folder: str, mode: str = "load", **arguments) -> DiTTransformer2DModel:
    with vq4dit.decode_mode(mode):
        return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", **arguments).eval()


def modes_of(model) -> set[str]:
    return {"forward" if layer.decoded_weight is None else "load" for layer in packed_layers(model).values()}


@torch.no_grad()
def output(model, arguments, dtype=torch.float32):
    return model(**arguments | {"hidden_states": arguments["hidden_states"].to(dtype)}).sample


# --- the config ---


def test_the_config_is_told_as_json_in_every_way(folders):
    config = load(folders["kmeans"]).config["quantization_config"]
    told = json.loads(config.to_json_string(use_diff=False))
    assert told == config.to_dict() and VQ4DiTConfig.from_dict(told) == config
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert VQ4DiTConfig.from_dict(config.to_diff_dict()) == config and "dtype" not in config.to_diff_dict()


def test_the_type_before_quantizing_is_known(folders):
    pipeline = new_pipeline()
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans")).transformer
    assert "_pre_quantization_dtype" not in pipeline.transformer.config
    assert quantized.config["_pre_quantization_dtype"] == torch.float32
    loaded = load(folders["kmeans"], dtype=torch.float16)
    assert loaded.config["_pre_quantization_dtype"] == torch.float16
    for model in (quantized, loaded):
        assert "_pre_quantization_dtype" not in json.loads(model.to_json_string())
        assert "_pre_quantization_dtype" not in vq4dit.dequantize(model).config


@pytest.mark.parametrize("named", [["to_q", "proj_out_1"], "to_q"], ids=["list", "text"])
@both_recipes
@both_modes
def test_modules_that_a_class_keeps_in_fp32_are_decoded_so(folders, monkeypatch, recipe, mode, named):
    """As a plain load keeps them: diffusers promises that for the class, and nothing of ours stays in its list."""
    monkeypatch.setattr(DiTTransformer2DModel, "_keep_in_fp32_modules", named)
    model = load(folders[recipe], mode, dtype=torch.bfloat16)
    kept = {"to_q", "proj_out_1"} & set([named] if isinstance(named, str) else named)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name
    assert DiTTransformer2DModel._keep_in_fp32_modules == named
    layer = model.transformer_blocks[0].attn1.to_q
    x = torch.ones(1, 64)
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x), load(folders[recipe]).transformer_blocks[0].attn1.to_q(x))
    assert vq4dit.dequantize(model).transformer_blocks[0].attn1.to_q.weight.dtype == torch.float32


def test_a_class_that_keeps_nothing_in_fp32_has_no_list_afterwards(folders):
    load(folders["kmeans"], dtype=torch.bfloat16)
    assert not DiTTransformer2DModel._keep_in_fp32_modules


# --- other tensors in the same model ---


@both_recipes
@both_modes
@pytest.mark.parametrize("how", ["load_state_dict", "assign", "safetensors"])
def test_a_model_answers_like_the_one_whose_tensors_it_was_given(tmp_path, folders, one_step_input, recipe, mode, how):
    model = load(folders[recipe], mode)
    other = vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe, seed=1)).transformer
    wanted, before = output(other, one_step_input), output(model, one_step_input)
    if how == "safetensors":
        save_model(other, tmp_path / "other.safetensors")
        load_model(model, tmp_path / "other.safetensors")
    else:
        model.load_state_dict(other.state_dict(), assign=how == "assign")
    assert not torch.equal(before, wanted) and torch.equal(output(model, one_step_input), wanted)
    assert modes_of(model) == {mode}
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path / "saved"), one_step_input), wanted)


def test_loaded_tensors_replace_what_was_written_into_a_weight(folders, one_step_input):
    model = load(folders["kmeans"])
    wanted, tensors = output(model, one_step_input), copy.deepcopy(model.state_dict())
    model.transformer_blocks[0].attn1.to_q.weight.data += 1
    model.load_state_dict(tensors)
    assert torch.equal(output(model, one_step_input), wanted)


def test_an_ordinary_model_of_a_packed_models_config_is_not_taken_for_a_packed_one(tmp_path, folders, one_step_input):
    torch.manual_seed(0)
    model = DiTTransformer2DModel.from_config(load(folders["kmeans"]).config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(vq4dit.FormatError, match="hold no packed layer.*delete quantization_config from config.json"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path), one_step_input), output(model, one_step_input))


# --- copies, casts, places ---


def test_casting_a_packed_model_is_refused_and_changes_nothing(folders, one_step_input):
    model = load(folders["best"])
    wanted = output(model, one_step_input)
    for cast in (lambda: model.half(), lambda: model.to(torch.float16), lambda: model.to("cpu", torch.bfloat16)):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert torch.equal(output(model, one_step_input), wanted)


@both_recipes
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_answers_the_same_and_can_be_saved(tmp_path, folders, one_step_input, recipe, again):
    model = load(folders[recipe])
    copied = again(model)
    copied.save_pretrained(tmp_path)
    for found in (copied, DiTTransformer2DModel.from_pretrained(tmp_path)):
        assert torch.equal(output(found, one_step_input), output(model, one_step_input))


def test_every_part_has_the_type_it_is_given(folders):
    pipeline = DiTPipeline.from_pretrained(folders["best"], dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert pipeline.transformer.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float16


def test_a_variant_is_loaded_as_it_was_saved(tmp_path, folders, one_step_input):
    pipeline = DiTPipeline.from_pretrained(folders["kmeans"])
    pipeline.save_pretrained(tmp_path, variant="fp16")
    again = DiTPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(output(again.transformer, one_step_input), output(pipeline.transformer, one_step_input))


def test_names_of_folders_may_hold_anything(tmp_path, folders, one_step_input):
    folder = tmp_path / "mein Ordner – 模型 🗜️ [x] 'q'" / "out put"
    quantized = vq4dit.quantize(new_pipeline(), quick_settings(recipe="kmeans"))
    vq4dit.save(quantized, folder)
    assert torch.equal(output(load(folder), one_step_input), output(quantized.transformer, one_step_input))


@both_modes
@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
)
def test_group_offloading_changes_no_bit(folders, one_step_input, mode, kind):
    model = load(folders["best"], mode)
    wanted = output(model, one_step_input)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **kind)
    assert torch.equal(output(model, one_step_input), wanted)


@both_modes
def test_a_model_is_stored_in_fp8_while_it_is_not_used(tmp_path, folders, one_step_input, mode):
    model = load(folders["best"], mode, dtype=torch.bfloat16)
    plain = output(model, one_step_input, torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight is not None
    wanted = output(model, one_step_input, torch.bfloat16)
    assert (wanted - plain).square().mean() < plain.square().mean() / 10 and modes_of(model) == {mode}
    model.save_pretrained(tmp_path)
    found = output(DiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), one_step_input, torch.bfloat16)
    assert torch.equal(found, wanted)


def test_pickles_are_refused_for_saving_and_loading(tmp_path, folders):
    model = load(folders["kmeans"])
    with pytest.raises(vq4dit.FormatError, match="saved as safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    model.save_config(tmp_path)
    with pytest.raises(vq4dit.FormatError, match="read from safetensors only"):
        DiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=False)


# --- pipelines ---


def test_a_pipeline_may_be_given_for_its_transformer(folders, one_step_input):
    pipeline = DiTPipeline.from_pretrained(folders["kmeans"])
    wanted = output(pipeline.transformer, one_step_input)
    for mode in ("forward", "load"):
        vq4dit.set_decode_mode(pipeline, mode)
        assert modes_of(pipeline.transformer) == {mode}
    assert vq4dit.dequantize(pipeline) is pipeline and not packed_layers(pipeline.transformer)
    assert not pipeline.transformer.is_quantized
    assert torch.equal(output(pipeline.transformer, one_step_input), wanted)


@pytest.mark.parametrize("act", [vq4dit.dequantize, lambda what: vq4dit.set_decode_mode(what, "load")])
def test_something_that_is_no_model_is_refused(act):
    with pytest.raises(ValueError, match="a model or a pipeline is wanted, got a str"):
        act("emoji-2bit")


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_dequantized_model_without_biases_has_one_type(tmp_path, mode, dtype):
    pipeline = new_pipeline()
    pipeline.transformer = new_transformer(attention_bias=False)
    vq4dit.save(vq4dit.quantize(pipeline, quick_settings(recipe="kmeans")), tmp_path / "q")
    model = load(tmp_path / "q", mode, dtype=dtype)
    assert model.transformer_blocks[0].attn1.to_q.bias is None
    assert {p.dtype for p in vq4dit.dequantize(model).parameters()} == {dtype}


def test_a_decode_mode_holds_in_its_own_thread(folders):
    from concurrent.futures import ThreadPoolExecutor

    def loaded():
        return modes_of(DiTTransformer2DModel.from_pretrained(folders["kmeans"], subfolder="transformer"))

    with vq4dit.decode_mode("forward"), ThreadPoolExecutor(1) as pool:
        assert loaded() == {"forward"} and pool.submit(loaded).result() == {"load"}
    assert "thread" in vq4dit.decode_mode.__doc__
