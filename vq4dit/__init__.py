"""vq4dit: shrink a Diffusion Transformer to 2-4 bits per weight with vector quantization (VQ4DiT, arXiv:2408.17131).

Importing it teaches diffusers to load packed models: `DiTPipeline.from_pretrained(folder)` then just works.
"""

import sys
import warnings

if sys.argv[:1] == ["-m"]:  # `python -m vq4dit`: the imports below take seconds in which Ctrl-C finds nothing to keep
    from vq4dit.interrupts import leave_at_once

    leave_at_once()

with warnings.catch_warnings():  # what torch says of somebody else's package, where that is installed
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
    import torch  # noqa: F401

from vq4dit.config import CalibrationConfig, EntropyCodingConfig, QuantizationSettings, VQ4DiTConfig
from vq4dit.disk.job import Job
from vq4dit.errors import (
    CalibrationDivergedError,
    FormatError,
    HubError,
    JobError,
    UnsupportedModelError,
    VQ4DiTError,
)
from vq4dit.layers.vector import VQLinear
from vq4dit.pipelines.decode_modes import decode_mode, set_decode_mode
from vq4dit.pipelines.quantizer import dequantize, register
from vq4dit.pipelines.save import save
from vq4dit.progress import Progress
from vq4dit.recipes.quantize import quantize, run
from vq4dit.version import VERSION as __version__  # noqa: F401

__all__ = [
    "CalibrationConfig",
    "CalibrationDivergedError",
    "EntropyCodingConfig",
    "FormatError",
    "HubError",
    "Job",
    "JobError",
    "Progress",
    "QuantizationSettings",
    "UnsupportedModelError",
    "VQ4DiTConfig",
    "VQ4DiTError",
    "VQLinear",
    "decode_mode",
    "dequantize",
    "quantize",
    "register",
    "run",
    "save",
    "set_decode_mode",
]

register()
