"""Make the text-to-video model `assets/emoji-video/`: a `WanPipeline` that draws films of 9 frames, trained from nothing.

Wan's transformer sees a film as tokens in space and time, under rotary positions of three axes; words come in by cross
attention, one token a word from a small UMT5 encoder that learns together with it. Its autoencoder is causal in time: a
film of 9 frames of 64 x 64 becomes 3 latent frames of 8 x 8 x 16, the first of the first frame alone. Here it works on
patches of 2 x 2 pixels, which makes it four times as quick. 48 tokens of 2 x 2 x 16 a film, no more than an image of
emoji-flux has.

    python assets/train_emoji_video.py autoencoder --device cuda    # stage 1
    python assets/train_emoji_video.py decoder --device cuda        # stage 2: its second half alone
    python assets/train_emoji_video.py train --device cuda          # stage 3; all may be stopped at any moment and go on
    python assets/train_emoji_video.py save                         # assets/emoji-video, with the average weights
    python assets/train_emoji_video.py sheet                        # samples.png, samples.webp, and what a film costs

Where there is no checkpoint of an earlier stage, or of this one, it goes on from what is in `assets/emoji-video`; only the
optimiser starts anew. Needs `npm` and the packages in tests/requirements.txt.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from emoji_films import FRAMES, films
from emoji_flow import mean_velocity, noise_levels
from emoji_images import normalise
from emoji_prompts import DRAWS, T5_LENGTH, drawn_prompts, subject_words, t5_tokenizer, tokens
from emoji_training import Checkpoint, Course, Trainer, learning_rate, train
from PIL import Image
from torch import Tensor, nn
from train_emoji_dit import ema_weights, reconstruction_loss
from transformers import UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
RESULT = HERE / "emoji-video"
WIDTH, TEXT_WIDTH, LATENT_CHANNELS = 224, 128, 16
STEPS = {"autoencoder": 900, "decoder": 1500, "train": 3500}
BATCH_SIZE = {"autoencoder": 32, "decoder": 32, "train": 512}
DROPPED = 0.1  # share of prompts replaced by "", so that there is something to guide away from
TRAINED = ("transformer", "text_encoder")
DECODING = ("decoder", "post_quant_conv")  # of the autoencoder
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


def train_autoencoder(work: Path, seed: int, course: Course, batch_size: int, device: str) -> None:
    """L1 + L2 + differences in space, and in time, where most of a film stands still and what moves must not be lost."""
    torch.manual_seed(seed)
    pixels = as_tensor(films(work).pixels).to(device)
    vae = new_autoencoder().train().to(device)
    generator = torch.Generator(device).manual_seed(seed)
    checkpoint = Checkpoint(work / "video-autoencoder.safetensors")
    trainer = Trainer(dict(vae.named_parameters()), generator, 0.998)
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator, device=device)
        film = pixels[chosen].float() / 127.5 - 1
        mean = vae.encode(film).latent_dist.mean
        again = vae.decode(mean + 0.05 * torch.randn(mean.shape, generator=generator, device=device)).sample
        return film_loss(again, film) + 1e-4 * mean.square().mean()

    def schedule(step: int) -> float:
        return learning_rate(step, course, 2e-3, warmup=100, decay_from=0.3)

    for _ in train(trainer, checkpoint, course, schedule, loss_of_batch, batch_size):
        pass


def film_loss(film: Tensor, original: Tensor) -> Tensor:
    return reconstruction_loss(film, original) + (film - original).diff(dim=2).abs().mean()


def train_decoder(work: Path, seed: int, course: Course, batch_size: int, device: str) -> None:
    """The decoder goes on alone: nothing waits for an encoder, and latents, which the transformer learns, stay."""
    torch.manual_seed(seed)
    vae, latents = autoencoder_and_latents(work, device)
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    pixels, latents = as_tensor(films(work).pixels).to(device), (latents * std + mean).to(device)
    vae.train().to(device)
    decoding = {n: p for n, p in vae.named_parameters() if n.startswith(DECODING)}
    vae.requires_grad_(False)
    for parameter in decoding.values():
        parameter.requires_grad_()
    generator = torch.Generator(device).manual_seed(seed)
    checkpoint = Checkpoint(work / "video-decoder.safetensors")
    trainer = Trainer(decoding, generator, 0.998)
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator, device=device)
        noisy = latents[chosen] + 0.05 * torch.randn(latents[chosen].shape, generator=generator, device=device)
        return film_loss(vae.decode(noisy).sample, pixels[chosen].float() / 127.5 - 1)

    def schedule(step: int) -> float:
        return learning_rate(step, course, 1.5e-3, warmup=100, decay_from=0.2)

    for _ in train(trainer, checkpoint, course, schedule, loss_of_batch, batch_size):
        pass


@torch.no_grad()
def autoencoder_and_latents(work: Path, device: str = "cpu") -> tuple[AutoencoderKLWan, Tensor]:
    """The trained autoencoder, which knows mean and deviation of its latents, and all latents (n, 16, 3, 8, 8), normalised."""
    vae = new_autoencoder().eval()
    if (work / "video-autoencoder.safetensors").exists():
        vae.load_state_dict(ema_weights(work / "video-autoencoder.safetensors"))
    else:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(RESULT, subfolder="vae", dtype=torch.float32).state_dict())
    if (work / "video-decoder.safetensors").exists():
        vae.load_state_dict(ema_weights(work / "video-decoder.safetensors"), strict=False)
    cache = work / "video-latents.pt"
    if not cache.exists():
        parts = as_tensor(films(work).pixels).split(16)
        encoder = vae.to(device)
        means = [encoder.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in parts]
        torch.save(torch.cat(means), cache)
        vae.to("cpu")
    latents = torch.load(cache)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae, (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


# --- stage 2: transformer and text encoder ---------------------------------------------------------------------------


def new_transformer() -> WanTransformer3DModel:
    """12 blocks of width 224: 9.6 M weights; the output starts at zero."""
    transformer = WanTransformer3DModel(
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=12,
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

    def __init__(
        self,
        pipeline: WanPipeline,
        words: list[list[str]],
        latents: Tensor,
        seed: int,
        batch_size: int,
        generator: torch.Generator,
    ):
        device = generator.device
        self.pipeline, self.generator, self.batch_size = pipeline, generator, batch_size
        self.latents, self.weights = latents.to(device), torch.ones(len(latents), device=device)
        self.words = tokens(pipeline.tokenizer, drawn_prompts(words, [None], seed), T5_LENGTH).to(device)
        self.nothing = tokens(pipeline.tokenizer, [""], T5_LENGTH).to(device)

    def __call__(self) -> Tensor:
        generator, device = self.generator, self.generator.device
        chosen = torch.randint(len(self.latents), (self.batch_size,), generator=generator, device=device)
        dropped = torch.rand(self.batch_size, 1, generator=generator, device=device) < DROPPED
        draw = torch.randint(DRAWS, chosen.shape, generator=generator, device=device)
        words = torch.where(dropped, self.nothing, self.words[chosen * DRAWS + draw])
        meant = dropped | (torch.arange(len(self.latents), device=device) == chosen[:, None])
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = noise_levels(self.batch_size, generator)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        predicted = self.pipeline.transformer(noisy, 1000 * sigma, self.encoded(words), return_dict=False)[0]
        return F.mse_loss(predicted, mean_velocity(noisy, sigma, self.latents, self.weights, meant))

    def encoded(self, words: Tensor) -> Tensor:
        """(b, 12, 128), zero where there is no word, as the pipeline makes it."""
        mask = (words != self.pipeline.tokenizer.pad_token_id).long()
        return self.pipeline.text_encoder(words, mask).last_hidden_state * mask.unsqueeze(-1)


def start(work: Path, seed: int, device: str = "cpu") -> tuple[WanPipeline, Trainer, Tensor]:
    """The pipeline, its trainer as far as it had come, and the latents."""
    vae, latents = autoencoder_and_latents(work, device)
    pipeline = new_pipeline(work, seed, vae).to(device)
    parts = {part: getattr(pipeline, part) for part in TRAINED}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    trainer = Trainer(parameters, torch.Generator(device).manual_seed(seed), 0.999)
    if stored := Checkpoint(work / "video.safetensors").load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    elif (RESULT / "model_index.json").exists():
        known = WanPipeline.from_pretrained(RESULT, dtype=torch.float32)
        trainer.begin({f"{part}.{n}": p for part in TRAINED for n, p in getattr(known, part).named_parameters()})
    return pipeline, trainer, latents


def train_video(work: Path, seed: int, course: Course, batch_size: int, device: str) -> None:
    pipeline, trainer, latents = start(work, seed, device)
    lesson = Lesson(pipeline, words_of(films(work).names), latents, seed, batch_size, trainer.generator)

    def schedule(step: int) -> float:
        return learning_rate(step, course, 1e-3, 200, decay_from=0.55)

    for _ in train(trainer, Checkpoint(work / "video.safetensors"), course, schedule, lesson, batch_size):
        pass


# --- results ---------------------------------------------------------------------------------------------------------


def save(work: Path, seed: int) -> None:
    """The average weights, fp16, in shards under 9 MB; the text encoder stays fp32, as transformers would load it."""
    pipeline, trainer, _ = start(work, seed)
    with torch.no_grad():
        torch._foreach_copy_(trainer.live, trainer.ema)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(RESULT, max_shard_size="8MB")
    print(f"{trainer.step} steps: {RESULT}")


def sheet(work: Path, seed: int, columns: int = 6, rows: int = 4) -> None:
    """Films of subjects spread evenly, every one from the noise of the seed; nothing picked. One film a row, and all moving.

    Prints what a film costs, and what the autoencoder loses (PSNR in dB; it has seen all of these films).
    """
    pipeline = WanPipeline.from_pretrained(RESULT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found = films(work)
    words, count = words_of(found.names), columns * rows
    chosen = [i * len(words) // count for i in range(count)]
    prompts = [words[i][0] for i in chosen]
    call = CALL | {"negative_prompt": "", "num_inference_steps": 20, "output_type": "np"}
    noises = [torch.Generator().manual_seed(seed) for _ in prompts]
    drawn = pipeline(prompts, generator=noises, **call | {"negative_prompt": [""] * count}).frames
    pixels = (255 * drawn).round().astype(np.uint8)  # (24, 9, 64, 64, 3)
    strips = np.concatenate([np.concatenate(list(film), axis=1) for film in pixels])
    Image.fromarray(strips).save(RESULT / "samples.png", optimize=True)
    grid = (
        pixels.reshape(rows, columns, FRAMES, 64, 64, 3).transpose(2, 0, 3, 1, 4, 5).reshape(FRAMES, rows * 64, columns * 64, 3)
    )
    first, *others = [Image.fromarray(frame) for frame in grid]
    first.save(RESULT / "samples.webp", save_all=True, append_images=others, duration=120, loop=0, lossless=True)
    print(" | ".join(prompts))
    started = time.perf_counter()
    pipeline(prompts[0], generator=torch.Generator().manual_seed(seed), **call)
    print(f"{time.perf_counter() - started:.1f} s a film of 20 steps, {torch.get_num_threads()} threads")
    original = as_tensor(found.pixels[chosen]).float() / 127.5 - 1
    with torch.no_grad():
        again = pipeline.vae.decode(pipeline.vae.encode(original).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((again - original) / 2).square().mean((1, 2, 3, 4)).log10()
    print(f"autoencoder: {psnr.mean():.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STEPS, "sheet", "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, films, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"length of the schedule ({STEPS})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="fit the schedule into this time")
    parser.add_argument("--batch", type=int, help=f"{BATCH_SIZE}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in STEPS:
        course = Course(args.steps or STEPS[args.stage], 60 * args.minutes)
        stages = {"autoencoder": train_autoencoder, "decoder": train_decoder, "train": train_video}
        stages[args.stage](args.work, args.seed, course, args.batch or BATCH_SIZE[args.stage], args.device)
    else:
        (sheet if args.stage == "sheet" else save)(args.work, args.seed)


if __name__ == "__main__":
    main()
