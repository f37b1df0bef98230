"""Measure the bundled text-to-image model: every figure and picture of its model card, by one command.

What each figure asks is told in `emoji_evaluation.py`. The classifier knows the real images of the subjects; beside all
prompts "subject, style" stand the held-out ones, pairs of a subject and a style that the model never saw together.

    python assets/evaluate_emoji_flux.py      # assets/emoji-flux/{evaluation.json, samples.png, nearest.png}

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
from diffusers import FluxPipeline
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
from emoji_images import STYLE_NAMES, Images, render
from emoji_prompts import STYLE_WORDS, T5_LENGTH, held_out_pairs, subject_words
from torch import Tensor
from train_emoji_dit import pixels_as_tensor

HERE = Path(__file__).parent
NUM_INFERENCE_STEPS, GUIDANCE = 25, 3.0
CALL = {"height": 64, "width": 64, "max_sequence_length": T5_LENGTH, "num_inference_steps": NUM_INFERENCE_STEPS}


def prompt(subject: int, style: int) -> str:
    """The usual word of the subject, and the first word of the style."""
    return f"{list(subject_words().values())[subject][0]}, {STYLE_WORDS[STYLE_NAMES[style]][0]}"


def spread(count: int) -> list[tuple[int, int]]:
    """(subject, style) of image i: subjects evenly, all equally often or evenly spaced; one style after the other."""
    subjects, styles = len(subject_words()), len(STYLE_NAMES)
    return [(i * subjects // count, i % styles) for i in range(count)]


def generate(pipeline: FluxPipeline, prompts: list[str], first_seed: int) -> Tensor:
    """(n, 3, 64, 64) uint8; image i starts from the noise of seed first_seed + i, whatever else is in its batch."""
    batches = []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        noises = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        guidance = {"negative_prompt": [""] * len(part), "true_cfg_scale": GUIDANCE}
        images = pipeline(part, generator=noises, output_type="pt", **guidance, **CALL).images
        batches.append((255 * images.cpu()).round().to(torch.uint8))
        print(f"generated {start + len(part)}/{len(prompts)}", flush=True)
    return torch.cat(batches)


def seconds_per_image(pipeline: FluxPipeline, seed: int) -> float:
    """Median of five images made one at a time; assumes that the pipeline is warm."""
    seconds = []
    for i in range(5):
        started = time.perf_counter()
        generate(pipeline, [prompt(i, 0)], seed + i)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def subject_images(images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, subjects (n,), styles (n,) of all images with a subject, and which (n,) are held out."""
    number = {name: index for index, name in enumerate(subject_words())}
    subjects = torch.tensor([number.get(name, -1) for name in images.names.tolist()])
    known, styles = subjects >= 0, torch.from_numpy(images.styles).long()
    held_out = torch.from_numpy(held_out_pairs(subjects[known].numpy(), styles[known].numpy()))
    return pixels_as_tensor(images)[known], subjects[known], styles[known], held_out


def evaluate(args: argparse.Namespace) -> Figures:
    """Measure, write the two pictures to args.output and return the figures."""
    pipeline = FluxPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    real, subjects, styles, held_out = subject_images(render(args.work))
    pairs = list(zip(subjects.tolist(), styles.tolist(), strict=True))
    training, names = real[~held_out], [prompt(*pair) for pair, out in zip(pairs, held_out.tolist(), strict=True) if not out]

    shown_prompts = [prompt(*pair) for pair in spread(SHEET_IMAGES)]
    shown = generate(pipeline, shown_prompts, args.seed)
    sheet(shown, [text.replace(", ", ",\n") for text in shown_prompts]).save(args.output / "samples.png", optimize=True)
    nearest_sheet(shown[::4], shown_prompts[::4], training, names).save(args.output / "nearest.png", optimize=True)
    seconds = seconds_per_image(pipeline, args.seed)

    wanted, first = spread(args.images), args.seed + SHEET_IMAGES  # none of the sheet again
    generated = generate(pipeline, [prompt(*pair) for pair in wanted], first)
    never_seen = generate(pipeline, [prompt(*pair) for pair, out in zip(pairs, held_out.tolist(), strict=True) if out], first)
    decoded = through_autoencoder(pipeline.vae.cpu(), real)
    num_subjects = len(subject_words())
    classifier = train_classifier(training, subjects[~held_out], num_subjects, args.classifier_steps, args.seed)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "seed": args.seed,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE,
        "num_subjects": num_subjects,
        "num_training_images": len(training),
        "seconds_per_image": seconds,
        "classifier": {
            "num_steps": args.classifier_steps,
            "chance": 1 / num_subjects,
            "generated": accuracy(classifier, generated, torch.tensor([subject for subject, _ in wanted])),
            "generated_held_out_pairs": accuracy(classifier, never_seen, subjects[held_out]),
            "real_held_out_pairs": accuracy(classifier, real[held_out], subjects[held_out]),
            "real_held_out_pairs_through_autoencoder": accuracy(classifier, decoded[held_out], subjects[held_out]),
            "its_own_training_images": accuracy(classifier, training, subjects[~held_out]),
        },
        "kid": kid_figures(real, decoded, generated, args.seed),
        "rmse_to_nearest_training_image": {
            "generated": distance_figures(generated, training),
            "generated_held_out_pairs": distance_figures(never_seen, training),
            "real_held_out_pairs": distance_figures(real[held_out], training),
            "training_through_autoencoder": distance_figures(decoded[~held_out], training),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "emoji-flux", help="folder of the FluxPipeline")
    parser.add_argument("--work", type=Path, default=HERE / "emoji-work", help="packages and rendered images")
    parser.add_argument("--images", type=int, default=2000, help="how many to generate for the classifier, KID and distances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-steps", type=int, default=3000)
    parser.add_argument("--device", default="cpu", help="where images are generated: cpu or cuda")
    parser.add_argument("--output", type=Path, default=HERE / "emoji-flux", help="folder for the figures and pictures")
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
