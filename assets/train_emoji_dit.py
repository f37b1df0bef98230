"""Make the bundled model `assets/emoji-dit/` from nothing: fetch, render, train two networks, save a `DiTPipeline`.

A latent diffusion transformer is two networks. An autoencoder squeezes 64 x 64 RGB into a 16 x 16 x 4 latent; the DiT
learns to remove noise from latents, given a class. Both are plain diffusers models and nothing of vq4dit is used here.

What made a small DiT learn on two cores: class = subject, batches of 32, lr 1e-3 with a decay at the end, a class
embedding that starts large (std 0.5), latents normalised per channel, v-prediction (at high noise its loss *is* the class,
where noise-prediction barely sees it), timesteps drawn a little more often where images take shape, EMA weights. The DiTs
that people quantize predict the noise, though, and quantize differently: what passes through their layers is mostly the
noisy latent itself. So a second DiT of the same shape learns to predict noise from the first, whose answers, unlike the
noise in an image, are the same every time: images are recognisable after 40 thousand, not 80 thousand.

    python assets/train_emoji_dit.py autoencoder      # stage 1
    python assets/train_emoji_dit.py decoder          # stage 2: more training of the decoder only, latents unchanged
    python assets/train_emoji_dit.py teacher          # stage 3: a DiT that predicts v
    python assets/train_emoji_dit.py dit              # stage 4: the DiT that predicts noise
    python assets/train_emoji_dit.py save             # assets/emoji-dit

Every stage writes a checkpoint (safetensors) each few minutes and goes on from it; the random state is part of it, so
an interrupted run and an uninterrupted one see the same batches. Needs `npm` and the packages in tests/requirements.txt.
"""

import argparse
import copy
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from emoji_images import STYLES, Images, render
from emoji_training import Checkpoint, Trainer, learning_rate, train
from torch import Tensor

HERE = Path(__file__).parent
NULL_CLASS = 1000  # DiTPipeline hard-codes it
EMA_DECAY = 0.9985
BATCH_SIZE = 32  # of the DiTs
STEPS = {"autoencoder": 2600, "decoder": 4000, "teacher": 3700, "dit": 4800}


# --- data ------------------------------------------------------------------------------------------------------------


def subjects() -> dict[str, str]:
    """Normalised emoji name -> label, in class order."""
    lines = (HERE / "emoji_subjects.txt").read_text().splitlines()
    pairs = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return {name: label for name, label in pairs}


def pixels_as_tensor(images: Images) -> Tensor:
    """(n, 3, 64, 64) uint8."""
    return torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous()


def unseen_by_autoencoder(images: Images) -> Tensor:
    """Every 20th name that is not a subject: (n,) bool. Split by name, since styles repeat subjects."""
    known = subjects()
    held_out = set(sorted(set(images.names.tolist()) - set(known))[::20])
    return torch.tensor([name in held_out for name in images.names.tolist()])


def subject_images(images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices (n,), class (n,), style (n,) and held-out flag (n,) of the images of our subjects.

    Of every fifth subject one style is held out, a different one each time.
    """
    class_of = {name: index for index, name in enumerate(subjects())}
    indices = [i for i, name in enumerate(images.names.tolist()) if name in class_of]
    classes = torch.tensor([class_of[images.names[i]] for i in indices])
    styles = torch.from_numpy(images.styles[indices]).long()
    held_out = (classes % 5 == 0) & (styles == (classes // 5) % len(STYLES))
    return torch.tensor(indices), classes, styles, held_out


# --- stages 1 and 2: the autoencoder ----------------------------------------------------------------------------------


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(24, 32, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def reconstruction_loss(reconstructed: Tensor, image: Tensor) -> Tensor:
    """L1 + L2 + L1 of horizontal and vertical differences, on (b, 3, 64, 64) in [-1, 1]."""
    error = reconstructed.float() - image
    gradients = sum(e.abs().mean() for e in (error.diff(dim=-1), error.diff(dim=-2)))
    return error.abs().mean() + error.square().mean() + gradients


def train_autoencoder(work: Path, seed: int, steps: int, decoder_only: bool) -> None:
    """Train all of it, or (stage 2) the decoder alone against latents that stay as the DiT knows them."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    images = render(work)
    pixels = pixels_as_tensor(images)
    unseen = unseen_by_autoencoder(images)
    seen_indices = torch.nonzero(~unseen).squeeze(1)
    vae = new_autoencoder().train()
    if decoder_only:
        vae.load_state_dict(ema_weights(work / "autoencoder.safetensors"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trainer = Trainer({n: p for n, p in vae.named_parameters() if p.requires_grad}, generator, 0.995)
    checkpoint = Checkpoint(work / ("decoder.safetensors" if decoder_only else "autoencoder.safetensors"))
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    batch_size = 16

    def reconstruct(image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(image).latent_dist.mean
            return vae.decode(mean + 0.05 * noise).sample, mean

    def loss_of_batch() -> Tensor:
        chosen = seen_indices[torch.randint(len(seen_indices), (batch_size,), generator=generator)]
        flip = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
        image = pixels[chosen].float() / 127.5 - 1
        image = torch.where(flip, image.flip(-1), image).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch_size, 4, 16, 16, generator=generator)
        reconstructed, mean = reconstruct(image, noise)
        return reconstruction_loss(reconstructed, image) + 1e-4 * mean.float().square().mean()

    def schedule(step: int) -> float:
        return learning_rate(step, steps, 2e-3, warmup=100, decay_from=0.3)

    for _ in train(trainer, checkpoint, steps, schedule, loss_of_batch, batch_size):
        pass
    vae.load_state_dict(dict(zip(trainer.names, trainer.ema, strict=True)), strict=False)
    print(f"PSNR on {int(unseen.sum())} unseen images: {reconstruction_psnr(vae, pixels[unseen]):.2f} dB")


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over images of 10 log10(2² / MSE), through the mean of the latent distribution, in fp32."""
    vae.eval()
    values = []
    for batch in pixels.split(128):
        image = batch.float() / 127.5 - 1
        error = vae.decode(vae.encode(image).latent_dist.mean).sample.clamp(-1, 1) - image
        values.append(10 * torch.log10(4 / error.square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def ema_weights(path: Path) -> dict[str, Tensor]:
    stored = Checkpoint(path).load()
    if stored is None:
        raise SystemExit(f"{path} does not exist: run the earlier stage first (see --help)")
    return {name.removeprefix("ema/"): tensor for name, tensor in stored[0].items() if name.startswith("ema/")}


@torch.no_grad()
def trained_autoencoder(work: Path, images: Images) -> AutoencoderKL:
    """The autoencoder with latents of mean 0 and variance 1 in each channel.

    The normalisation (z - mean) / std is linear, so it is folded into the two 1x1 convolutions beside the latent.
    """
    vae = new_autoencoder().eval()
    vae.load_state_dict(ema_weights(work / "autoencoder.safetensors"))
    latents = encode(vae, pixels_as_tensor(images)[subject_images(images)[0]])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    if (work / "decoder.safetensors").exists():
        vae.load_state_dict(ema_weights(work / "decoder.safetensors"), strict=False)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)
    vae.quant_conv.weight[:4] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(n, 3, 64, 64) uint8 -> (n, 4, 16, 16)."""
    return torch.cat([vae.encode(batch.float() / 127.5 - 1).latent_dist.mean for batch in pixels.split(128)])


# --- stages 3 and 4: the DiT ------------------------------------------------------------------------------------------


def new_dit() -> DiTTransformer2DModel:
    """8 blocks of width 256 with adaLN-zero; the timestep and class embedder is one module shared by all blocks."""
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    embedder = dit.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.5)
    for block in dit.transformer_blocks:
        block.norm1.emb = embedder
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return dit


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
    )


@functools.cache
def alphas_cumprod() -> Tensor:
    """ᾱ of every timestep."""
    return new_scheduler().alphas_cumprod


def training_latents(work: Path) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 16, 16) and classes (n,) of all subject images but those held out."""
    images = render(work)
    indices, classes, _, held_out = subject_images(images)
    latents = encode(trained_autoencoder(work, images), pixels_as_tensor(images)[indices[~held_out]])
    print(f"{len(latents)} images of {int(classes.max()) + 1} subjects, {int(held_out.sum())} pairs held out", flush=True)
    return latents, classes[~held_out]


def train_dit(dit: DiTTransformer2DModel, checkpoint: Checkpoint, generator: torch.Generator, schedule, stop_at: int, loss):
    """Train to step `stop_at` with learning rates `schedule(step)`; `loss(dit)` draws a batch. A text file keeps the losses."""
    dit.to(torch.bfloat16).train()
    dit.transformer_blocks[0].norm1.emb.class_embedder.eval()  # labels are dropped by `batch`, from our own generator
    trainer = Trainer({n: p for n, p in dit.named_parameters() if p.requires_grad}, generator, EMA_DECAY)
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    compiled = torch.compile(dit)

    with open(checkpoint.path.with_suffix(".txt"), "a") as file:
        for value in train(trainer, checkpoint, stop_at, schedule, lambda: loss(compiled), BATCH_SIZE):
            print(f"{trainer.step} {value:.6f}", file=file)


class Batch(NamedTuple):
    """x_t = sqrt(ᾱ) x₀ + sqrt(1-ᾱ) ε for `BATCH_SIZE` images; y is the null class now and then, for guidance."""

    noisy: Tensor  # x_t, bf16
    clean: Tensor  # x₀
    noise: Tensor  # ε
    alpha: Tensor  # ᾱ, (b, 1, 1, 1)
    timesteps: Tensor
    labels: Tensor


def batch(latents: Tensor, classes: Tensor, drop: float, timesteps_power: float, generator: torch.Generator) -> Batch:
    """Random images and noise; timesteps are 1000 u^`timesteps_power` with u uniform, labels are dropped at the rate `drop`."""
    chosen = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
    clean, labels = latents[chosen], classes[chosen].clone()
    labels[torch.rand(BATCH_SIZE, generator=generator) < drop] = NULL_CLASS
    timesteps = (1000 * torch.rand(BATCH_SIZE, generator=generator) ** timesteps_power).long()
    noise = torch.randn(clean.shape, generator=generator)
    alpha = alphas_cumprod()[timesteps].view(-1, 1, 1, 1)
    noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(torch.bfloat16)
    return Batch(noisy, clean, noise, alpha, timesteps, labels)


def train_teacher(work: Path, seed: int, steps: int, stop_at: int) -> None:
    """Minimise E || v - DiT(x_t, t, y) ||² with v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x₀ (Salimans & Ho 2022)."""
    generator = torch.Generator().manual_seed(seed)
    latents, classes = training_latents(work)

    def schedule(step: int) -> float:
        return learning_rate(step, steps, 1e-3, warmup=200, decay_from=0.7)

    def loss(dit) -> Tensor:
        b = batch(latents, classes, 0.1, 1.25, generator)
        predicted = dit(b.noisy, timestep=b.timesteps, class_labels=b.labels).sample.float()
        return F.mse_loss(predicted, b.alpha.sqrt() * b.noise - (1 - b.alpha).sqrt() * b.clean)

    torch.manual_seed(seed)  # initial weights
    train_dit(new_dit(), Checkpoint(work / "teacher.safetensors"), generator, schedule, stop_at, loss)


def train_student(work: Path, seed: int, steps: int, stop_at: int) -> None:
    """Minimise E w || ε(teacher) - DiT(x_t, t, y) ||² with ε(teacher) = sqrt(ᾱ) v + sqrt(1-ᾱ) x_t.

    A step of the sampler moves the image by the error of ε times about 1 / sqrt(ᾱ), so w = 1 / ᾱ, up to 5. All weights start
    anew but those of the embedder, which are the teacher's.
    """
    generator = torch.Generator().manual_seed(seed)
    latents, classes = training_latents(work)
    teacher = new_dit()
    teacher.load_state_dict(ema_weights(work / "teacher.safetensors"), strict=False)
    torch.manual_seed(seed)  # initial weights
    student = new_dit()
    student.transformer_blocks[0].norm1.emb.load_state_dict(teacher.transformer_blocks[0].norm1.emb.state_dict())
    compiled_teacher = torch.compile(teacher.to(torch.bfloat16).eval().requires_grad_(False))

    def schedule(step: int) -> float:
        """Two cycles: after the first, images were recognisable but not clean."""
        first = steps * 13 // 24
        if step < first:
            return learning_rate(step, first, 1e-3, warmup=200, decay_from=0.6)
        return learning_rate(step - first, steps - first, 8e-4, warmup=100, decay_from=0.4)

    def loss(dit) -> Tensor:
        b = batch(latents, classes, 0.2, 1.0, generator)
        with torch.no_grad():
            v = compiled_teacher(b.noisy, timestep=b.timesteps, class_labels=b.labels).sample.float()
            wanted = b.alpha.sqrt() * v + (1 - b.alpha).sqrt() * b.noisy.float()
        predicted = dit(b.noisy, timestep=b.timesteps, class_labels=b.labels).sample.float()
        return ((1 / b.alpha).clamp(max=5) * (predicted - wanted).square()).mean()

    train_dit(student, Checkpoint(work / "dit.safetensors"), generator, schedule, stop_at, loss)


# --- stage 5: save ---------------------------------------------------------------------------------------------------


def pipeline(work: Path) -> DiTPipeline:
    """Both networks with their EMA weights, fp32, and the labels."""
    dit = new_dit().eval()
    dit.load_state_dict(ema_weights(work / "dit.safetensors"), strict=False)  # the shared embedder is stored once
    labels = {index: label for index, label in enumerate(subjects().values())}
    return DiTPipeline(dit, trained_autoencoder(work, render(work)), new_scheduler(), id2label=labels)


def save(work: Path, folder: Path) -> None:
    """fp16, shards under 9 MB. Every block gets its own copy of the embedder, as diffusers' loader expects."""
    pipe = pipeline(work).to(torch.float16)
    first, *others = pipe.transformer.transformer_blocks
    for block in others:
        block.norm1.emb = copy.deepcopy(first.norm1.emb)
    pipe.register_to_config(id2label={str(index): label for label, index in pipe.labels.items()})
    pipe.save_pretrained(folder, max_shard_size="9MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STEPS, "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, images, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help=f"length of the schedule ({STEPS})")
    parser.add_argument("--stop-at", type=int, default=None, help="teacher and dit: stop at this step of the schedule")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "save":
        save(args.work, HERE / "emoji-dit")
        return
    steps = args.steps or STEPS[args.stage]
    if args.stage in ("teacher", "dit"):
        run = train_teacher if args.stage == "teacher" else train_student
        run(args.work, args.seed, steps, min(steps, args.stop_at or steps))
    else:
        train_autoencoder(args.work, args.seed, steps, args.stage == "decoder")


if __name__ == "__main__":
    main()
