"""Make the text-to-video model `assets/emoji-video/`: a `WanPipeline` that draws films of 9 frames, trained from nothing.

Wan's transformer sees a film as tokens in space and time, under rotary positions of three axes; words come in by cross
attention, one token a word from a small UMT5 encoder that learns together with it. Its autoencoder is causal in time: a
film of 9 frames of 64 x 64 becomes 3 latent frames of 8 x 8 x 16, the first of the first frame alone. Here it works on
patches of 2 x 2 pixels, which makes it four times as quick. 48 tokens of 2 x 2 x 16 a film, no more than an image of
emoji-flux has.

    python assets/train_emoji_video.py autoencoder    # stage 1
    python assets/train_emoji_video.py train          # stage 2; both may be stopped at any moment and go on
    python assets/train_emoji_video.py sheet          # look at it: work/video.png
    python assets/train_emoji_video.py save           # assets/emoji-video

Needs `npm` and the packages in tests/requirements.txt.
"""

import argparse
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from emoji_films import FRAMES, films
from emoji_flow import mean_velocity, noise_levels
from emoji_images import normalise
from emoji_prompts import T5_LENGTH, random_prompt, subject_words, t5_tokenizer
from emoji_training import Checkpoint, Trainer, learning_rate, train
from PIL import Image
from torch import Tensor, nn
from train_emoji_dit import ema_weights, reconstruction_loss
from transformers import UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
WIDTH, TEXT_WIDTH, LATENT_CHANNELS = 224, 128, 16
STEPS = {"autoencoder": 4000, "train": 8000}
AUTOENCODER_BATCH, BATCH_SIZE = 4, 32
DROPPED = 0.1  # share of prompts replaced by "", so that there is something to guide away from
TRAINED = ("transformer", "text_encoder")
CALL = {"height": 64, "width": 64, "num_frames": FRAMES, "max_sequence_length": T5_LENGTH, "guidance_scale": 3.0}


def words_of(names: np.ndarray) -> list[list[str]]:
    """What people call each film: the words that images have, or the name itself."""
    known = subject_words()
    return [known.get(normalise(name), [name.replace("-", " ")]) for name in names.tolist()]


# --- stage 1: the autoencoder ----------------------------------------------------------------------------------------


def new_autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(n, 9, 64, 64, 3) uint8 -> (n, 3, 9, 64, 64) uint8."""
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3)


def train_autoencoder(work: Path, seed: int, steps: int) -> None:
    """L1 + L2 + differences in space, and in time, where most of a film stands still and what moves must not be lost."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = as_tensor(films(work).pixels)
    vae = new_autoencoder().train()
    checkpoint = Checkpoint(work / "video-autoencoder.safetensors")
    trainer = Trainer(dict(vae.named_parameters()), generator, 0.995)
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(pixels), (AUTOENCODER_BATCH,), generator=generator)
        film = pixels[chosen].float() / 127.5 - 1
        mean = vae.encode(film).latent_dist.mean
        again = vae.decode(mean + 0.05 * torch.randn(mean.shape, generator=generator)).sample
        in_time = (again - film).diff(dim=2).abs().mean()
        return reconstruction_loss(again, film) + in_time + 1e-4 * mean.square().mean()

    def schedule(step: int) -> float:
        return learning_rate(step, steps, 2e-3, warmup=100, decay_from=0.3)

    for _ in train(trainer, checkpoint, steps, schedule, loss_of_batch, AUTOENCODER_BATCH):
        pass


@torch.no_grad()
def autoencoder_and_latents(work: Path) -> tuple[AutoencoderKLWan, Tensor]:
    """The trained autoencoder, which knows mean and deviation of its latents, and all latents (n, 16, 3, 8, 8), normalised."""
    vae = new_autoencoder().eval()
    vae.load_state_dict(ema_weights(work / "video-autoencoder.safetensors"))
    cache = work / "video-latents.pt"
    if not cache.exists():
        pixels = as_tensor(films(work).pixels)
        torch.save(torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pixels.split(16)]), cache)
    latents = torch.load(cache)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae, (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


# --- stage 2: transformer and text encoder ---------------------------------------------------------------------------


def new_transformer() -> WanTransformer3DModel:
    """10 blocks of width 224: 8.0 M weights; the output starts at zero."""
    transformer = WanTransformer3DModel(
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=10,
    )
    for layer in (transformer.proj_out, transformer.condition_embedder.time_proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def new_pipeline(work: Path, seed: int, vae: AutoencoderKLWan) -> WanPipeline:
    torch.manual_seed(seed)
    pieces = t5_tokenizer([phrase for words in words_of(films(work).names) for phrase in words])
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(pieces),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = WanPipeline(pieces, encoder, vae, scheduler, new_transformer())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Lesson:
    """Draws batches; returns E || v - Wan(x_σ, 1000 σ, prompt) ||², with v the mean over the films that the prompt may mean."""

    def __init__(self, pipeline: WanPipeline, work: Path, latents: Tensor, generator: torch.Generator):
        self.pipeline, self.latents, self.generator = pipeline, latents, generator
        self.words = words_of(films(work).names)
        self.weights = torch.ones(len(latents))

    def prompt(self, film: int, draw: random.Random) -> tuple[str, Tensor]:
        if draw.random() < DROPPED:
            return "", torch.ones(len(self.latents), dtype=torch.bool)
        return random_prompt(self.words[film], None, draw), torch.arange(len(self.latents)) == film

    def __call__(self) -> Tensor:
        chosen = torch.randint(len(self.latents), (BATCH_SIZE,), generator=self.generator)
        draw = random.Random(int(torch.randint(2**31, (1,), generator=self.generator)))
        prompts, meant = zip(*(self.prompt(film, draw) for film in chosen.tolist()), strict=True)
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=self.generator)
        sigma = noise_levels(BATCH_SIZE, self.generator)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        words, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH)
        predicted = self.pipeline.transformer(noisy, 1000 * sigma, words, return_dict=False)[0]
        return F.mse_loss(predicted, mean_velocity(noisy, sigma, self.latents, self.weights, torch.stack(meant)))


def start(work: Path, seed: int) -> tuple[WanPipeline, Trainer, Tensor]:
    """The pipeline, its trainer as far as it had come, and the latents."""
    vae, latents = autoencoder_and_latents(work)
    pipeline = new_pipeline(work, seed, vae)
    parts = {part: getattr(pipeline, part) for part in TRAINED}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    trainer = Trainer(parameters, torch.Generator().manual_seed(seed), 0.9985)
    if stored := Checkpoint(work / "video.safetensors").load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    return pipeline, trainer, latents


def train_video(work: Path, seed: int, steps: int) -> None:
    pipeline, trainer, latents = start(work, seed)
    lesson = Lesson(pipeline, work, latents, trainer.generator)

    def schedule(step: int) -> float:
        return learning_rate(step, STEPS["train"], 1e-3, 200, decay_from=0.5)

    for _ in train(trainer, Checkpoint(work / "video.safetensors"), steps, schedule, lesson, BATCH_SIZE):
        pass


# --- results ---------------------------------------------------------------------------------------------------------


def average_pipeline(work: Path, seed: int) -> WanPipeline:
    """The pipeline with its EMA weights, fp32."""
    pipeline, trainer, _ = start(work, seed)
    with torch.no_grad():
        torch._foreach_copy_(trainer.live, trainer.ema)
    for part in TRAINED:
        getattr(pipeline, part).eval()
    return pipeline


def sheet(work: Path, seed: int, rows: int = 12) -> None:
    """One film a row, subjects spread evenly, every film from the noise of the seed; nothing picked."""
    pipeline = average_pipeline(work, seed)
    words = words_of(films(work).names)
    prompts = [words[i * len(words) // rows][0] for i in range(rows)]
    noises = [torch.Generator().manual_seed(seed) for _ in prompts]
    frames = pipeline(prompts, "", num_inference_steps=20, generator=noises, output_type="np", **CALL).frames
    strip = np.concatenate([np.concatenate(list(film), axis=1) for film in frames], axis=0)
    Image.fromarray((255 * strip).round().astype(np.uint8)).save(work / "video.png")
    print(" | ".join(prompts))


def save(work: Path, seed: int) -> None:
    """fp16, shards under 9 MB; the text encoder stays fp32, as transformers would load it."""
    pipeline = average_pipeline(work, seed)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(HERE / "emoji-video", max_shard_size="8MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STEPS, "sheet", "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, films, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=None, help="stop at this step of the schedule")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    steps = min(STEPS.get(args.stage, 0), args.stop_at or STEPS.get(args.stage, 0))
    if args.stage == "autoencoder":
        train_autoencoder(args.work, args.seed, steps)
    elif args.stage == "train":
        train_video(args.work, args.seed, steps)
    else:
        (sheet if args.stage == "sheet" else save)(args.work, args.seed)


if __name__ == "__main__":
    main()
