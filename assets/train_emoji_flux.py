"""Make the text-to-image model `assets/emoji-flux/`: a `FluxPipeline` that draws emoji from words, trained from nothing.

FLUX is the modern kind of DiT. Text and image tokens pass through double blocks, each stream with weights of its own, then
as one sequence through single blocks; positions are rotations; a T5 encoder gives a token for each word and a CLIP encoder
one vector for the whole prompt. It predicts the velocity of a straight line from image to noise (flow matching).
Here everything is small, and both text encoders learn together with the transformer, from prompts of `emoji_prompts.py`.
Images are latents of the autoencoder of `assets/emoji-dit`, 16 x 16 x 4, as 64 tokens of 2 x 2 x 4.

    python assets/train_emoji_flux.py train --device cuda   # may be stopped at any moment and goes on from its checkpoint
    python assets/train_emoji_flux.py save                  # assets/emoji-flux, with the average weights
    python assets/evaluate_emoji_flux.py                    # its figures and pictures

Needs `npm` and the packages in tests/requirements.txt. Without a GPU, `--batch 32` and 8,000 steps take about eight hours.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_flow import mean_velocity, noise_levels
from emoji_images import STYLE_NAMES, render
from emoji_prompts import (
    CLIP_LENGTH,
    DRAWS,
    T5_LENGTH,
    clip_tokenizer,
    drawn_prompts,
    held_out_pairs,
    phrases,
    subject_words,
    t5_tokenizer,
    tokens,
)
from emoji_training import Checkpoint, Course, Trainer, learning_rate, train
from torch import Tensor, nn
from train_emoji_dit import encode, pixels_as_tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

HERE = Path(__file__).parent
RESULT = HERE / "emoji-flux"
WIDTH, TEXT_WIDTH = 224, 128
BATCH_SIZE, STEPS, PEAK, WARMUP, EMA_DECAY = 512, 3_000, 1e-3, 200, 0.999
DROPPED = 0.1  # share of prompts replaced by "", so that there is something to guide away from
STYLED = 0.75  # share of the other prompts that name a style
FAMILIAR = 159  # the subjects of emoji-dit are drawn twice as often as the others
TRAINED = ("transformer", "text_encoder", "text_encoder_2")


# --- data ------------------------------------------------------------------------------------------------------------


def autoencoder() -> AutoencoderKL:
    """That of emoji-dit; FluxPipeline wants a shift, and latents have mean 0 already."""
    vae = AutoencoderKL.from_pretrained(HERE / "emoji-dit", subfolder="vae", dtype=torch.float32).eval()
    vae.register_to_config(shift_factor=0.0)
    return vae


def training_latents(work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (n, 64, 16), packed as FLUX packs them, subjects (n,) and styles (n,); held-out pairs are not among them."""
    cache = work / "flux-latents.pt"
    if cache.exists():
        return torch.load(cache)
    images = render(work)
    number = {name: index for index, name in enumerate(subject_words())}
    subjects = torch.tensor([number.get(name, -1) for name in images.names.tolist()])
    styles = torch.from_numpy(images.styles).long()
    kept = (subjects >= 0) & ~torch.from_numpy(held_out_pairs(subjects.numpy(), styles.numpy()))
    latents = encode(autoencoder(), pixels_as_tensor(images)[kept])
    packed = FluxPipeline._pack_latents(latents, len(latents), 4, 16, 16)
    torch.save((packed, subjects[kept], styles[kept]), cache)
    return packed, subjects[kept], styles[kept]


# --- model -----------------------------------------------------------------------------------------------------------


def new_text_encoders(clip_words: int, t5_words: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Two layers each.

    CLIP's answer is what its end token knows of the words before it. At first that token only knows itself, and every
    prompt looks alike; so it starts silent, and its attention starts as an average of the words.
    """
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    text = getattr(clip, "text_model", clip)
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.5)
    nn.init.zeros_(text.embeddings.token_embedding.weight[:2].data)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.02)
    for layer in text.encoder.layers:
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        nn.init.orthogonal_(layer.self_attn.out_proj.weight)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_words,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, t5


def new_transformer() -> FluxTransformer2DModel:
    """4 double and 6 single blocks of width 224: 11.8 M weights; modulation and output start at zero."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=4,
        num_single_layers=6,
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    silent = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        silent += [block.norm1.linear, block.norm1_context.linear]
    silent += [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def new_pipeline(seed: int) -> FluxPipeline:
    torch.manual_seed(seed)
    words, pieces = clip_tokenizer(phrases()), t5_tokenizer(phrases())
    clip, t5 = new_text_encoders(len(words), len(pieces))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=clip,
        tokenizer=words,
        text_encoder_2=t5,
        tokenizer_2=pieces,
        transformer=new_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained_parameters(pipeline: FluxPipeline) -> dict[str, Tensor]:
    parts = {part: getattr(pipeline, part) for part in TRAINED}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


# --- training --------------------------------------------------------------------------------------------------------


class Lesson:
    """Draws batches; returns E || v - FLUX(x_σ, σ, prompt) ||², with v the mean over the images that the prompt may mean:
    those of the subject if no style is named, all of them if the prompt is ""."""

    def __init__(self, pipeline: FluxPipeline, work: Path, seed: int, batch_size: int, generator: torch.Generator):
        device = generator.device
        self.pipeline, self.generator, self.batch_size = pipeline, generator, batch_size
        self.latents, self.subjects, self.styles = (tensor.to(device) for tensor in training_latents(work))
        self.whole, self.words = self.prompts(drawn_prompts(subject_words().values(), (*STYLE_NAMES, None), seed))
        self.nothing = self.prompts([""])
        self.weights = torch.where(self.subjects < FAMILIAR, 2.0, 1.0)
        self.image_positions = pipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
        self.text_positions = torch.zeros(T5_LENGTH, 3, device=device)

    def prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token numbers (n, 16) for CLIP and (n, 12) for T5."""
        whole = tokens(self.pipeline.tokenizer, prompts, CLIP_LENGTH)
        return whole.to(self.generator.device), tokens(self.pipeline.tokenizer_2, prompts, T5_LENGTH).to(self.generator.device)

    def chance(self, probability: float) -> Tensor:
        """(b, 1) bool."""
        drawn = torch.rand(self.batch_size, 1, generator=self.generator, device=self.generator.device)
        return drawn < probability

    def __call__(self) -> Tensor:
        generator, device = self.generator, self.generator.device
        chosen = torch.multinomial(self.weights, self.batch_size, replacement=True, generator=generator)
        subjects, styles, dropped, styled = (
            self.subjects[chosen],
            self.styles[chosen],
            self.chance(DROPPED),
            self.chance(STYLED),
        )
        style = torch.where(styled[:, 0], styles, len(STYLE_NAMES))
        draw = torch.randint(DRAWS, chosen.shape, generator=generator, device=device)
        row = (subjects * (len(STYLE_NAMES) + 1) + style) * DRAWS + draw
        whole = torch.where(dropped, self.nothing[0], self.whole[row])
        words = torch.where(dropped, self.nothing[1], self.words[row])
        meant = dropped | ((subjects[:, None] == self.subjects) & (~styled | (styles[:, None] == self.styles)))
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = noise_levels(self.batch_size, generator)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
        predicted = self.pipeline.transformer(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=self.pipeline.text_encoder(whole).pooler_output,
            encoder_hidden_states=self.pipeline.text_encoder_2(words)[0],
            txt_ids=self.text_positions,
            img_ids=self.image_positions,
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, mean_velocity(noisy, sigma, self.latents, self.weights, meant))


def start(work: Path, seed: int, device: str = "cpu") -> tuple[FluxPipeline, Trainer]:
    """The pipeline and its trainer, as far as it had come."""
    pipeline = new_pipeline(seed).to(device)
    trainer = Trainer(trained_parameters(pipeline), torch.Generator(device).manual_seed(seed), EMA_DECAY)
    if stored := Checkpoint(work / "flux.safetensors").load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    return pipeline, trainer


def train_flux(work: Path, seed: int, course: Course, batch_size: int, device: str) -> None:
    pipeline, trainer = start(work, seed, device)
    lesson = Lesson(pipeline, work, seed, batch_size, trainer.generator)

    def schedule(step: int) -> float:
        return learning_rate(step, course, PEAK, WARMUP, decay_from=0.55)

    for _ in train(trainer, Checkpoint(work / "flux.safetensors"), course, schedule, lesson, batch_size):
        pass


# --- results ---------------------------------------------------------------------------------------------------------


def save(work: Path, seed: int) -> None:
    """The average weights, fp16, in shards under 9 MB; text encoders stay fp32, as transformers would load them."""
    pipeline, trainer = start(work, seed)
    with torch.no_grad():
        torch._foreach_copy_(trainer.live, trainer.ema)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(RESULT, max_shard_size="8MB")
    print(f"{trainer.step} steps: {RESULT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, images, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="train: length of the schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="train: fit the schedule into this time")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    parser.add_argument("--device", default="cpu", help="train: cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32; bf16 failed in the library of an H200
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "train":
        train_flux(args.work, args.seed, Course(args.steps, 60 * args.minutes), args.batch, args.device)
    else:
        save(args.work, args.seed)


if __name__ == "__main__":
    main()
