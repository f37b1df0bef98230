"""Make the bundled model `assets/emoji-dit/` from nothing: fetch, render, train two networks, save a `DiTPipeline`.

A latent diffusion transformer is two networks. An autoencoder squeezes 64 x 64 RGB into a 16 x 16 x 4 latent; the DiT
learns to remove noise from latents, given a class. Both are plain diffusers models and nothing of vq4dit is used here.

What made a small DiT learn on two cores: class = subject, batches of 32, lr 1e-3 with a decay at the end, a class
embedding that starts large (std 0.5), latents normalised per channel, v-prediction (at high noise its loss *is* the class,
where noise-prediction barely sees it), timesteps drawn a little more often where images take shape, EMA weights.

    python assets/train_emoji_dit.py autoencoder      # stage 1
    python assets/train_emoji_dit.py dit              # stage 2; the long one
    python assets/train_emoji_dit.py decoder          # stage 3: more training of the decoder only, latents unchanged
    python assets/train_emoji_dit.py save             # assets/emoji-dit

Every stage writes a checkpoint (safetensors) each few minutes and goes on from it; the random state is part of it, so
an interrupted run and an uninterrupted one see the same batches. Needs `npm` and the packages in tests/requirements.txt.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from emoji_images import STYLES, Images, render
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
NULL_CLASS = 1000  # DiTPipeline hard-codes it
EMA_DECAY = 0.9985
CHECKPOINT_SECONDS = 180


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


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """Named tensors plus a few numbers, in one safetensors file, replaced atomically."""

    path: Path

    def save(self, tensors: dict[str, Tensor], **numbers: float) -> None:
        temporary = self.path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"numbers": json.dumps(numbers)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            return {k: file.get_tensor(k).clone() for k in file.keys()}, json.loads(file.metadata()["numbers"])


class Trainer:
    """AdamW on fp32 masters with an exponential moving average; the model itself may be bf16."""

    def __init__(self, parameters: dict[str, Tensor], generator: torch.Generator, ema_decay: float):
        self.names = list(parameters)
        self.live = list(parameters.values())
        self.master = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.ema = [p.detach().clone() for p in self.master]
        self.optimizer = torch.optim.AdamW(self.master, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.generator, self.ema_decay, self.step = generator, ema_decay, 0
        for p in self.master:  # so that the state exists before a checkpoint is read
            self.optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def update(self, learning_rate: float) -> None:
        """One optimiser step from the gradients of the live parameters, which are then cleared."""
        for p, m in zip(self.live, self.master, strict=True):
            m.grad = torch.empty_like(m).copy_(p.grad)  # the fused optimiser wants one memory layout for all
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.master)
            torch._foreach_lerp_(self.ema, [m.detach() for m in self.master], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        moments = ((n, self.optimizer.state[m]) for n, m in zip(self.names, self.master, strict=True))
        out = {"generator": self.generator.get_state()}
        for (name, state), m, e in zip(moments, self.master, self.ema, strict=True):
            out |= {
                f"master/{name}": m.detach(),
                f"ema/{name}": e,
                f"m/{name}": state["exp_avg"],
                f"v/{name}": state["exp_avg_sq"],
            }
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        for name, live, m, e in zip(self.names, self.live, self.master, self.ema, strict=True):
            m.copy_(tensors[f"master/{name}"])
            e.copy_(tensors[f"ema/{name}"])
            live.copy_(m)
            state = self.optimizer.state[m]
            state["exp_avg"].copy_(tensors[f"m/{name}"])
            state["exp_avg_sq"].copy_(tensors[f"v/{name}"])
            state["step"].fill_(step)
        self.generator.set_state(tensors["generator"])
        self.step = step


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_from: float) -> float:
    """Linear warm-up, a plateau, and a linear decay to 1 % of the peak from the fraction `decay_from` on."""
    tail = max(0.0, (step / steps - decay_from) / (1 - decay_from))
    return peak * min(1.0, (step + 1) / warmup) * (1 - 0.99 * tail)


def train(trainer: Trainer, checkpoint: Checkpoint, steps: int, schedule, loss_of_batch, batch_size: int) -> Iterator[float]:
    """Run to `steps`, yielding each loss; print one progress line every 50 steps; checkpoint now and then."""
    started, first, saved, mean = time.time(), trainer.step, time.time(), None
    while trainer.step < steps:
        loss = loss_of_batch()
        loss.backward()
        trainer.update(schedule(trainer.step))
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        yield loss.item()
        if trainer.step % 50 == 0:
            speed = (trainer.step - first) * batch_size / (time.time() - started)
            left = (steps - trainer.step) * batch_size / speed / 60
            print(f"step {trainer.step}/{steps}  loss {mean:.4f}  {speed:.0f} images/s  {left:.0f} min left", flush=True)
        if time.time() - saved > CHECKPOINT_SECONDS or trainer.step == steps:
            checkpoint.save(trainer.tensors(), step=trainer.step)
            saved = time.time()


# --- stage 1 and 3: the autoencoder ----------------------------------------------------------------------------------


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
    """Train all of it, or (stage 3) the decoder alone against latents that stay as the DiT knows them."""
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


# --- stage 2: the DiT ------------------------------------------------------------------------------------------------


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
        prediction_type="v_prediction",
    )


def train_dit(work: Path, seed: int, steps: int, stop_at: int | None) -> None:
    """Minimise E || v - DiT(x_t, t, y) ||² with v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x₀ (Salimans & Ho 2022); y is dropped at 10 %."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    images = render(work)
    indices, classes, _, held_out = subject_images(images)
    vae = trained_autoencoder(work, images)
    latents = encode(vae, pixels_as_tensor(images)[indices[~held_out]])
    classes = classes[~held_out]
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod
    dit = new_dit().train().to(torch.bfloat16)
    dit.transformer_blocks[0].norm1.emb.class_embedder.eval()  # labels are dropped below, from our own generator
    trainer = Trainer({n: p for n, p in dit.named_parameters() if p.requires_grad}, generator, EMA_DECAY)
    checkpoint = Checkpoint(work / "dit.safetensors")
    if stored := checkpoint.load():
        trainer.restore(stored[0], int(stored[1]["step"]))
    compiled = torch.compile(dit)
    batch_size = 32
    print(f"{len(latents)} images of {int(classes.max()) + 1} subjects, {int(held_out.sum())} pairs held out", flush=True)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        x0, labels = latents[chosen], classes[chosen].clone()
        labels[torch.rand(batch_size, generator=generator) < 0.1] = NULL_CLASS
        timesteps = (1000 * torch.rand(batch_size, generator=generator) ** 1.25).long()
        noise = torch.randn(x0.shape, generator=generator)
        signal = alphas[timesteps].view(-1, 1, 1, 1).sqrt()
        spread = (1 - alphas[timesteps]).view(-1, 1, 1, 1).sqrt()
        noisy = (signal * x0 + spread * noise).to(torch.bfloat16)
        predicted = compiled(noisy, timestep=timesteps, class_labels=labels).sample.float()
        return F.mse_loss(predicted, signal * noise - spread * x0)

    def schedule(step: int) -> float:
        return learning_rate(step, steps, 1e-3, warmup=200, decay_from=0.7)

    curve = work / "dit_loss.txt"
    with open(curve, "a") as file:
        for loss in train(trainer, checkpoint, min(steps, stop_at or steps), schedule, loss_of_batch, batch_size):
            print(f"{trainer.step} {loss:.6f}", file=file)


# --- stage 4: save ---------------------------------------------------------------------------------------------------


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
    parser.add_argument("stage", choices=["autoencoder", "dit", "decoder", "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, images, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=None, help="length of the schedule (autoencoder 3000, dit 40000, decoder 4000)"
    )
    parser.add_argument("--stop-at", type=int, default=None, help="dit only: stop at this step of the schedule")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "save":
        save(args.work, HERE / "emoji-dit")
    elif args.stage == "dit":
        train_dit(args.work, args.seed, args.steps or 40_000, args.stop_at)
    else:
        decoder_only = args.stage == "decoder"
        train_autoencoder(args.work, args.seed, args.steps or (4000 if decoder_only else 3000), decoder_only)


if __name__ == "__main__":
    main()
