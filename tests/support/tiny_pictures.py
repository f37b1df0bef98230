"""Pipelines that draw pictures from a prompt, tiny and random (see `tiny_pipelines`)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_text_encoders import (
    bert_encoder,
    bert_tokenizer,
    clip_encoder,
    clip_tokenizer,
    gemma2_encoder,
    gemma_tokenizer,
    glm_encoder,
    glm_tokenizer,
    qwen3_encoder,
    qwen25_vl_encoder,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from torch import nn


def kl_vae(latent_channels: int, cls: str = "AutoencoderKL", halvings: int = 1, **more: Any) -> nn.Module:
    return getattr(diffusers, cls)(
        down_block_types=["DownEncoderBlock2D"] * (halvings + 1), up_block_types=["UpDecoderBlock2D"] * (halvings + 1),
        block_out_channels=(4,) * (halvings + 1), latent_channels=latent_channels, norm_num_groups=1, sample_size=32,
        **more,
    )  # fmt: skip


NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}


def pixart_sigma() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, caption_channels=32,
        in_channels=4, out_channels=8,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        t5_tokenizer(), t5_encoder(), kl_vae(4), transformer, diffusers.DPMSolverMultistepScheduler()
    )


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4, attention_head_dim=16,
        caption_projection_dim=64, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(4, **NO_QUANT),
        text_encoder=clip_encoder(True), tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(64), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux(guidance_embeds: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, num_attention_heads=4, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), kl_vae(4, **NO_QUANT), clip_encoder(),
        clip_tokenizer(), t5_encoder(), t5_tokenizer(), transformer,
    )  # fmt: skip


def flux2_klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, num_attention_heads=4, attention_head_dim=16,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = kl_vae(4, "AutoencoderKLFlux2", use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, vae, qwen3_encoder(28, causal=True), qwen_tokenizer(), transformer)


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=16, num_cross_attention_heads=4,
        cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=16, sample_size=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return diffusers.SanaPipeline(gemma_tokenizer(), gemma2_encoder(), vae, transformer, scheduler)


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=16, rope_theta=256.0,
        axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # torch.empty
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    return diffusers.ZImagePipeline(scheduler, kl_vae(16, **NO_QUANT), qwen3_encoder(3), qwen_tokenizer(), transformer)


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.QwenImagePipeline(scheduler, vae, qwen25_vl_encoder(), qwen_tokenizer(), transformer)


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=64, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=64, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(
        transformer, scheduler, kl_vae(4, halvings=3, **NO_QUANT), gemma2_encoder(), gemma_tokenizer()
    )


def auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pos_embed_max_size=256,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(t5_tokenizer(), t5_encoder(kind="UMT5"), kl_vae(4), transformer, scheduler)


def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=64, condition_dim=16, pos_embed_max_size=16, sample_size=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return diffusers.CogView4Pipeline(glm_tokenizer(), glm_encoder(), kl_vae(4, **NO_QUANT), transformer, scheduler)


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8), approximator_hidden_dim=64, approximator_layers=2,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.ChromaPipeline(scheduler, kl_vae(4, **NO_QUANT), t5_encoder(), t5_tokenizer(), transformer)


def hunyuan_dit() -> Any:
    """Its last block has a long skip from the one before the middle."""
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=16, hidden_size=64, num_layers=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
    return diffusers.HunyuanDiTPipeline(
        kl_vae(4, halvings=3),
        bert_encoder(),
        bert_tokenizer(),
        transformer,
        scheduler,
        None,
        None,
        False,
        t5_encoder(),
        t5_tokenizer(),
    )
