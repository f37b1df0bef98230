"""Save and load through diffusers: after `import vq4dit`, `from_pretrained` reads packed models by itself.

diffusers asks a quantizer at five moments, and each method below answers one of them: which keys are in the files, what
the empty model must look like, which missing keys are fine, what to do when all tensors are in place, what to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from vq4dit.config import VQ4DiTConfig
from vq4dit.dit import block_embedders, duplicate_keys, share_embedders, unshare_embedders
from vq4dit.errors import FormatError
from vq4dit.json_files import AGAIN
from vq4dit.layers import PackedLinear
from vq4dit.memory import available_memory
from vq4dit.packed_tensors import PACKED_SUFFIXES, PACKED_TYPES, SCALES, empty_layer
from vq4dit.repository import TensorHeader, read_header
from vq4dit.skeleton import LARGEST_TABLE, WEIGHTS_PER_BYTE

DECODE_MODES = ("auto", "load", "forward")
_decode_mode: ContextVar[str] = ContextVar("decode_mode", default="auto")


def _check_mode(mode: str) -> None:
    if mode not in DECODE_MODES:
        raise ValueError(f"decode mode must be one of {DECODE_MODES}, got {mode!r}")


@contextmanager
def decode_mode(mode: str) -> Iterator[None]:
    """Choose when models loaded inside this block are decoded.

    "load": once, at load; as fast as the original. "forward": in every forward pass; memory as small as the file.
    "auto" (the default): at load if the decoded weights fit in half of the memory that is free.
    """
    _check_mode(mode)
    token = _decode_mode.set(mode)
    try:
        yield
    finally:
        _decode_mode.reset(token)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def set_decode_mode(model: nn.Module, mode: str, dtype: torch.dtype | None = None) -> None:
    """Switch a loaded model between decoded (`"load"`) and packed (`"forward"`) layers; see `decode_mode`.

    Raises:
        ValueError: if there is no such mode.
    """
    _check_mode(mode)
    layers = {name: layer for name, layer in packed_layers(model).items() if layer.device.type != "meta"}
    if not layers:
        return
    if dtype is None:
        dtype = next((layer.bias.dtype for layer in layers.values() if layer.bias is not None), torch.float32)
    if mode == "auto":
        needed = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
        mode = "load" if needed <= available_memory(next(iter(layers.values())).device) / 2 else "forward"
    for name, layer in layers.items():
        if mode == "load":
            layer.decode(dtype, name)
        else:
            layer.drop_decoded()


def dequantize(model: Any) -> Any:
    """Turn a packed model, in place, into an ordinary one: `nn.Linear`s with decoded weights, nothing shared; returns it.

    Weights that were changed after decoding (a merged LoRA) stay as they are now.
    """
    unpack_layers(model)
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer
        model.is_quantized = False
    return model


def unpack_layers(model: Any) -> None:
    """The work of `dequantize`, without diffusers' bookkeeping."""
    for name, layer in packed_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().clone())
        linear.bias = nn.Parameter(layer.bias.detach()) if layer.bias is not None else None
        model.set_submodule(name, linear)
    unshare_embedders(model)
    remaining = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = FrozenDict(remaining)  # diffusers has no public way to forget a config entry


def check_size(layers: dict[str, PackedLinear], num_bytes: int) -> None:
    """Raise `FormatError` if layers have far more weights than files of that size can mean: they may cost nothing each."""
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    if weights > max(WEIGHTS_PER_BYTE * num_bytes, LARGEST_TABLE):
        raise FormatError(
            f"a file of {num_bytes} bytes cannot hold the {weights} quantized weights that its config.json describes: the "
            f"files do not belong together; {AGAIN}"
        )


class VQ4DiTQuantizer(DiffusersQuantizer):
    """The answers to diffusers' questions about packed models."""

    requires_calibration = True  # from_pretrained loads packed files; making them is `vq4dit.quantize`
    use_keep_in_fp32_modules = True
    quantization_config: VQ4DiTConfig

    def __init__(self, quantization_config: VQ4DiTConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._headers: dict[str, TensorHeader] = {}
        self._num_bytes = 0  # of the files
        self._shapes: dict[str, dict[str, list[int]]] = {}  # layer name -> tensor name -> shape, from the files
        self._duplicates: dict[str, str] = {}
        self._dtype: torch.dtype | None = None
        self.model: nn.Module | None = None  # whose layers are looked at when saving; copied along with it

    # --- loading ---

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | str) -> list[str]:
        """Read the shapes of packed layers from the headers of the files."""
        for path in [checkpoint_files] if isinstance(checkpoint_files, str) else checkpoint_files:
            self._headers |= read_header(Path(path))
            self._num_bytes += Path(path).stat().st_size
        for key, found in self._headers.items():
            if key.endswith(PACKED_SUFFIXES):
                layer, _, tensor = key.rpartition(".")
                if found.dtype not in PACKED_TYPES[tensor]:
                    raise FormatError(f"{key} must be of type {PACKED_TYPES[tensor][0]}, got {found.dtype}: {AGAIN}")
                self._shapes.setdefault(layer, {})[tensor] = list(found.shape)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Put empty packed layers where the files have packed tensors, and share the embedders that are stored once."""
        modules = dict(model.named_modules())
        for name, shapes in self._shapes.items():
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise FormatError(f"the file has a packed layer {name}, the model's config has no linear layer of that name")
            model.set_submodule(name, empty_layer(name, shapes, linear))
        check_size(packed_layers(model), self._num_bytes)
        for name, parameter in model.named_parameters():
            if name in self._headers and self._headers[name].shape != tuple(parameter.shape):
                raise FormatError(
                    f"{name} has the shape {list(self._headers[name].shape)} in the file, and {list(parameter.shape)} by its "
                    f"config.json: the files do not belong together; {AGAIN}"
                )
        if unknown := set(self.quantization_config.shared_embedders) - set(block_embedders(model)):
            raise FormatError(f"config.json says that blocks share {sorted(unknown)[0]}, which this model's blocks do not have")
        share_embedders(model, self.quantization_config.shared_embedders)
        self._duplicates = duplicate_keys(model, self.quantization_config.shared_embedders)
        if keep_in_fp32_modules is not None:  # codebooks and scales keep their bits whatever torch_dtype is
            keep_in_fp32_modules.extend(SCALES - set(keep_in_fp32_modules))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing := [key for key in missing_keys if key not in self._duplicates]:
            raise FormatError(
                f"{len(missing)} tensors are missing, such as {sorted(missing)[0]}; the file is incomplete: download it again"
            )
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Offer the embedders stored once under every block's name, as offloading looks them up."""
        present = {key: state_dict[original] for key, original in self._duplicates.items() if original in state_dict}
        return {**state_dict, **present}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.model = model
        if not hasattr(model, "_hf_hook"):  # accelerate's offloading moves packed tensors only
            set_decode_mode(model, _decode_mode.get(), self._dtype)
        for name, layer in packed_layers(model).items():
            if layer.device.type != "meta":
                layer.check(name)

    # --- saving ---

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Drop the embedders' copies, and store every number in the 16 bits it came in.

        Raises:
            FormatError: if a decoded weight was changed (a LoRA merged into it): packed tensors cannot hold that.
        """
        assert self.model is not None  # set when loading, and by `attach`
        for name, layer in packed_layers(self.model).items():
            if layer.is_changed:
                raise FormatError(
                    f"the weight of {name} was changed after decoding (a merged LoRA?) and does not fit its packed tensors "
                    "any more: save the LoRA by itself and go back to the packed weights with vq4dit.set_decode_mode(model, "
                    '"load"), or call vq4dit.dequantize(model) and save it unpacked'
                )
        duplicates = duplicate_keys(self.model, self.quantization_config.shared_embedders)
        target = getattr(torch, self.quantization_config.dtype)
        packed = {key: tensor for key, tensor in state_dict.items() if key not in duplicates}
        return {
            key: _narrow(tensor, torch.float16 if key.endswith(PACKED_SUFFIXES) else target) for key, tensor in packed.items()
        }, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unpack_layers(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # LoRA adapters beside packed layers

    @property
    def is_compileable(self) -> bool:
        return True


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 that holds nothing but values of a 16-bit type goes back to 16 bit."""
    if tensor.dtype != torch.float32:
        return tensor
    for candidate in (dtype, torch.float16):
        narrow = tensor.to(candidate)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def attach(transformer: Any, config: VQ4DiTConfig) -> None:
    """Tell diffusers that this model, whose layers are packed already, is quantized: `save_pretrained` then works."""
    quantizer = VQ4DiTQuantizer(config, pre_quantized=True)
    quantizer.model = transformer
    transformer.hf_quantizer = quantizer
    transformer.is_quantized = True
    transformer.quantization_method = config.quant_method
    transformer.register_to_config(quantization_config=config)


def register() -> None:
    """Make diffusers know us. There is no hook for third parties: two dictionaries are the registry."""
    auto.AUTO_QUANTIZER_MAPPING["vq4dit"] = VQ4DiTQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vq4dit"] = VQ4DiTConfig
