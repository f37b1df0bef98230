"""Save and load through diffusers: after `import vq4dit`, `from_pretrained` reads packed models by itself.

diffusers asks a quantizer at five moments, and each method below answers one of them: which keys are in the files, what
the empty model must look like, which missing keys are fine, what to do when all tensors are in place, what to save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from vq4dit.config import VQ4DiTConfig
from vq4dit.disk.json_files import AGAIN
from vq4dit.errors import FormatError
from vq4dit.layers.casts import check_finite
from vq4dit.layers.linear_maps import is_linear_map, ordinary_layer, put_layer
from vq4dit.layers.packed import PackedLinear
from vq4dit.layers.schema import PACKED_SUFFIXES, PACKED_TYPES, SCALES, empty_layer, stored
from vq4dit.models.adapters import adapter_layers, adapter_names
from vq4dit.models.blocks import block_embedders, duplicate_keys, parts_of, share_embedders, unshare_embedders
from vq4dit.pipelines.decode_modes import chosen_mode, packed_layers, set_decode_mode
from vq4dit.pipelines.repository import TensorHeader, read_header
from vq4dit.pipelines.skeleton import LARGEST_TABLE, WEIGHTS_PER_BYTE


def dequantize(model: Any) -> Any:
    """Turn a packed model, in place, into an ordinary one: layers with decoded weights, nothing shared; returns it.

    Weights that were changed after decoding (a merged LoRA) stay as they are now. A pipeline may be given: then each of its
    packed parts becomes an ordinary one.
    """
    for part in parts_of(model):
        if packed_layers(part):
            check_in_memory(part, "made an ordinary model")
        packed: list[Any] = [m for m in part.modules() if isinstance(vars(m).get("hf_quantizer"), VQ4DiTQuantizer)]
        for module in packed:
            module.dequantize()
        if packed_layers(part):  # diffusers does not know that it is quantized
            unpack_layers(part)
    return model


def check_in_memory(model: nn.Module, what: str) -> None:
    """Raise `FormatError` if numbers of a model are somewhere else; `what` cannot be done then, for the message."""
    for name, tensor in model.named_parameters():
        if tensor.device.type == "meta":
            raise FormatError(
                f"{name} is not in memory (the model is offloaded), and a model cannot be {what} without its numbers: call "
                "pipeline.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules(model), which bring them back, or "
                "load the model again without offloading"
            )


def unpack_layers(model: Any) -> None:
    """The work of `dequantize`, without diffusers' bookkeeping."""
    for name, layer in packed_layers(model).items():
        linear = ordinary_layer(layer.out_features, layer.in_features, layer.channel_dim, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.numbers().detach().clone().view_as(linear.weight))
        linear.bias = nn.Parameter(layer.bias.detach()) if layer.bias is not None else None
        model.set_submodule(name, linear.train(layer.training))
    unshare_embedders(model)
    forgotten = ("quantization_config", "_pre_quantization_dtype")
    remaining = {key: value for key, value in model.config.items() if key not in forgotten}
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
        """Read the shapes of packed layers from the headers of the files.

        Raises:
            FormatError: if there are none, or the files are no safetensors.
        """
        for path in [checkpoint_files] if isinstance(checkpoint_files, str) else checkpoint_files:
            if not str(path).endswith(".safetensors"):
                raise FormatError(f"packed models are read from safetensors only, not from {path}: quantize the model again")
            self._headers |= read_header(Path(path))
            self._num_bytes += Path(path).stat().st_size
        for key, found in self._headers.items():
            if key.endswith(PACKED_SUFFIXES):
                layer, _, tensor = key.rpartition(".")
                if found.dtype not in PACKED_TYPES[tensor]:
                    raise FormatError(f"{key} must be of type {PACKED_TYPES[tensor][0]}, got {found.dtype}: {AGAIN}")
                self._shapes.setdefault(layer, {})[tensor] = list(found.shape)
        if not self._shapes:  # made by `from_config` of a packed model's config, and trained, perhaps
            raise FormatError(
                "config.json says that this model is packed (quantization_config), its files hold no packed layer: if it is an "
                "ordinary model, delete quantization_config from config.json, otherwise download it again"
            )
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        """Put empty packed layers where the files have packed tensors, and share the embedders that are stored once."""
        modules = dict(model.named_modules())
        named: Any = model._keep_in_fp32_modules or []  # by the class, whatever type is loaded
        in_fp32: list[str] = [named] if isinstance(named, str) else named
        for name, shapes in self._shapes.items():
            linear = modules.get(name)
            if linear is None or not is_linear_map(linear):
                raise FormatError(f"the file has a packed layer {name}, the model's config has no linear layer of that name")
            dtype = torch.float32 if set(name.split(".")) & set(in_fp32) else linear.weight.dtype
            put_layer(model, name, empty_layer(name, shapes, linear, dtype))
        check_size(packed_layers(model), self._num_bytes)
        for name, parameter in model.named_parameters():
            if name in self._headers and self._headers[name].shape != tuple(parameter.shape):
                raise FormatError(
                    f"{name} has the shape {list(self._headers[name].shape)} in the file, and {list(parameter.shape)} by its "
                    f"config.json: the files do not belong together; {AGAIN}"
                )
        if unknown := set(self.quantization_config.shared_embedders) - set(block_embedders(model)):
            raise FormatError(f"config.json says that blocks share {sorted(unknown)[0]}, which this model's blocks do not have")
        if device_map is None:
            share_embedders(model, self.quantization_config.shared_embedders)
        self._duplicates = duplicate_keys(model, self.quantization_config.shared_embedders)
        # Codebooks and scales keep their bits whatever torch_dtype is. The list is this load's own: diffusers would hand us the
        # class's if we had `use_keep_in_fp32_modules`.
        if keep_in_fp32_modules is not None and keep_in_fp32_modules is not in_fp32:
            keep_in_fp32_modules.extend([*in_fp32, *sorted(SCALES)])

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing := [key for key in missing_keys if key not in self._duplicates]:
            raise FormatError(
                f"{len(missing)} tensors are missing, such as {sorted(missing)[0]}; the file is incomplete: download it again"
            )
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Offer the embedders stored once under every block's name, as offloading looks them up.

        Here every number passes, wherever it is put afterwards, so here is where they are looked at.

        Raises:
            FormatError: if a tensor holds values that are not finite, or the load dtype cannot hold them.
        """
        for key, tensor in state_dict.items():
            check_finite(key, tensor, None if key.endswith(PACKED_SUFFIXES) else self._dtype or torch.get_default_dtype())
        if stored := sorted(self._duplicates.keys() & state_dict.keys()):
            raise FormatError(
                f"config.json says that all blocks have the embedder {stored[0]} in common, and the file holds one of its own "
                "for a later block: it does not belong to this config.json. Download or quantize the model again"
            )
        present = {key: state_dict[original] for key, original in self._duplicates.items() if original in state_dict}
        return {**state_dict, **present}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.model = model
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            share_embedders(model, self.quantization_config.shared_embedders)
        if not hasattr(model, "_hf_hook"):  # accelerate's offloading moves packed tensors only
            set_decode_mode(model, chosen_mode.get())
        for name, layer in packed_layers(model).items():
            if layer.device.type != "meta":
                layer.check(name)

    # --- saving ---

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Drop the embedders' copies, and store every number in the 16 bits it came in, every byte as a byte.

        Raises:
            FormatError: if the file could not be read again, or packed tensors were cast to types that do not hold them. (What
                the model computes with was looked at before: `is_serializable`.)
        """
        assert self.model is not None  # set when loading, and by `attach`
        if not safe_serialization:
            raise FormatError("packed models are saved as safetensors only: leave out safe_serialization=False")
        duplicates = duplicate_keys(self.model, self.quantization_config.shared_embedders)
        packed = {key: tensor for key, tensor in state_dict.items() if key not in duplicates}
        emptied = tuple(f"{name}.base_layer." for name in adapter_layers(self.model, empty=True))
        dtype = getattr(torch, self.quantization_config.dtype)
        return {
            key.replace(".base_layer.", ".") if key.startswith(emptied) else key: stored(key, tensor, dtype)
            for key, tensor in packed.items()
        }, {}

    def _check_saveable(self, model: nn.Module) -> None:
        check_in_memory(model, "saved")
        if attached := adapter_layers(model):
            name, wrapper = next(iter(attached.items()))
            adapters, fused = ", ".join(adapter_names(wrapper)), " and fused into it" if wrapper.merged_adapters else ""
            raise FormatError(
                f"the adapter {adapters} is attached to {name}{fused}, and a packed file has no place for it: save the adapter "
                "by itself (save_pretrained of the PEFT model, or get_peft_model_state_dict), and detach it (unload_lora, "
                "unload) before saving the model"
            )
        for name, layer in packed_layers(model).items():
            if layer.is_changed:
                raise FormatError(
                    f"{layer.told_change(name)}, and packed tensors cannot hold that: save the LoRA by itself and go back to "
                    'the packed weights with vq4dit.set_decode_mode(model, "load"), or call vq4dit.dequantize(model) and save '
                    "it unpacked"
                )

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unpack_layers(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """diffusers asks before it writes anything: a save that would lose something is refused before a file is touched."""
        if self.model is not None:
            self._check_saveable(self.model)
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # LoRA adapters beside packed layers

    @property
    def is_compileable(self) -> bool:
        return True


def attach(transformer: Any, config: VQ4DiTConfig) -> None:
    """Tell diffusers that this model, whose layers are packed already, is quantized: `save_pretrained` then works."""
    quantizer = VQ4DiTQuantizer(config, pre_quantized=True)
    quantizer.model = transformer
    dtype = transformer.dtype
    transformer.hf_quantizer = quantizer
    transformer.is_quantized = True
    transformer.quantization_method = config.quant_method
    transformer.register_to_config(quantization_config=config, _pre_quantization_dtype=dtype)


def register() -> None:
    """Make diffusers know us. There is no hook for third parties: two dictionaries are the registry."""
    auto.AUTO_QUANTIZER_MAPPING["vq4dit"] = VQ4DiTQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vq4dit"] = VQ4DiTConfig
