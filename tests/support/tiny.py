"""The tiny real models that most tests work on, and settings under which recipes take a moment: random weights, seeded."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import vq4dit

# two trajectories of the tiny model
QUICK = vq4dit.EntropyCodingConfig(sensitivity_tokens=640, tokens=640, beam=2)


def new_transformer(num_layers: int = 2, **changes) -> DiTTransformer2DModel:
    """A DiT of two blocks of width 64, with random weights; like diffusers' converter, it copies one embedder into all."""
    torch.manual_seed(0)
    settings = dict(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    transformer = DiTTransformer2DModel(**(settings | changes)).eval()
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return transformer


def new_pipeline(**changes) -> DiTPipeline:
    transformer = new_transformer(**changes)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), id2label={0: "cat", 1: "dog", 2: "fox"})
    pipeline.register_to_config(id2label={"0": "cat", "1": "dog", "2": "fox"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quick_settings(**changes) -> vq4dit.QuantizationSettings:
    """`paper`, or another recipe, with few steps."""
    few = {"steps": 12, "num_inference_steps": 5, "num_trajectories": 2}
    calibration = vq4dit.CalibrationConfig(**(few | changes.pop("calibration", {})))
    return vq4dit.QuantizationSettings(**({"recipe": "paper", "calibration": calibration, "entropy_coding": QUICK} | changes))


@torch.no_grad()
def guided_in_turn(self, class_labels, num_inference_steps=4, generator=None, guidance_scale=4.0):
    """A `__call__` of `DiTPipeline` that guides in two calls of its transformer instead of one batch."""
    latents = torch.randn(len(class_labels), 4, 8, 8, generator=generator)
    self.scheduler.set_timesteps(num_inference_steps)
    labels = torch.tensor(class_labels)
    for t in self.scheduler.timesteps:
        with_class, without = (
            self.transformer(latents, timestep=t.expand(len(latents)), class_labels=of).sample
            for of in (labels, torch.full_like(labels, 1000))
        )
        latents = self.scheduler.step(without + guidance_scale * (with_class - without), t, latents).prev_sample
    return latents
