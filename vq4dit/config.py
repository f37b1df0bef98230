"""The settings: what a file says about itself, and how it is to be made.

`VQ4DiTConfig` travels in `config.json` and holds what loading needs; each layer's k and d are not in it, they follow from
the layer's own tensors. `QuantizationSettings` is what a person chooses, `CalibrationConfig` and `EntropyCodingConfig` the
constants of the recipes `paper` (VQ4DiT, arXiv:2408.17131) and `best` behind it. Where the paper leaves a constant open, the
authors' released value is used and marked so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Literal

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from vq4dit.errors import FormatError

FORMAT_VERSION = 5  # the newest that is read; `layers/schema.py` has the least that a file can have

# bits per weight -> (codewords k, sub-vector length d); bits = log2(k) / d. 2 and 3 are the paper's, 4 is ours.
CODEBOOKS: dict[int, tuple[int, int]] = {2: (256, 4), 3: (64, 2), 4: (256, 2)}

Recipe = Literal["best", "paper", "kmeans"]
CallValue = str | int | float | bool | None  # of an argument of a pipeline's call
OWN_ARGUMENTS = frozenset(
    {
        "prompt",
        "class_labels",
        "num_inference_steps",
        "num_images_per_prompt",
        "num_videos_per_prompt",
        "num_waveforms_per_prompt",
        "generator",
        "output_type",
        "return_dict",
        "self",
    }
)  # of calls, that vq4dit gives itself
RECIPES: tuple[Recipe, ...] = ("best", "paper", "kmeans")


class QuantMethod(StrEnum):
    """diffusers reads `.value` of a quantization method."""

    VQ4DIT = "vq4dit"


@dataclass(kw_only=True)
class VQ4DiTConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model: how to read it, and, for people, how it was made.

    Raises:
        FormatError: if `format_version` is newer than this library.
    """

    format_version: int = 1
    bits: int = 2
    recipe: str = "best"
    seed: int = 0
    dtype: str = "float16"  # of everything that is not quantized
    shared_embedders: list[str] = field(default_factory=list)  # paths in a block; stored for the first block only
    quant_method: str = QuantMethod.VQ4DIT

    def __post_init__(self) -> None:
        self.quant_method = QuantMethod.VQ4DIT

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Check the version before anything else: a newer file may have entries that are not known here."""
        version = config_dict.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise FormatError(f"quantization_config must have a format_version of 1 or more, got {version!r}")
        if version == 2:
            raise FormatError("format version 2 was a draft that is no longer read: quantize the original model again")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"the file has vq4dit format version {version}, this library reads up to {FORMAT_VERSION}: upgrade vq4dit"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := config_dict.keys() - known:
            raise FormatError(f"quantization_config has no entry {sorted(unknown)[0]!r}: upgrade vq4dit")
        _check_types(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "quant_method": QuantMethod.VQ4DIT.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and what a file must say anyway; `to_json_string` asks for it."""
        default = type(self)().to_dict()
        told = {"quant_method", "format_version"}
        return {name: value for name, value in self.to_dict().items() if name in told or value != default[name]}


def _check_types(values: dict[str, Any]) -> None:
    """Raise `FormatError` unless the entries that loading reads are what they must be."""
    shared, dtype = values.get("shared_embedders", []), values.get("dtype", "float16")
    if not isinstance(shared, list) or not all(isinstance(path, str) for path in shared):
        raise FormatError(
            f"quantization_config: shared_embedders must be a list of names, got {shared!r:.60}: download it again"
        )
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise FormatError(f"quantization_config: dtype must name a type of torch, got {dtype!r:.60}: download it again")
    if not isinstance(bits := values.get("bits", 2), int) or not 1 <= bits <= 16:
        raise FormatError(f"quantization_config: bits must be a number of bits per weight, got {bits!r:.60}: download it again")
    if not isinstance(recipe := values.get("recipe", "best"), str):
        raise FormatError(f"quantization_config: recipe must be a name, got {recipe!r:.60}: download it again")
    if not isinstance(seed := values.get("seed", 0), int):
        raise FormatError(f"quantization_config: seed must be a whole number, got {seed!r:.60}: download it again")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Constants of `paper`: zero-data block-wise calibration, section 3 of VQ4DiT."""

    num_candidates: int = 2  # n; the paper's best trade
    ratio_start: Literal["uniform", "distance"] = "distance"  # r ∝ 1/distance (released) or r = 1/n (paper; far worse here)
    steps: int = 800  # updates; one per timestep of a trajectory
    num_trajectories: int = 4  # of random classes, trajectories side by side; guidance doubles the batch (released: 8)
    num_inference_steps: int = 50  # released
    logits_learning_rate: float = 5e-3  # RMSprop, constant (released: 5e-2, a random walk here)
    codebook_learning_rate: float = 1e-4  # released; codebooks and biases
    rmsprop_alpha: float = 0.9  # released
    decided_ratio: float = 0.99  # released: a sub-vector with a larger ratio is frozen
    hardening_start: float = 0.05  # part of the steps after which a schedule freezes more and more sub-vectors ...
    hardening_end: float = 0.7  # ... until all are (ours; released: no schedule, both 1)
    ratio_loss_weight: float = 0.03  # λ_r of eq. 10, with λ_d = 1; open in the paper

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not 1 <= self.num_candidates <= 4:
            raise ValueError(f"num_candidates must be 1 to 4, got {self.num_candidates}")
        if self.ratio_start not in ("uniform", "distance"):
            raise ValueError(f'ratio_start must be "uniform" or "distance", got {self.ratio_start!r}')
        for name in ("steps", "num_trajectories", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.hardening_start <= self.hardening_end <= 1:
            raise ValueError(
                "hardening_start and hardening_end are parts of the steps, 0 <= start <= end <= 1, got "
                f"{self.hardening_start} and {self.hardening_end}"
            )


@dataclass(frozen=True, kw_only=True)
class EntropyCodingConfig:
    """Constants of `best`. Where a large model has one of its own, more would take hours and hardly lower the error."""

    sensitivity_tokens: int = 81920  # of all trajectories that output sensitivities B are measured on
    sensitivity_tokens_of_large: int = 10240  # of B a diagonal is measured, and known sooner
    sensitivity_tokens_together: int = 40960  # of trajectories side by side: their activations fill the memory
    probes: tuple[int, ...] = (1,) * 4 + (2,) * 3 + (4,) * 3  # random v of each step
    tokens: int = 61440  # of the trajectories that Hessians H are measured on: 60 for every input of a layer of 1,024
    tokens_of_large: int = 20480  # the error is about a tenth higher, the trajectories three times shorter
    beam: int = 32  # roundings kept for each row
    beam_of_large: int = 8  # 32 would take twice as long
    rate_weight: float = 0.04  # of the squared step: what a bit costs when a weight is rounded (README.md: what was dropped)
    input_correction: float = 0.5  # α of GPTAQ's corrected weight; 1 fits the few latents too closely
    damping: float = 0.01  # of the mean of H's diagonal, added to it: directions never seen must not cost nothing (as in GPTQ)
    coupling_damping: float = 0.3  # of B's diagonal, added to it: what couples rows is known less well than what each costs

    def __post_init__(self) -> None:
        _check_numbers(self)
        object.__setattr__(self, "probes", tuple(self.probes))
        if not self.probes or not all(isinstance(count, Integral) and count > 0 for count in self.probes):
            raise ValueError(f"probes must be numbers of at least 1, one for each step, got {self.probes!r:.60}")
        for entry in dataclasses.fields(self):
            if entry.type == "int" and getattr(self, entry.name) < 1:
                raise ValueError(f"{entry.name} must be at least 1, got {getattr(self, entry.name)}")
        for name in ("rate_weight", "input_correction", "damping", "coupling_damping"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def of_large(self) -> EntropyCodingConfig:
        """The same for a model with hundreds of millions of weights."""
        return dataclasses.replace(
            self,
            sensitivity_tokens=self.sensitivity_tokens_of_large,
            tokens=self.tokens_of_large,
            beam=self.beam_of_large,
            probes=(1,),
        )


def _check_numbers(settings: Any) -> None:
    """Raise `ValueError` unless numbers are numbers, whole ones where they count something, and none is infinite or NaN."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if entry.type == "int":
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{entry.name} must be a whole number, got {value!r:.60}")
            object.__setattr__(settings, entry.name, int(value))
        elif entry.type == "float":
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{entry.name} must be a finite number, got {value!r:.60}")
            object.__setattr__(settings, entry.name, float(value))


def call_items(call: Any) -> tuple[tuple[str, CallValue], ...]:
    """Arguments of a pipeline's call in the order of their names.

    Raises:
        ValueError: if one is no text, number, truth value or None.
    """
    try:
        items = dict(call)
    except (TypeError, ValueError):
        raise ValueError(f'call must be arguments by name, such as {{"guidance_scale": 4.0}}, got {call!r:.60}') from None
    for name, value in items.items():
        simple = value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
        if not isinstance(name, str) or not name.isidentifier() or not simple:
            raise ValueError(f"call takes names and texts, finite numbers, true, false or none, got {name!r:.60}={value!r:.60}")
        if name in OWN_ARGUMENTS:
            raise ValueError(f"call must leave {name} to vq4dit, which has prompts, seeds, steps and numbers of its own")
    return tuple(sorted(items.items()))


def check_settings(settings: Any) -> None:
    """Raise `ValueError` unless these are settings: a dict or a name is taken for them easily."""
    if not isinstance(settings, QuantizationSettings):
        raise ValueError(f"settings must be QuantizationSettings(bits=2, ...), got {settings!r:.60}")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """What a person chooses. Equal settings, model and machine give equal bytes."""

    bits: int = 2
    recipe: Recipe = "best"
    seed: int = 0
    keep: tuple[str, ...] = ()  # shell patterns of layers to leave in 16 bit
    call: Mapping[str, CallValue] | tuple[tuple[str, CallValue], ...] = ()  # what the pipeline's call is told, by name
    prompts: tuple[str, ...] = ()  # that a model of prompts is calibrated on; by default a neutral list
    calibration: CalibrationConfig = CalibrationConfig()
    entropy_coding: EntropyCodingConfig = EntropyCodingConfig()

    def __post_init__(self) -> None:
        """Raise `ValueError` for what is no setting: what is wrong is said here, not after minutes."""
        _check_numbers(self)
        if isinstance(self.keep, str) or not all(isinstance(pattern, str) for pattern in self.keep):
            raise ValueError(f"keep must be a tuple of patterns, such as ('*.ff.*',), got {self.keep!r:.60}")
        object.__setattr__(self, "keep", tuple(self.keep))
        if isinstance(self.prompts, str) or not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise ValueError(f"prompts must be a tuple of texts, got {self.prompts!r:.60}")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "call", call_items(self.call))
        if not isinstance(self.calibration, CalibrationConfig):
            raise ValueError(f"calibration must be a CalibrationConfig, got {self.calibration!r:.60}")
        if not isinstance(self.entropy_coding, EntropyCodingConfig):
            raise ValueError(f"entropy_coding must be an EntropyCodingConfig, got {self.entropy_coding!r:.60}")
        if self.bits not in CODEBOOKS:
            raise ValueError(f"bits must be one of {sorted(CODEBOOKS)}, got {self.bits}")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")

    @property
    def call_arguments(self) -> dict[str, CallValue]:
        """What the pipeline's call is told while it is sampled: what this model will be drawn with."""
        return dict(self.call)

    @property
    def num_codewords(self) -> int:
        return CODEBOOKS[self.bits][0]

    @property
    def subvector_dim(self) -> int:
        return CODEBOOKS[self.bits][1]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: lists, no tuples."""
        values = {
            **dataclasses.asdict(self),
            "keep": list(self.keep),
            "call": self.call_arguments,
            "prompts": list(self.prompts),
        }
        values["entropy_coding"]["probes"] = list(self.entropy_coding.probes)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationSettings:
        recipes = {
            "calibration": _known(CalibrationConfig, values["calibration"]),
            "entropy_coding": _known(EntropyCodingConfig, values.get("entropy_coding", {})),
        }
        return cls(**{**values, "keep": tuple(values["keep"]), "prompts": tuple(values.get("prompts", ())), **recipes})


def _known(config: type, values: dict[str, Any]) -> Any:
    """A config of those values that it has entries for: earlier versions had others."""
    names = {entry.name for entry in dataclasses.fields(config)}
    of_json = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return config(**{name: value for name, value in of_json.items() if name in names})
