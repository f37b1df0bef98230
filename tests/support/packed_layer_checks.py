"""What holds for packed layers of both kinds."""

import subprocess
import sys
from pathlib import Path

import torch

from vq4dit.layers.packed import PackedLinear


def check_decoding_changes_no_bit(layer: PackedLinear, x: torch.Tensor) -> None:
    """`layer`, whose bias is of the type of `x`, answers the same packed, decoded, and packed again."""
    packed = layer(x)
    layer.decode(x.dtype)
    assert layer.decoded_weight.dtype == x.dtype
    assert torch.equal(layer(x), packed)
    layer.drop_decoded()
    assert layer.decoded_weight is None
    assert torch.equal(layer(x), packed)


def check_compiled_equals_eager(folder: Path) -> None:
    """The transformer in `folder`, in both modes, and a part of a block without a graph break, exported too.

    In a process of its own: the compiler cannot look through the type checks of the test run. What is looked at is how torch
    reads our layers (dynamo, AOTAutograd), not the C++ that it makes of them: that takes minutes, and now and then a library
    that does not load.
    """
    program = f"""
import torch, vq4dit
from diffusers import DiTTransformer2DModel
model = DiTTransformer2DModel.from_pretrained({str(folder)!r}, subfolder="transformer").eval()
latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
inputs = dict(timestep=torch.tensor([5, 5]), class_labels=torch.tensor([0, 1000]))
block = model.transformer_blocks[0].ff
for mode in ("load", "forward"):
    vq4dit.set_decode_mode(model, mode)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = block(torch.ones(1, 2, 64))
        exported = torch.export.export(block, (torch.ones(1, 2, 64),)).module()
        for whole in (torch.compile(block, fullgraph=True, backend="aot_eager"), exported):
            torch.testing.assert_close(whole(torch.ones(1, 2, 64)), wanted, rtol=1e-4, atol=1e-5)
        eager = model(latents, **inputs).sample
        compiled = torch.compile(model, backend="aot_eager")(latents, **inputs).sample
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    print(mode, "ok")
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert finished.stdout.split() == ["load", "ok", "forward", "ok"], finished.stderr
