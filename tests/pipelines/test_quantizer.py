"""What people do with a loaded model: decode modes, moving, compiling, adapters, dequantizing, broken files."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from packed_layer_checks import check_compiled_equals_eager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import vq4dit
from vq4dit.errors import FormatError
from vq4dit.layers.entropy_coded import EntropyCodedLinear
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.quantizer import check_size

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


def load(folder) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")


@torch.no_grad()
def output(model, arguments):
    return model(**arguments).sample


def decoded_bytes(model) -> int:
    tensors = (layer.decoded_weight for layer in packed_layers(model).values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_both_decode_modes_give_the_same_output(quantized_folder, one_step_input):
    with vq4dit.decode_mode("load"):
        fast = load(quantized_folder)
    with vq4dit.decode_mode("forward"):
        small = load(quantized_folder)
    assert decoded_bytes(small) == 0 < decoded_bytes(fast)
    assert torch.equal(output(fast, one_step_input), output(small, one_step_input))
    assert decoded_bytes(small) == 0


def test_auto_decodes_only_if_memory_allows(quantized_folder, monkeypatch):
    assert decoded_bytes(load(quantized_folder)) > 0
    monkeypatch.setattr("vq4dit.pipelines.decode_modes.available_memory", lambda device: 1000)
    assert decoded_bytes(load(quantized_folder)) == 0


def test_the_mode_can_be_switched_after_loading(quantized_folder, one_step_input):
    model = load(quantized_folder)
    wanted = output(model, one_step_input)
    for mode, is_decoded in (("forward", False), ("load", True)):
        vq4dit.set_decode_mode(model, mode)
        assert bool(decoded_bytes(model)) is is_decoded
        assert torch.equal(output(model, one_step_input), wanted)


def test_compiled_equals_eager_in_both_modes(quantized_folder):
    check_compiled_equals_eager(quantized_folder)


@pytest.mark.cuda
def test_moving_to_a_gpu_keeps_the_output(quantized_folder, one_step_input):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = load(quantized_folder)
    wanted = output(model, one_step_input)
    moved = {name: tensor.to("cuda") for name, tensor in one_step_input.items()}
    torch.testing.assert_close(output(model.to("cuda"), moved).cpu(), wanted, rtol=1e-3, atol=1e-3)


def test_moving_to_another_device_moves_everything(quantized_folder):
    model = load(quantized_folder).to("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("mode", ["load", "forward"])
@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
def test_a_merged_lora_is_used_and_never_lost_silently(tmp_path, quantized_folder, one_step_input, mode, safe):
    model = load(quantized_folder)
    vq4dit.set_decode_mode(model, mode)
    plain = output(model, one_step_input)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    wanted = output(adapted, one_step_input)
    assert (wanted - plain).abs().max() > 1e-3
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(output(merged, one_step_input), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(vq4dit.FormatError, match="merged LoRA"):
        merged.save_pretrained(tmp_path / "lost")
    vq4dit.dequantize(merged).save_pretrained(tmp_path / "plain")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(output(again, one_step_input), wanted, rtol=1e-4, atol=1e-5)


def test_the_packed_weights_come_back_after_a_merge(tmp_path, quantized_folder, one_step_input):
    model = load(quantized_folder)
    wanted = output(model, one_step_input)
    packed_layers(model)[LAYER].weight.data += 1
    assert not torch.equal(output(model, one_step_input), wanted)
    vq4dit.set_decode_mode(model, "load")
    assert torch.equal(output(model, one_step_input), wanted)
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("dequantize", [vq4dit.dequantize, lambda model: model.dequantize()], ids=["ours", "diffusers"])
def test_dequantized_is_an_ordinary_model(tmp_path, quantized_folder, one_step_input, dequantize):
    model = load(quantized_folder)
    wanted = output(model, one_step_input)
    ordinary = dequantize(model)
    assert not packed_layers(ordinary) and not ordinary.is_quantized
    assert torch.equal(output(ordinary, one_step_input), wanted)
    ordinary.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path / "plain"), one_step_input), wanted)


# --- broken files ---


@pytest.fixture
def broken(tmp_path, quantized_folder):
    """A copy of the quantized model, to break."""
    return shutil.copytree(quantized_folder, tmp_path / "broken")


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"format_version": 9}, "format version 9, this library reads up to 5: upgrade vq4dit"),
        ({"format_version": 9, "rotation": "hadamard"}, "format version 9"),
        ({"format_version": "1"}, "must have a format_version"),
        ({"rotation": "hadamard"}, "has no entry 'rotation'"),
        ({"shared_embedders": ["norm9.emb"]}, "blocks share norm9.emb"),
    ],
    ids=["newer", "newer with unknown entries", "not a number", "unknown entry", "unknown embedder"],
)
def test_a_config_that_cannot_be_read_is_refused(broken, entries, message):
    path = broken / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= entries
    path.write_text(json.dumps(config))
    with pytest.raises(vq4dit.FormatError, match=message):
        DiTPipeline.from_pretrained(broken)


@pytest.mark.parametrize(
    "key", ["proj_out_2.weight", f"{LAYER}.bias", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias"]
)
def test_a_missing_tensor_is_refused(broken, key):
    change_tensors(broken, lambda tensors: tensors.pop(key))
    with pytest.raises(vq4dit.FormatError, match=f"tensors are missing, such as {key}"):
        load(broken)


def test_assignments_of_another_type_are_refused(broken):
    change_tensors(broken, lambda t: t.update({f"{LAYER}.packed_assignments": t[f"{LAYER}.packed_assignments"].half()}))
    with pytest.raises(vq4dit.FormatError, match="must be of type U8, got F16"):
        load(broken)


def test_a_copy_does_not_lose_a_merged_lora_either(tmp_path, quantized_folder):
    model = load(quantized_folder)
    copied = copy.deepcopy(model)
    del model
    copied.save_pretrained(tmp_path / "copied")
    packed_layers(copied)[LAYER].weight.data += 1
    with pytest.raises(vq4dit.FormatError, match="merged LoRA"):
        copied.save_pretrained(tmp_path / "lost")


def test_an_unknown_decode_mode_is_told(quantized_folder):
    with pytest.raises(ValueError, match="got 'foward'"):
        vq4dit.set_decode_mode(load(quantized_folder), "foward")


def test_a_truncated_file_is_refused(broken):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(vq4dit.FormatError, match="truncated or damaged"):
        load_pipeline(str(broken))
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):  # diffusers reads it before we are asked
        load(broken)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1024,), "a codebook is"),
        ((256, 3), "need 1408 bytes"),
        ((256, 65), "a codebook is"),
        ((16, 4), "need 512 bytes"),
        ((256, 2), "need 2048 bytes"),
    ],
    ids=["one-dimensional", "d-no-divisor", "d-larger-than-the-layer", "other-k", "other-d"],
)
def test_a_codebook_of_the_wrong_shape_is_refused(broken, shape, message):
    change_tensors(broken, lambda tensors: tensors.update({f"{LAYER}.codebook": torch.zeros(shape, dtype=torch.float16)}))
    with pytest.raises(vq4dit.FormatError, match=message):
        load(broken)


def test_missing_assignments_are_refused(broken):
    change_tensors(broken, lambda tensors: tensors.pop(f"{LAYER}.packed_assignments"))
    with pytest.raises(vq4dit.FormatError, match="packed_assignments is missing"):
        load(broken)


def test_an_assignment_out_of_range_is_refused(broken):
    def shorten(tensors):
        tensors[f"{LAYER}.codebook"] = tensors[f"{LAYER}.codebook"][:200].clone()
        tensors[f"{LAYER}.packed_assignments"][7] = 201

    change_tensors(broken, shorten)
    with pytest.raises(vq4dit.FormatError, match="is outside its codebook of 200 codewords"):
        load(broken)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.codebook",
        f"{LAYER}.bias",
        "pos_embed.proj.weight",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "proj_out_2.bias",
    ],
)
@pytest.mark.parametrize("mode", ["load", "forward"])
def test_values_that_are_not_finite_are_refused_by_name(broken, key, value, mode):
    def spoil(tensors):
        tensors[key].view(-1)[-1] = value

    change_tensors(broken, spoil)
    with vq4dit.decode_mode(mode), pytest.raises(vq4dit.FormatError, match=f"{key} holds values that are not finite"):
        load(broken)


def test_values_that_are_not_finite_are_found_on_their_way_to_a_disk(tmp_path, broken):
    change_tensors(broken, lambda tensors: tensors["proj_out_2.bias"].fill_(torch.nan))
    places = {"pos_embed": "cpu", "transformer_blocks": "cpu", "proj_out_1": "cpu", "proj_out_2": "disk"}
    with pytest.raises(vq4dit.FormatError, match="proj_out_2.bias holds values that are not finite"):
        DiTTransformer2DModel.from_pretrained(
            broken, subfolder="transformer", device_map=places, offload_folder=str(tmp_path / "offloaded")
        )


@pytest.mark.parametrize("key", ["proj_out_2.bias", f"{LAYER}.bias"])
def test_values_too_large_for_the_type_they_are_loaded_in_are_refused_by_name(broken, key):
    change_tensors(broken, lambda tensors: tensors.update({key: torch.full_like(tensors[key], 1e5, dtype=torch.bfloat16)}))
    load(broken)
    with pytest.raises(vq4dit.FormatError, match=f"{key} holds 99840, more than torch.float16 can"):
        DiTTransformer2DModel.from_pretrained(broken, subfolder="transformer", dtype=torch.float16)


@pytest.mark.parametrize("mode", ["load", "forward"])
def test_scales_that_multiply_to_more_than_a_type_holds_are_refused(broken, mode):
    def scale(tensors):
        tensors[f"{LAYER}.row_scale"] = torch.full((64,), 6e4, dtype=torch.float16)
        tensors[f"{LAYER}.codebook"].fill_(6e4)

    change_tensors(broken, scale)
    with vq4dit.decode_mode(mode):
        load(broken)
        with pytest.raises(vq4dit.FormatError, match=f"{LAYER}: its weight is not finite, or too large for torch.float16"):
            DiTTransformer2DModel.from_pretrained(broken, subfolder="transformer", dtype=torch.float16)


def test_an_embedder_that_all_blocks_share_is_not_taken_from_a_later_one(broken):
    def add(tensors):
        for key in [key for key in tensors if ".0.norm1.emb." in key]:
            tensors[key.replace(".0.", ".1.", 1)] = tensors[key] + 1

    change_tensors(broken, add)
    with pytest.raises(vq4dit.FormatError, match="transformer_blocks.1.norm1.emb.*does not belong to this config.json"):
        load(broken)


def test_a_packed_layer_the_config_does_not_know_is_refused(broken):
    def add(tensors):
        tensors["nowhere.codebook"] = torch.zeros(16, 4)
        tensors["nowhere.packed_assignments"] = torch.zeros(8, dtype=torch.uint8)

    change_tensors(broken, add)
    with pytest.raises(vq4dit.FormatError, match="packed layer nowhere"):
        load(broken)


def test_without_our_import_diffusers_says_what_is_missing(quantized_folder, monkeypatch):
    from diffusers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "vq4dit")
    with pytest.raises(ValueError, match="Unknown quantization type, got vq4dit"):
        load(quantized_folder)


@pytest.mark.parametrize("name", ["proj_out_1.weight", "transformer_blocks.1.attn1.to_k.bias"])
def test_a_tensor_of_another_shape_is_refused_by_name(quantized_folder, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(quantized_folder, broken)
    tensors = load_file(broken / WEIGHTS)
    tensors[name] = tensors[name][None]
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"{name} has the shape \[1, .*the files do not belong together"):
        DiTTransformer2DModel.from_pretrained(broken, subfolder="transformer")


def test_a_small_file_of_endless_layers_is_refused():
    """Coded zeros cost next to nothing: only the size of the file says that there are not so many."""
    layer = EntropyCodedLinear(10**6, 10**6, num_bytes=8, device="meta")
    with pytest.raises(FormatError, match="a file of 1000 bytes cannot hold the 1000000000000 quantized weights"):
        check_size({"x": layer}, 1000)
