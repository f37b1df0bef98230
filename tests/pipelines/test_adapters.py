"""Adapters beside packed layers train, merge and are taken out as beside ordinary ones, or it is said what to do."""

import peft
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import new_pipeline, quick_settings
from torch import nn

import vq4dit
from vq4dit.models.adapters import adapter_layers, adapter_names
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.recipes.quantize import check

LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
KINDS = {
    "lora": LORA,
    "dora": LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=4, target_modules=["to_q"], init_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["to_q"], init_weights=False),
    "oft": peft.OFTConfig(oft_block_size=8, r=0, target_modules=["to_q"], init_weights=False),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=["to_q"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["to_q"], feedforward_modules=[], init_ia3_weights=False),
    "vera": peft.VeraConfig(r=4, target_modules=["to_q"], init_weights=False),
    "hra": peft.HRAConfig(r=4, target_modules=["to_q"], init_weights=False),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
both_modes = pytest.mark.parametrize("mode", ["load", "forward"])


class AdaptableDiT(PeftAdapterMixin, DiTTransformer2DModel):
    """DiT with what newer families have: `add_adapter`, `fuse_lora` and the rest of diffusers."""


def load(folder, mode: str = "load", **arguments) -> AdaptableDiT:
    torch.manual_seed(0)  # of the adapters that follow
    with vq4dit.decode_mode(mode):
        return AdaptableDiT.from_pretrained(folder, subfolder="transformer", **arguments).eval()


def new_adaptable_pipeline() -> DiTPipeline:
    pipeline = new_pipeline()
    pipeline.transformer.__class__ = AdaptableDiT
    return pipeline


def modes_of(model: nn.Module) -> set[str]:
    return {"forward" if layer.decoded_weight is None else "load" for layer in packed_layers(model).values()}


@torch.no_grad()
def output(model, arguments):
    return model(**arguments).sample


# --- attach, take out, merge ---


@both_modes
@every_kind
def test_an_adapter_that_is_unloaded_leaves_the_model_as_it_was(quantized_folder, one_step_input, config, mode):
    model = load(quantized_folder, mode)
    plain = output(model, one_step_input)
    adapted = get_peft_model(model, config)
    assert (output(adapted, one_step_input) - plain).abs().max() > 1e-3
    assert torch.equal(output(adapted.unload(), one_step_input), plain)
    assert not any(layer.is_changed for layer in packed_layers(model).values())


@both_modes
@every_kind
def test_an_adapter_that_is_merged_is_used_and_noticed(tmp_path, quantized_folder, one_step_input, config, mode):
    model = load(quantized_folder, mode)
    adapted = get_peft_model(model, config)
    wanted = output(adapted, one_step_input)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output(merged, one_step_input), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(vq4dit.FormatError, match="transformer_blocks.0.attn1.to_q.*merged LoRA"):
        merged.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "boft"])
def test_an_adapter_beside_packed_layers_leaves_them_packed(quantized_folder, one_step_input, name):
    """All kinds but BOFT, which computes with views of the weight."""
    model = load(quantized_folder, "forward")
    adapted = get_peft_model(model, KINDS[name])
    assert modes_of(model) == {"forward"}
    output(adapted, one_step_input)
    assert modes_of(model) == {"forward"}


@both_modes
def test_a_lora_learns_beside_packed_layers(quantized_folder, one_step_input, mode):
    model = load(quantized_folder, mode)
    packed = {name: p.clone() for name, p in model.named_parameters()}
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    model.enable_gradient_checkpointing()
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=1e-2), []
    for step in range(8):
        torch.manual_seed(step)
        loss = model(**one_step_input).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and modes_of(model) == {mode}
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert after.keys() == packed.keys() and all(torch.equal(after[name], packed[name]) for name in packed)


# --- what diffusers offers ---


@both_modes
@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lora_that_was_fused_and_is_unfused_leaves_nothing(tmp_path, quantized_folder, one_step_input, mode, safe, dtype):
    model = load(quantized_folder, mode, dtype=dtype)
    arguments = one_step_input | {"hidden_states": one_step_input["hidden_states"].to(dtype)}
    plain = output(model, arguments)
    model.add_adapter(LORA, "style")
    model.fuse_lora(lora_scale=0.5, safe_fusing=safe)
    assert not torch.equal(output(model, arguments), plain)
    model.unfuse_lora()
    model.delete_adapters("style")
    assert torch.equal(output(model, arguments), plain) and modes_of(model) == {mode}
    model.save_pretrained(tmp_path)  # PEFT's wrappers are still there, without an adapter
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype), arguments), plain)


def test_two_loras_that_were_fused_and_are_unfused_leave_nothing(tmp_path, quantized_folder, one_step_input):
    model = load(quantized_folder)
    plain = output(model, one_step_input)
    for name in ("style", "face"):
        model.add_adapter(LORA, name)
    model.set_adapters(["style", "face"])
    model.fuse_lora()
    model.unfuse_lora()
    model.unload_lora()
    assert torch.equal(output(model, one_step_input), plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path), one_step_input), plain)


def test_an_attached_adapter_is_told_by_name_before_anything_is_written(tmp_path, quantized_folder):
    model = load(quantized_folder)
    model.add_adapter(LORA, "style")
    with pytest.raises(vq4dit.FormatError, match="the adapter style is attached.*save the adapter by itself"):
        model.save_pretrained(tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert len(peft.get_peft_model_state_dict(model, adapter_name="style")) == 8
    model.unload_lora()
    model.save_pretrained(tmp_path / "q")


def test_a_fused_adapter_that_is_still_attached_is_not_forgotten_by_another_mode(quantized_folder, one_step_input):
    model = load(quantized_folder)
    model.add_adapter(LORA, "style")
    model.fuse_lora()
    fused = output(model, one_step_input)
    with pytest.raises(ValueError, match="the adapter style is fused"):
        vq4dit.set_decode_mode(model, "forward")
    assert torch.equal(output(model, one_step_input), fused)


@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "PEFT model"])
def test_a_model_with_an_adapter_can_be_dequantized(quantized_folder, one_step_input, wrapped):
    model = load(quantized_folder)
    adapted = get_peft_model(model, LORA) if wrapped else inject_adapter_in_model(LORA, model)
    wanted = output(adapted, one_step_input)
    assert vq4dit.dequantize(adapted) is adapted
    assert not packed_layers(adapted) and not model.is_quantized
    assert torch.equal(output(adapted, one_step_input), wanted)


# --- quantizing ---


@pytest.mark.parametrize("recipe", ["kmeans", "best"])
def test_a_model_with_an_adapter_is_not_quantized(recipe):
    pipeline = new_adaptable_pipeline()
    pipeline.transformer.add_adapter(LORA, "style")
    with pytest.raises(vq4dit.UnsupportedModelError, match="the adapter style is attached.*merge it.*or unload it"):
        vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
    pipeline.transformer = get_peft_model(new_pipeline().transformer, LORA)
    with pytest.raises(vq4dit.UnsupportedModelError, match="the adapter default is attached"):
        check(pipeline, quick_settings(recipe=recipe))


def test_a_merged_adapter_is_quantized_with_the_model():
    pipeline = new_adaptable_pipeline()
    pipeline.transformer.add_adapter(LORA, "style")
    pipeline.transformer.fuse_lora()
    pipeline.transformer.unload_lora()
    assert check(pipeline, quick_settings(recipe="kmeans"))


def test_wrappers_are_told_by_whether_they_hold_an_adapter():
    transformer = new_adaptable_pipeline().transformer
    assert adapter_layers(transformer) == adapter_layers(transformer, empty=True) == {}
    transformer.add_adapter(LORA, "style")
    assert len(adapter_layers(transformer)) == 4 and not adapter_layers(transformer, empty=True)
    assert all(adapter_names(wrapper) == ["style"] for wrapper in adapter_layers(transformer).values())
    transformer.delete_adapters("style")
    assert not adapter_layers(transformer) and len(adapter_layers(transformer, empty=True)) == 4
