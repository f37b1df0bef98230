"""One tiny random model of every transformer class of diffusers: a block or two of each kind, 64 wide.

The classes are those that diffusers exports from its folder of transformers. Where a pipeline of `tiny_pipelines` has one of
the class, it is that one; the others are what `CONFIGS` says.
"""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_pipelines
import torch
from torch import nn

from vq4dit.models.blocks import block_embedders, named_blocks

HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 4, 8)}
WAN = HEADS | {"num_layers": 1, "text_dim": 32, "freq_dim": 32, "ffn_dim": 128, "rope_max_seq_len": 32}
FLUX = HEADS | ROPE | {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
HUNYUAN = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32}
HUNYUAN_VIDEO = HUNYUAN | {"num_single_layers": 1, "pooled_projection_dim": 32, "rope_axes_dim": (4, 4, 8)}
COGVIDEO = HEADS | {
    "num_layers": 1, "in_channels": 4, "out_channels": 4, "time_embed_dim": 64, "text_embed_dim": 32, "sample_width": 4,
    "sample_height": 4, "sample_frames": 9,
}  # fmt: skip
LTX2 = HEADS | {
    "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "audio_in_channels": 8, "audio_out_channels": 8,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 64, "num_layers": 1,
    "caption_channels": 32,
}  # fmt: skip
SANA = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_cross_attention_heads": 4, "cross_attention_head_dim": 16,
    "cross_attention_dim": 64, "caption_channels": 16,
}  # fmt: skip
KANDINSKY = {"time_dim": 64, "model_dim": 64, "ff_dim": 128, "num_visual_blocks": 1, "axes_dims": (4, 4, 8)}
JOY = {"hidden_size": 64, "num_attention_heads": 4, "text_dim": 32, "num_layers": 1, "rope_dim_list": [4, 4, 8]}

CONFIGS: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": HEADS
    | {
        "num_layers": 1, "cross_attention_dim": 64, "sample_height": 8, "sample_width": 8, "sample_frames": 4,
        "caption_channels": 32,
    },
    "AnyFlowFARTransformer3DModel": WAN | {"chunk_partition": (1, 2)},
    "AnyFlowTransformer3DModel": WAN,
    "BriaFibo2Transformer2DModel": {
        "in_channels": 16, "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 32,
        "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16,
        "gist_step": 8, "gist_min_text_len": 8, "gist_max_text_len": 32, "axes_dims": (4, 4, 8), "axes_lens": (64, 32, 32),
    },
    "BriaFiboTransformer2DModel": FLUX | {"text_encoder_dim": 16},
    "BriaTransformer2DModel": FLUX,
    "ChronoEditTransformer3DModel": WAN,
    "CogView3PlusTransformer2DModel": HEADS
    | {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 64, "condition_dim": 16,
        "pos_embed_max_size": 16, "sample_size": 16,
    },
    "ConsisIDTransformer3DModel": COGVIDEO
    | {
        "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 16, "cross_attn_num_heads": 4, "LFE_id_dim": 32,
        "LFE_vit_dim": 64, "LFE_depth": 5, "LFE_dim_head": 16, "LFE_num_heads": 4, "LFE_num_querie": 4, "LFE_output_dim": 64,
        "LFE_ff_mult": 1,
    },
    "Cosmos3OmniTransformer": {
        "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "latent_channel": 4, "patch_latent_dim": 16,
        "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 64,
        "rope_axes_dim": (4, 2, 2),
    },
    "CosmosTransformer3DModel": HEADS
    | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32, "adaln_lora_dim": 16, "max_size": (4, 8, 8)},
    "DiTTransformer2DModel": HEADS | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
    "DreamLiteTransformer2DModel": HEADS | {"in_channels": 32, "num_layers": 1, "cross_attention_dim": 32, "num_kv_heads": 2},
    "EasyAnimateTransformer3DModel": HEADS
    | {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8, "num_layers": 2,
        "mmdit_layers": 1, "time_embed_dim": 32, "text_embed_dim": 32,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 64, "num_attention_heads": 4, "num_layers": 1, "ffn_hidden_size": 128, "in_channels": 16,
        "out_channels": 16, "text_in_dim": 32, "rope_axes_dim": (4, 4, 8),
    },
    "Flux3Transformer2DModel": HEADS
    | {
        "in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 32,
        "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
    },
    "GlmImageTransformer2DModel": HEADS
    | {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 64, "condition_dim": 16,
        "prior_vq_quantizer_codebook_size": 64,
    },
    "HeliosTransformer3DModel": {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 8)},
    "HiDreamImageTransformer2DModel": HEADS
    | {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "caption_channels": [32, 32],
        "text_emb_dim": 32, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 8),
        "max_resolution": (16, 16), "llama_layers": [0, 1],
    },
    "HunyuanImageTransformer2DModel": HUNYUAN | {"num_single_layers": 1, "text_embed_2_dim": 32, "rope_axes_dim": (8, 8)},
    "HunyuanVideo15Transformer3DModel": HUNYUAN
    | {"in_channels": 9, "text_embed_2_dim": 32, "image_embed_dim": 32, "rope_axes_dim": (4, 4, 8), "target_size": 16},
    "HunyuanVideoFramepackTransformer3DModel": HUNYUAN_VIDEO
    | {"has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
    "Ideogram4Transformer2DModel": HEADS
    | {
        "in_channels": 16, "num_layers": 1, "intermediate_size": 128, "adaln_dim": 32, "llm_features_dim": 64,
        "mrope_section": (4, 2, 2),
    },
    "JoyImageEditPlusTransformer3DModel": JOY,
    "JoyImageEditTransformer3DModel": JOY,
    "Kandinsky5Transformer3DModel": KANDINSKY | {"in_text_dim": 32, "in_text_dim2": 32, "num_text_blocks": 1},
    "Kandinsky6SRTransformer3DModel": KANDINSKY | {"in_visual_dim": 4, "out_visual_dim": 4},
    "Kandinsky6Transformer3DModel": KANDINSKY | {"in_text_dim": 32, "in_text_dim2": 32, "num_text_blocks": 1},
    "Krea2Transformer2DModel": HEADS
    | ROPE
    | {
        "in_channels": 16, "num_layers": 1, "num_key_value_heads": 2, "intermediate_size": 128, "timestep_embed_dim": 32,
        "text_hidden_dim": 64, "num_text_layers": 2, "text_num_attention_heads": 4, "text_num_key_value_heads": 4,
        "text_intermediate_size": 128, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    },
    "LTX2VideoTransformer3DModel": LTX2,
    "LongCatAudioDiTTransformer": {"dit_dim": 64, "dit_depth": 1, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8},
    "LongCatImageTransformer2DModel": FLUX | {"pooled_projection_dim": 32},
    "LuminaNextDiT2DModel": {
        "sample_size": 16, "hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 64,
        "cross_attention_dim": 32,
    },
    "MiniMaxH3Transformer3DModel": HEADS
    | {
        "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 128, "in_channels": 4, "audio_in_channels": 8,
        "text_dim": 32, "freq_dim": 32, "time_embed_hidden_dim": 64, "time_embed_dim": 32, "rope_freq_dim": 2,
    },
    "MiniMaxMusic3RVQDepthDecoder": {
        "hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "intermediate_size": 128, "audio_vocab_size": 32,
        "num_codebooks": 2,
    },
    "MiniMaxMusic3Transformer1DModel": HEADS
    | {
        "in_channels": 8, "condition_dim": 32, "num_layers": 1, "ff_inner_dim": 128, "rotary_dim": 8,
        "fourier_embedding_dim": 32,
    },
    "MotifVideoTransformer3DModel": HEADS
    | {
        "in_channels": 9, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_decoder_layers": 0,
        "text_embed_dim": 32, "image_embed_dim": 32, "rope_axes_dim": (4, 4, 8),
    },
    "NucleusMoEImageTransformer2DModel": HEADS
    | ROPE
    | {
        "in_channels": 16, "out_channels": 4, "num_layers": 5, "joint_attention_dim": 32, "num_experts": 4,
        "moe_intermediate_dim": 64, "capacity_factors": [8.0] * 5,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "num_layers": 1,
        "pad_token_id": 0, "vocab_size": 64, "max_position_embeddings": 256, "original_max_position_embeddings": 256,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}, "pos_embed_max_size": 24, "time_step_dim": 32,
    },
    "OvisImageTransformer2DModel": FLUX | {"out_channels": 16},
    "PRXTransformer2DModel": {
        "in_channels": 4, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1,
        "axes_dim": [8, 8],
    },
    "PriorTransformer": HEADS | {"num_layers": 1, "embedding_dim": 32, "num_embeddings": 8},
    "QwenImage21Transformer2DModel": HEADS
    | ROPE
    | {"in_channels": 16, "out_channels": 16, "num_layers": 1, "context_in_dim": 32, "mlp_ratio": 2},
    "RFD4ProteinaTransformer": {
        "nlayers": 1, "token_dim": 64, "nheads": 4, "dim_cond": 32, "pair_repr_dim": 32, "latent_dim": 8, "t_emb_dim": 32,
        "tri_mult_c": 32,
    },
    "SanaVideoTransformer3DModel": SANA | {"sample_size": 8, "rope_max_seq_len": 32},
    "SanaWMLTX2RefinerTransformer3DModel": LTX2,
    "SanaWMTransformer3DModel": {
        "in_channels": 8, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "softmax_every_n": 2,
        "linear_head_dim": 16, "chunk_plucker_channels": 8, "chunk_plucker_post_attn_blocks": 1, "image_size": 64,
        "caption_channels": 32,
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "StableAudio3DiTModel": {
        "io_channels": 8, "embed_dim": 64, "depth": 1, "num_heads": 4, "cond_token_dim": 32, "global_cond_dim": 32,
        "local_add_cond_dim": 9, "timestep_features_dim": 32, "ff_mult": 2.0, "num_memory_tokens": 4,
    },
    "T5FilmDecoder": {
        "input_dims": 8, "targets_length": 16, "d_model": 64, "num_layers": 1, "num_heads": 4, "d_kv": 16, "d_ff": 128,
    },
    "Transformer2DModel": HEADS | {"in_channels": 32, "num_layers": 1, "cross_attention_dim": 32},
    "TransformerTemporalModel": HEADS | {"in_channels": 32, "num_layers": 1},
    "WanAnimate2Transformer3DModel": {
        "text_len": 16, "in_dim": 12, "dim": 64, "ffn_dim": 128, "freq_dim": 32, "text_dim": 32, "out_dim": 4, "num_heads": 4,
        "num_layers": 1,
    },
    "WanAnimateTransformer3DModel": WAN
    | {
        "in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 32,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16, "motion_style_dim": 16,
        "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 32, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
    },
    "WanVACETransformer3DModel": WAN | {"vace_layers": [0], "vace_in_channels": 8},
}  # fmt: skip


PIPELINES = {
    "AceStepTransformer1DModel": "ace-step",
    "AuraFlowTransformer2DModel": "auraflow",
    "ChromaTransformer2DModel": "chroma",
    "CogVideoXTransformer3DModel": "cogvideox",
    "CogView4Transformer2DModel": "cogview4",
    "Flux2Transformer2DModel": "flux2-klein",
    "FluxTransformer2DModel": "flux",
    "HunyuanDiT2DModel": "hunyuan-dit",
    "HunyuanVideoTransformer3DModel": "hunyuan-video",
    "LTXVideoTransformer3DModel": "ltx",
    "LatteTransformer3DModel": "latte",
    "Lumina2Transformer2DModel": "lumina2",
    "MochiTransformer3DModel": "mochi",
    "PixArtTransformer2DModel": "pixart-sigma",
    "QwenImageTransformer2DModel": "qwen-image",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
    "StableAudioDiTModel": "stable-audio",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "z-image",
}


def classes() -> dict[str, type]:
    """Every transformer class that diffusers exports, by name."""
    exported = {name: getattr(diffusers, name) for name in dir(diffusers)}
    models = {n: c for n, c in exported.items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}
    return {n: c for n, c in models.items() if c.__module__.startswith("diffusers.models.transformers.")}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model, its weights drawn from the seed; blocks that have an embedder each have copies of one, as trained ones do."""
    torch.manual_seed(seed)
    with tiny_pipelines.unset_is_nan():
        if name in PIPELINES:
            model = tiny_pipelines.BUILDERS[PIPELINES[name]]().transformer
        else:
            model = getattr(diffusers, name)(**CONFIGS[name])
    for p in model.parameters():  # nothing is exactly zero, or was never set
        if not p.any() or not p.isfinite().all():
            nn.init.normal_(p, std=0.05)
    for path in block_embedders(model):
        first, *others = (block.get_submodule(path) for block in named_blocks(model).values())
        for other in others:
            other.load_state_dict(first.state_dict())
    return model.eval()


class Alone(diffusers.DiffusionPipeline):
    """A pipeline of a transformer and nothing else."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.register_modules(transformer=transformer)
