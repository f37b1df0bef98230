"""What the recipes make of the tiny pipeline, as checksums: a program of its own, since it asks for slow, equal arithmetic.

Two processors of different kinds round sums differently, and a recipe that compares sums then takes another codeword. Told to
use no more than every x86-64 has (`PLAIN`), torch, MKL and oneDNN make the same bytes wherever they have the same version.

    python tests/support/golden_recipes.py    # prints them as JSON
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
TESTS = Path(__file__).parents[1]


def checksums() -> dict[str, str]:
    """Of all tensors in the file of each recipe: names, types, shapes and bytes."""
    import torch
    from tiny import new_pipeline, quick_settings

    import vq4dit

    found = {}
    for recipe, bits in (("kmeans", 2), ("kmeans", 4), ("paper", 2), ("best", 2), ("best", 3)):
        settings = quick_settings(recipe=recipe, bits=bits, seed=1)
        packed = vq4dit.quantize(new_pipeline(), settings).transformer.state_dict()
        digest = hashlib.sha256()
        for name, tensor in sorted(packed.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[f"{recipe} {bits}"] = digest.hexdigest()
    return found


def plain_checksums() -> dict[str, str]:
    """`checksums` by the arithmetic that all x86-64 processors share."""
    done = subprocess.run([sys.executable, __file__], env=os.environ | PLAIN, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(checksums()))
