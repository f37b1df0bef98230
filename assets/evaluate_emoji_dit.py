"""Measure the bundled model: every figure and picture of its model card, by one command.

What each figure asks is told in `emoji_evaluation.py`; here one more: what does the latent lose? PSNR of the autoencoder on
names it never saw, beside that of a blank white image.

    python assets/evaluate_emoji_dit.py      # assets/emoji-dit/{evaluation.json, samples.png, nearest.png}

Needs `npm` (unless the images are already in --work) and the packages in tests/requirements.txt.
"""

import argparse
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import DiTPipeline
from emoji_evaluation import (
    BATCH_SIZE,
    SHEET_IMAGES,
    Figures,
    accuracy,
    cpu_name,
    distance_figures,
    kid_figures,
    nearest_sheet,
    sheet,
    through_autoencoder,
    train_classifier,
)
from emoji_images import STYLE_NAMES, render
from torch import Tensor
from train_emoji_dit import pixels_as_tensor, reconstruction_psnr, subject_images, subjects, unseen_by_autoencoder

HERE = Path(__file__).parent
NUM_INFERENCE_STEPS = 25


# --- generated images ------------------------------------------------------------------------------------------------


def load_pipeline(folder: Path) -> DiTPipeline:
    """The model in fp32, after checking that its classes are our subjects in our order."""
    if not (folder / "model_index.json").exists():
        raise SystemExit(f"{folder} holds no model: run `train_emoji_dit.py save` first")
    pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.labels != {label: index for index, label in enumerate(subjects().values())}:
        raise SystemExit(f"the labels of {folder} are not those of emoji_subjects.txt: run `train_emoji_dit.py save` again")
    return pipeline


def spread_classes(num_images: int) -> list[int]:
    """Image i shows subject floor(i * num_subjects / num_images): all equally often, or evenly spaced if there are fewer."""
    return [i * len(subjects()) // num_images for i in range(num_images)]


def generate(pipeline: DiTPipeline, classes: list[int], first_seed: int, guidance: float) -> Tensor:
    """(n, 3, 64, 64) uint8; image i starts from the noise of seed first_seed + i, whatever else is in its batch."""
    batches: list[Tensor] = []
    started = time.perf_counter()
    for start in range(0, len(classes), BATCH_SIZE):
        part = classes[start : start + BATCH_SIZE]
        noises = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        images = pipeline(part, guidance, noises, NUM_INFERENCE_STEPS, output_type="pt").images
        batches.append((255 * images).round().to(torch.uint8))
        done = start + len(part)
        print(f"generated {done}/{len(classes)}  {(time.perf_counter() - started) / done:.2f} s per image", flush=True)
    return torch.cat(batches)


def seconds_per_image(pipeline: DiTPipeline, seed: int, guidance: float) -> float:
    """Median of five images made one at a time; assumes that the pipeline is warm."""
    seconds = []
    for i in range(5):
        started = time.perf_counter()
        pipeline([i], guidance, torch.Generator().manual_seed(seed + i), NUM_INFERENCE_STEPS, output_type="pt")
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def autoencoder_figures(pipeline: DiTPipeline, unseen: Tensor) -> Figures:
    white_mse = (1 - unseen / 255).square().mean((1, 2, 3)).clamp(min=1e-6)
    return {
        "psnr_db": reconstruction_psnr(pipeline.vae, unseen),
        "psnr_db_of_a_white_image": -10 * white_mse.log10().mean().item(),
        "num_images": len(unseen),
    }


# --- all of it -------------------------------------------------------------------------------------------------------


def circumstances(args: argparse.Namespace) -> Figures:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "num_threads": torch.get_num_threads(),
        "seed": args.seed,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": args.guidance,
        "num_subjects": len(subjects()),
        "num_generated_images": args.images,
    }


def evaluate(args: argparse.Namespace) -> Figures:
    """Measure, write the two pictures to args.output and return the figures."""
    pipeline = load_pipeline(args.model)
    images = render(args.work)
    indices, classes, styles, held_out = subject_images(images)
    labels = list(subjects().values())
    everything = pixels_as_tensor(images)
    real, unseen = everything[indices], everything[unseen_by_autoencoder(images)]
    training, training_classes = real[~held_out], classes[~held_out]
    pairs = zip(training_classes.tolist(), styles[~held_out].tolist(), strict=True)
    names = [f"{labels[c]}, {STYLE_NAMES[s]}" for c, s in pairs]

    shown_classes = spread_classes(SHEET_IMAGES)
    shown = generate(pipeline, shown_classes, args.seed, args.guidance)
    shown_labels = [labels[c] for c in shown_classes]
    sheet(shown, shown_labels).save(args.output / "samples.png", optimize=True)
    nearest_sheet(shown[::4], shown_labels[::4], training, names).save(args.output / "nearest.png", optimize=True)
    seconds = seconds_per_image(pipeline, args.seed, args.guidance)

    classifier = train_classifier(training, training_classes, len(labels), args.classifier_steps, args.seed)
    wanted = spread_classes(args.images)
    generated = generate(pipeline, wanted, args.seed + SHEET_IMAGES, args.guidance)  # none of the sheet again
    decoded = through_autoencoder(pipeline.vae, real)
    return {
        **circumstances(args),
        "seconds_per_image": seconds,
        "autoencoder": autoencoder_figures(pipeline, unseen),
        "classifier": {
            "num_steps": args.classifier_steps,
            "num_parameters": sum(p.numel() for p in classifier.parameters()),
            "chance": 1 / len(labels),
            "generated": accuracy(classifier, generated, torch.tensor(wanted)),
            "held_out_pairs": accuracy(classifier, real[held_out], classes[held_out]),
            "held_out_pairs_through_autoencoder": accuracy(classifier, decoded[held_out], classes[held_out]),
            "its_own_training_images": accuracy(classifier, training, training_classes),
        },
        "kid": kid_figures(real, decoded, generated, args.seed),
        "rmse_to_nearest_training_image": {
            "generated": distance_figures(generated, training),
            "held_out_pairs": distance_figures(real[held_out], training),
            "training_through_autoencoder": distance_figures(decoded[~held_out], training),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "emoji-dit", help="folder of the DiTPipeline")
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages and rendered images")
    parser.add_argument("--images", type=int, default=2000, help="how many to generate for the classifier, KID and distances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of classifier-free guidance")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=HERE / "emoji-dit", help="folder for the figures and pictures")
    args = parser.parse_args()
    if args.images < 2:
        parser.error(f"--images {args.images}: KID needs at least two")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    report = json.dumps(evaluate(args), indent=2, ensure_ascii=False)
    (args.output / "evaluation.json").write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
