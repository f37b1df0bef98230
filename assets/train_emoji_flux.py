"""Make the text-to-image model `assets/emoji-flux/`: a `FluxPipeline` that draws emoji from words, trained from nothing.

FLUX is the modern kind of DiT. Text and image tokens pass through double blocks, each stream with weights of its own, then
as one sequence through single blocks; positions are rotations; a T5 encoder gives a token for each word and a CLIP encoder
one vector for the whole prompt. It predicts the velocity of a straight line from image to noise (flow matching).
Here everything is small, and both text encoders learn together with the transformer, from prompts of `emoji_prompts.py`.
Images are latents of the autoencoder of `assets/emoji-dit`, 16 x 16 x 4, as 64 tokens of 2 x 2 x 4.

    python assets/train_emoji_flux.py train           # hours; may be stopped at any moment and goes on from its checkpoint
    python assets/train_emoji_flux.py sheet           # look at it: work/flux.png, with today's average weights
    python assets/train_emoji_flux.py save            # assets/emoji-flux once all steps are done, else -unfinished

On a machine without a checkpoint, `train` goes on from the weights in `assets/emoji-flux-unfinished/`, a whole pipeline in
fp16 with a count of steps: only the optimiser's moments start anew. Needs `npm` and the packages in tests/requirements.txt.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_flow import mean_velocity, noise_levels
from emoji_images import STYLE_NAMES, render
from emoji_prompts import (
    STYLE_WORDS,
    T5_LENGTH,
    clip_tokenizer,
    held_out_pairs,
    phrases,
    random_prompt,
    subject_words,
    t5_tokenizer,
)
from emoji_training import Checkpoint, Trainer, learning_rate, train
from PIL import Image
from torch import Tensor, nn
from train_emoji_dit import encode, pixels_as_tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

HERE = Path(__file__).parent
UNFINISHED = HERE / "emoji-flux-unfinished"
WIDTH, TEXT_WIDTH = 224, 128
BATCH_SIZE, STEPS, PEAK, WARMUP, EMA_DECAY = 32, 8_000, 1e-3, 100, 0.9985
DROPPED = 0.1  # share of prompts replaced by "", so that there is something to guide away from
STYLED = 0.75  # share of the other prompts that name a style
FAMILIAR = 159  # the subjects of emoji-dit are drawn twice as often as the others
TRAINED = ("transformer", "text_encoder", "text_encoder_2")
CALL = {"height": 64, "width": 64, "max_sequence_length": T5_LENGTH, "true_cfg_scale": 3.0}

UNFINISHED_CARD = """# emoji-flux, unfinished

A text-to-image model in the middle of its training: {step} of {steps} steps; loss {loss:.3f}, mean of the last {count}. It is
here so that the training can go on anywhere: `python assets/train_emoji_flux.py train`. Nothing should be measured on it.

Images: those of `assets/emoji-dit`, whose card names their licences. Words: npm `emojilib` 4.0.3, MIT, (c) 2014 Mu-An Chiou.
"""


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
    """3 double and 4 single blocks of width 224: 8.5 M weights; modulation and output start at zero."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
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

    def __init__(self, pipeline: FluxPipeline, work: Path, generator: torch.Generator):
        self.pipeline, self.generator = pipeline, generator
        self.latents, self.subjects, self.styles = training_latents(work)
        self.words = list(subject_words().values())
        self.weights = torch.where(self.subjects < FAMILIAR, 2.0, 1.0)
        self.image_positions = pipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)

    def prompt(self, image: int, draw: random.Random) -> tuple[str, Tensor]:
        """A prompt for this image, and which images (n,) it may mean."""
        if draw.random() < DROPPED:
            return "", torch.ones_like(self.weights, dtype=torch.bool)
        style = STYLE_NAMES[int(self.styles[image])] if draw.random() < STYLED else None
        meant = self.subjects == self.subjects[image]
        if style is not None:
            meant = torch.arange(len(self.weights)) == image
        return random_prompt(self.words[int(self.subjects[image])], style, draw), meant

    def __call__(self) -> Tensor:
        chosen = torch.multinomial(self.weights, BATCH_SIZE, replacement=True, generator=self.generator)
        draw = random.Random(int(torch.randint(2**31, (1,), generator=self.generator)))
        prompts, meant = zip(*(self.prompt(image, draw) for image in chosen.tolist()), strict=True)
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=self.generator)
        sigma = noise_levels(BATCH_SIZE, self.generator)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
        words, whole, text_positions = self.pipeline.encode_prompt(list(prompts), max_sequence_length=T5_LENGTH)
        predicted = self.pipeline.transformer(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=whole,
            encoder_hidden_states=words,
            txt_ids=text_positions,
            img_ids=self.image_positions,
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, mean_velocity(noisy, sigma, self.latents, self.weights, torch.stack(meant)))


def start(work: Path, seed: int) -> tuple[FluxPipeline, Trainer, int]:
    """The pipeline, its trainer as far as it had come, and the step at which the optimiser started."""
    pipeline = new_pipeline(seed)
    parameters, first = trained_parameters(pipeline), 0
    stored = Checkpoint(work / "flux.safetensors").load()
    if stored is None and (UNFINISHED / "training.json").exists():
        first = json.loads((UNFINISHED / "training.json").read_text())["step"]
        known = trained_parameters(FluxPipeline.from_pretrained(UNFINISHED, dtype=torch.float32))
        for name, parameter in parameters.items():
            parameter.data.copy_(known[name])
    trainer = Trainer(parameters, torch.Generator().manual_seed(seed + first), EMA_DECAY)
    trainer.step = first
    if stored is not None:
        trainer.restore(stored[0], int(stored[1]["step"]))
        first = int(stored[1]["first"])
    return pipeline, trainer, first


def train_flux(work: Path, seed: int, stop_at: int) -> None:
    pipeline, trainer, first = start(work, seed)
    lesson = Lesson(pipeline, work, trainer.generator)

    def schedule(step: int) -> float:
        """A plateau, then a linear decay; whenever the optimiser starts anew, a warm-up."""
        return learning_rate(step, STEPS, PEAK, warmup=1, decay_from=0.55) * min(1.0, (step - first + 1) / WARMUP)

    checkpoint = Checkpoint(work / "flux.safetensors")
    with open(work / "flux.txt", "a") as file:
        for value in train(trainer, checkpoint, stop_at, schedule, lesson, BATCH_SIZE, first=first):
            print(f"{trainer.step} {value:.6f}", file=file, flush=True)


# --- results ---------------------------------------------------------------------------------------------------------


def average_pipeline(work: Path, seed: int) -> tuple[FluxPipeline, int]:
    """The pipeline with its EMA weights, fp32, and the number of steps it has learned."""
    pipeline, trainer, _ = start(work, seed)
    with torch.no_grad():
        torch._foreach_copy_(trainer.live, trainer.ema)
    for part in TRAINED:
        getattr(pipeline, part).eval()
    return pipeline, trainer.step


def sheet(work: Path, seed: int, columns: int = 10, rows: int = 4) -> None:
    """Subjects spread evenly, one style after the other, every image from the noise of the seed; nothing picked."""
    pipeline, step = average_pipeline(work, seed)
    words, count = list(subject_words().values()), columns * rows
    styles = [STYLE_WORDS[style][0] for style in STYLE_NAMES]
    prompts = [f"{words[i * len(words) // count][0]}, {styles[i % len(styles)]}" for i in range(count)]
    noises = [torch.Generator().manual_seed(seed) for _ in prompts]
    nothing = [""] * count
    images = pipeline(prompts, negative_prompt=nothing, generator=noises, num_inference_steps=25, **CALL).images
    canvas = Image.new("RGB", (64 * columns, 64 * rows), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (64 * (i % columns), 64 * (i // columns)))
    canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.LANCZOS).save(work / "flux.png")
    print(f"step {step}: {work / 'flux.png'}")
    for row in range(rows):
        print(" | ".join(prompts[row * columns : (row + 1) * columns]))


def save(work: Path, seed: int) -> None:
    """fp16, shards under 9 MB. transformers loads weights as they are stored and diffusers in fp32: text encoders stay fp32."""
    pipeline, step = average_pipeline(work, seed)
    folder = UNFINISHED if step < STEPS else HERE / "emoji-flux"
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder, max_shard_size="8MB")
    if step < STEPS:
        (folder / "training.json").write_text(json.dumps({"step": step}) + "\n")
        losses = [float(line.split()[1]) for line in (work / "flux.txt").read_text().splitlines()[-500:]]
        card = UNFINISHED_CARD.format(step=step, steps=STEPS, count=len(losses), loss=sum(losses) / len(losses))
        (folder / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "sheet", "save"])
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages, images, checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=STEPS, help="train: stop at this step of the schedule")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "train":
        train_flux(args.work, args.seed, min(STEPS, args.stop_at))
    elif args.stage == "sheet":
        sheet(args.work, args.seed)
    else:
        save(args.work, args.seed)


if __name__ == "__main__":
    main()
