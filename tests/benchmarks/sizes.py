"""What published transformers would weigh: their real shapes, without a number of them (`python tests/benchmarks/sizes.py`).

A model is built on the meta device, from its class's defaults where those are the published model's; the bytes are those that
`inspect` predicts from a file's headers.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from vq4dit.models.blocks import find_targets, kept_parameters
from vq4dit.pipelines.inspect import predict_size

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "DiT-XL/2": ("DiTTransformer2DModel", {}),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096},
    ),
    "StableAudio Open": ("StableAudioDiTModel", {}),
    "HunyuanDiT 1.2": (
        "HunyuanDiT2DModel",
        {"num_layers": 40, "in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408} | {"mlp_ratio": 4.3637},
    ),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "LTX-Video": ("LTXVideoTransformer3DModel", {}),
    "Lumina-Image 2.0": ("Lumina2Transformer2DModel", {}),
    "FLUX.2-klein 4B": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "CogView4": (
        "CogView4Transformer2DModel",
        {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
    ),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "SD3.5 large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
        | {"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "Mochi 1": ("MochiTransformer3DModel", {}),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "FLUX.2 dev": ("Flux2Transformer2DModel", {}),
}


def row(name: str) -> str:
    kind, config = PUBLISHED[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, kind)(**config)
    targets, _ = find_targets(transformer, 4, 256)
    kept = sum(kept_parameters(transformer, targets).values())
    count = kept + sum(p.numel() for linear in targets.values() for p in linear.parameters())
    sizes = [predict_size(transformer, bits).file_bytes / 1e9 for bits in (2, 3, 4)]
    told = " | ".join(f"{value:.2f}" for value in (2 * count / 1e9, *sizes))
    return f"| {name} | {kind} | {count / 1e9:.2f} | {1 - kept / count:.1%} | {told} |"


def main() -> None:
    print("| model | class | billion parameters | quantized | GB in 16 bit | 2 bits | 3 bits | 4 bits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in PUBLISHED:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
