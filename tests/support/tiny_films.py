"""Pipelines that make films or sounds from a prompt, tiny and random (see `tiny_pipelines`)."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from tiny_pictures import kl_vae
from tiny_text_encoders import (
    clip_encoder,
    clip_tokenizer,
    llama_encoder,
    qwen3_encoder,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from torch import nn


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_layers=2, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.LTXPipeline(scheduler, vae, t5_encoder(), t5_tokenizer(), transformer)


def _wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=32, ffn_dim=128,
        rope_max_seq_len=32,
    )  # fmt: skip


def _wan_vae() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(t5_tokenizer(), t5_encoder(kind="UMT5"), _wan_vae(), scheduler, _wan_transformer())


def wan22() -> Any:
    """Two transformers: one for the noisy steps, the other for the rest."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(
        t5_tokenizer(), t5_encoder(kind="UMT5"), _wan_vae(), scheduler, _wan_transformer(), _wan_transformer(),
        boundary_ratio=0.875,
    )  # fmt: skip


def cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=64,
        text_embed_dim=32, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=226,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(t5_tokenizer(), t5_encoder(), vae, transformer, diffusers.CogVideoXDDIMScheduler())


def hunyuan_video() -> Any:
    """Its template fills the few tokens of the first text encoder, so prompts differ by what the second one says."""
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(
        llama_encoder(), qwen_tokenizer(), transformer, vae, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        clip_encoder(), clip_tokenizer(),
    )  # fmt: skip


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, pooled_projection_dim=64, text_embed_dim=32,
        time_embed_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1, 1, 1, 1, 1)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, vae, t5_encoder(), t5_tokenizer(), transformer)


def latte() -> Any:
    """Blocks for space and for time in turn."""
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64,
        attention_bias=True, sample_size=16, patch_size=2, activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, caption_channels=32, video_length=4,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return diffusers.LattePipeline(t5_tokenizer(), t5_encoder(), kl_vae(4), transformer, scheduler)


def _sound_vae() -> nn.Module:
    """Two latents a second."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=8, sampling_rate=16,
    )  # fmt: skip


def stable_audio() -> Any:
    """With the scheduler of its type hint: that of the published model needs `torchsde`."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=32, in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=8, cross_attention_dim=64, time_proj_dim=16, global_states_input_dim=64,
        cross_attention_input_dim=32,
    )  # fmt: skip
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 32
    return diffusers.StableAudioPipeline(_sound_vae(), t5_encoder(), projection, tokenizer, transformer, scheduler)


def ace_step() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    transformer = diffusers.AceStepTransformer1DModel(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, **heads
    )
    conditions = AceStepConditionEncoder(
        hidden_size=64, intermediate_size=64, text_hidden_dim=16, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, **heads,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    return diffusers.AceStepPipeline(_sound_vae(), qwen3_encoder(), qwen_tokenizer(), transformer, conditions, scheduler)
