"""How fast packed weights are decoded, loaded and run: against each other and the original, in alternation, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/decoding.py [--blocks 3] [--repeats 5]

Layers and a DiT of DiT-XL/2's width, random, of about 2 bits a weight. Times are medians; a ratio is that to the original.
Bars: decoding takes 3 ns a weight and core, loading `best` 1.5 times the original's time, a packed step of two images 1.35
times that of the original in fp32 and bf16, with a quarter of its bytes; decoded 1.02 times.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

HOME = Path(__file__).parents[2]
sys.path[:0] = [str(HOME), str(HOME / "tests" / "support")]

import torch  # noqa: E402
from coded_models import single_stream  # noqa: E402
from diffusers import DiTTransformer2DModel  # noqa: E402

import vq4dit  # noqa: E402
from vq4dit.config import VQ4DiTConfig  # noqa: E402
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear  # noqa: E402
from vq4dit.layers.packed import PackedLinear  # noqa: E402
from vq4dit.layers.vector import VQLinear  # noqa: E402
from vq4dit.models.blocks import find_targets  # noqa: E402
from vq4dit.pipelines.quantizer import attach  # noqa: E402

SHAPES = [(256, 256), (1152, 1152), (6912, 1152), (1152, 4608)]
WIDTH = 1152


def coded(rows: int, columns: int, generator: torch.Generator, bias: bool = False) -> EntropyCodedLinear:
    """Gaussian integers whose size differs by rows and columns as that of real layers does."""
    row, column = (torch.exp2(torch.randn(n, generator=generator) * 0.6) for n in (rows, columns))
    integers = (torch.randn(rows, columns, generator=generator) * 0.8 * row.unsqueeze(1) * column).round().clamp(-1022, 1022)
    scales = [0.02 * torch.ones(n) for n in (rows, columns)]
    return EntropyCodedLinear.from_integers(integers.short(), *scales, torch.zeros(rows) if bias else None)


def vector_quantized(rows: int, columns: int, generator: torch.Generator) -> VQLinear:
    assignments = torch.randint(256, (rows * columns // 4,), generator=generator)
    return VQLinear.from_assignments(torch.randn(256, 4, generator=generator), assignments, (rows, columns))


def seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each, after one run that is not counted; one after the other, again and again."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if repeat:
                found[name].append(time.perf_counter() - begun)
    return {name: median(times) for name, times in found.items()}


def decode_layers(repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    print("| rows x columns | bits a weight | lanes, ns a weight | codebook | single stream | checked, ms |")
    print("|---|---|---|---|---|---|")
    for rows, columns in SHAPES:
        layer = coded(rows, columns, generator)
        layers: dict[str, PackedLinear] = {"lanes": layer, "codebook": vector_quantized(rows, columns, generator)}
        if rows * columns < 2**21:  # the reference, which writes it, takes two microseconds an integer
            layers["stream"] = SingleStreamLinear.from_tensors(single_stream(layer), (rows, columns))
        calls = {name: partial(layer.reconstruct, torch.float32) for name, layer in layers.items()}
        took = seconds(calls | {"check": layer._check_bytes}, repeats)
        ns = {name: f"{1e9 * took[name] / (rows * columns):.2f}" for name in layers}
        bits = f"{layer.bits_per_weight:.2f} | {ns['lanes']} | {ns['codebook']} | {ns.get('stream', '')}"
        print(f"| {rows} x {columns} | {bits} | {1000 * took['check']:.2f} |", flush=True)


def new_model(num_blocks: int) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(num_layers=num_blocks, num_attention_heads=16, attention_head_dim=72, sample_size=32).eval()


def write_models(folder: Path, num_blocks: int) -> int:
    """The original in fp16, and a packed one; returns how many weights the blocks have."""
    model, generator = new_model(num_blocks), torch.Generator().manual_seed(0)
    model.half().save_pretrained(folder / "original")
    model.float()
    targets = find_targets(model, 4, 256)[0]
    for name, linear in targets.items():
        layer = coded(linear.out_features, linear.in_features, generator, bias=linear.bias is not None)
        model.set_submodule(name, layer)
    attach(model, VQ4DiTConfig(format_version=5))
    model.save_pretrained(folder / "packed")
    return sum(linear.weight.numel() for linear in targets.values())


def load(folder: Path, mode: str = "load", dtype: torch.dtype = torch.float16) -> DiTTransformer2DModel:
    with vq4dit.decode_mode(mode):
        return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()


def resident(model: torch.nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


@torch.inference_mode()
def run_models(folder: Path, num_blocks: int, repeats: int) -> None:
    num_weights = write_models(folder, num_blocks)
    print(f"\n{num_weights / 1e6:.0f} M weights; an original of the type of its file is not read before it is used")
    for dtype in (torch.float16, torch.float32):
        took = seconds({name: partial(load, folder / name, dtype=dtype) for name in ("original", "packed")}, repeats)
        ratio = took["packed"] / took["original"]
        print(f"loading in {dtype}, decoded: {took['packed']:.2f} s, {ratio:.1f} of the original's time", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        models = {
            "original": load(folder / "original", dtype=dtype),
            "decoded": load(folder / "packed", "load", dtype),
            "packed": load(folder / "packed", "forward", dtype),
        }
        latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([0, 1])}
        calls = {name: partial(model, latents, **arguments) for name, model in models.items()}
        took, size = seconds(calls, repeats), {name: resident(model) for name, model in models.items()}
        for name in ("decoded", "packed"):
            told = f"{took[name] / took['original']:.2f} of the time, {size[name] / size['original']:.2f} of the bytes"
            print(f"a step of two images in {dtype}, {name}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, seed 0, median of {args.repeats}\n")
    decode_layers(args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        run_models(Path(folder), args.blocks, args.repeats)


if __name__ == "__main__":
    main()
