"""Tiny real models, seeded, shared by all tests. Nothing here needs a network or a GPU."""

import hub_environment  # noqa: F401  sets the environment, so it comes first
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from hub_fixtures import ann, hub  # noqa: F401  fixtures

import vq4dit
from vq4dit import (
    best,
    estimate,  # noqa: F401  copies the real TOKENS before they are changed here
    layer_by_layer,
    sensitivity,
)

layer_by_layer.TOKENS = sensitivity.TOKENS = 640  # two trajectories of the tiny model
best.BEAM = 2


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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


@pytest.fixture
def transformer() -> DiTTransformer2DModel:
    return new_transformer()


@pytest.fixture
def pipeline() -> DiTPipeline:
    return new_pipeline()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """The tiny pipeline as a folder, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    new_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory):
    """The tiny pipeline at 2 bits by k-means, saved."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-2bit"
    vq4dit.save(vq4dit.quantize(new_pipeline(), vq4dit.QuantizationSettings(recipe="kmeans")), folder)
    return folder


def quick_settings(**changes) -> vq4dit.QuantizationSettings:
    """`paper`, or another recipe, with few steps."""
    few = {"steps": 12, "num_inference_steps": 5, "num_trajectories": 2}
    calibration = vq4dit.CalibrationConfig(**(few | changes.pop("calibration", {})))
    return vq4dit.QuantizationSettings(**({"recipe": "paper", "calibration": calibration} | changes))


@pytest.fixture
def one_step_input():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return {"hidden_states": latents, "timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([0, 1000])}
