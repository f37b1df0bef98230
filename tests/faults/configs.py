"""Malformed and hostile JSON files: refused with a reason, or harmless; fast, and in little memory.

A case writes something into one JSON file of a model, of a job or of a comparison, and runs the commands that read it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import commands
from campaign import Case
from worker import Complaint, Worker

TITLE, COUNTED = "malformed or hostile configs", ("tracebacks", "hangs", "large allocations", "control characters")
SHORT = 40
BASE_BYTES = 96e6  # that a command on the tiny model may take in all
DEEP = 100_000

INSPECT = commands.INSPECT.split()
QUANTIZE = [*commands.QUANTIZE["kmeans"].split(), "--output", "out"]
SAMPLE = [*commands.SAMPLE.replace("cat", "0").split(), "--output", "a.png"]
RESUME = [*QUANTIZE, "--resume"]
COMPARE = [*commands.COMPARE.split(), "--output", "comparison", "--overwrite"]

READERS: dict[str, tuple[list[str], ...]] = {  # of each file, what reads it
    "model/model_index.json": (INSPECT, QUANTIZE),
    "model/transformer/config.json": (INSPECT, QUANTIZE),
    "model/scheduler/scheduler_config.json": (QUANTIZE,),
    "model/vae/config.json": (QUANTIZE,),
    "model/transformer/diffusion_pytorch_model.safetensors.index.json": (INSPECT, QUANTIZE),
    "kmeans/model_index.json": (SAMPLE,),
    "kmeans/transformer/config.json": (SAMPLE,),
    "kmeans/scheduler/scheduler_config.json": (SAMPLE,),
    "kmeans/vae/config.json": (SAMPLE,),
    "kmeans/transformer/diffusion_pytorch_model.safetensors.index.json": (SAMPLE,),
    "kmeans/vq4dit.json": (["card"],),
    "comparison/report.json": (["card"], COMPARE),
    "out.job/job.json": (RESUME,),
}
WHOLE: dict[str, str | bytes] = {
    "empty": "", "a list": "[]", "null": "null", "a number": "1", "a text": '"x"', "no entries": "{}", "cut short": '{"a": ',
    "no utf-8": b"\xff\xfe{}", "nested lists": "[" * DEEP, "nested objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "a huge number": '{"a": 1' + "0" * 5000 + "}", "an infinity": '{"a": 1e999, "b": NaN}', "a list of lists": "[[[]]]",
}  # fmt: skip

CONFIG: dict[str, list[Any]] = {
    "_class_name": [
        None,
        [],
        1,
        "",
        "os",
        "UNet2DConditionModel",
        "ModelMixin",
        "AutoencoderKL",
        "x\x1b[31my",
        "torch.nn.Linear",
    ],
    "num_layers": ["28", 0, -1, 10**9, 10**6, 1.5, None, [2], True, 10**400],
    "patch_size": [0, -2, "2", None, 3, 10**9],
    "num_attention_heads": [0, -1, "2", None, 10**9, 10**30],
    "attention_head_dim": [0, "32", 10**9, -32],
    "in_channels": [0, "4", 10**9, None],
    "out_channels": [0, "4", 10**9],
    "sample_size": [0, -8, "8", 10**9, None, [8, 8]],
    "num_embeds_ada_norm": [0, -1, "1000", None, 10**12],
    "norm_type": [None, "x", [], "layer_norm"],
    "activation_fn": [None, "x", 1],
    "dropout": [-1, "x", 2],
    "norm_eps": ["x", None],
    "unknown_entry": [1, {"a": [1]}],
}
QUANTIZATION: dict[str, list[Any]] = {
    "quantization_config": [None, [], "vq4dit", {}, 1, True],
    "quantization_config/quant_method": ["gptq", None, [], 1, "bitsandbytes"],
    "quantization_config/format_version": ["3", True, 99, 2, 0, -1, None, 1.0],
    "quantization_config/bits": ["2", 5, None, [], -1, 10**9],
    "quantization_config/recipe": [None, 1, "<script>", [], "\x1b[31m"],
    "quantization_config/seed": ["x", None, -1, 10**30],
    "quantization_config/dtype": ["float17", "nn", "Tensor", None, 1, "int8", "float64", "torch.float16", ""],
    "quantization_config/shared_embedders": ["abc", None, [1], ["x"], [None], {"a": 1}, ["norm1.emb", "norm1.emb"]],
    "quantization_config/unknown": [1],
}
INDEX: dict[str, list[Any]] = {
    "_class_name": [None, 1, [], "Nope", "StableDiffusionPipeline", "DiffusionPipeline", "os", "\x1b[31m"],
    "id2label": [[1], "x", {"a": "b"}, {"0": 1}, None, {"0": None}, {"0": ["a"]}, {"0": "\x1b[31m\u202e"}, {"-1": "a"}, 1],
    "transformer": [None, ["diffusers"], "x", ["os", "system"], ["diffusers", "Nope"], [None, None], [1, 2], {}, [],
                    ["diffusers", "UNet2DModel"], ["torch.nn", "Linear"]],
    "scheduler": [None, [None, None], ["diffusers", "Nope"], "x", ["diffusers", "DiTTransformer2DModel"]],
    "vae": [None, [None, None], ["diffusers", "Nope"], ["diffusers", "UNet2DModel"]],
    "text_encoder": [["transformers", "Nope"], [None, None], ["os", "path"], 1],
}  # fmt: skip
SCHEDULER: dict[str, list[Any]] = {
    "_class_name": [None, "x", 1, "DiTPipeline"],
    "num_train_timesteps": ["1000", 0, -1, 10**12, None],
    "beta_schedule": ["x", None, []],
    "beta_start": ["x", None, -1, 10**300],
    "trained_betas": ["x", [], [[1]], 1],
    "prediction_type": ["x", None],
    "steps_offset": ["x", None, 10**9],
    "timestep_spacing": ["x", None],
}
VAE: dict[str, list[Any]] = {
    "_class_name": [None, "x", "DiTTransformer2DModel"],
    "block_out_channels": [[], "8", None, [0], [10**9], 8],
    "latent_channels": [0, "4", 10**9],
    "norm_num_groups": [0, 3, None],
    "down_block_types": [[], ["x"], None, "x"],
}
SHARDS: dict[str, list[Any]] = {
    "weight_map": [None, [], {}, "x", {"a": 1}, {"a": None}, {"pos_embed.proj.weight": "pytorch_model.bin"},
                   {"a": "../../../../etc/passwd"}, {"a": "/etc/passwd"}, {"a": "missing.safetensors"}, {"a": ""},
                   {"a": "\x1b[31m.safetensors"}],
    "metadata": [None, [], "x"],
}  # fmt: skip
RECORD: dict[str, list[Any]] = {
    "base": [[], "x", None, {"model": 1}], "settings": [None, [], "x", {"calibration": 1}, {"calibration": None}, {"keep": 1},
                                                                     {"call": 1}, {"call": {"a": []}}, {"prompts": 1}],
    "versions": [[], None, "x"], "metadata": [[], None, "x", {"license": [1]}, {"license_name": "a\n# b"}], "unknown": [1],
    "model": [1, None, []], "revision": [1, None],
}  # fmt: skip
JOB: dict[str, list[Any]] = {
    "version": [None, "9", 10**9, []], "settings": [None, [], {}, "x", {"calibration": 1}], "fingerprint": [None, 1, "", []],
    "settings/bits": [None, "2"], "settings/keep": [None, "x", 1], "settings/calibration": [None, [], 1], "unknown": [1],
    "settings/call": [None, 1, "x", ["x"], {"guidance_scale": []}, {"prompt": "x"}, {"x\x1b[31m": 1}, {"a": 1e999}],
    "settings/prompts": [None, 1, "x", [1], [""], ["\x1b[31m"]],
}  # fmt: skip
REPORT: dict[str, list[Any]] = {
    "noise_nmse": [None, "x", [], {}], "quantized_bytes": [None, "x", 10**30], "num_pairs": ["<script>", None], "seed": [[]],
    "guidance_scale": [None, "x"], "call": [None, 1, "x", [], {"a": [1]}, {"a": None}, {"\x1b[31m": "<b>"}], "unknown": [1],
}  # fmt: skip
ENTRIES: dict[str, dict[str, list[Any]]] = {
    "model/model_index.json": INDEX,
    "model/transformer/config.json": CONFIG,
    "model/scheduler/scheduler_config.json": SCHEDULER,
    "model/vae/config.json": VAE,
    "model/transformer/diffusion_pytorch_model.safetensors.index.json": SHARDS,
    "kmeans/model_index.json": INDEX,
    "kmeans/transformer/config.json": CONFIG | QUANTIZATION,
    "kmeans/scheduler/scheduler_config.json": SCHEDULER,
    "kmeans/vae/config.json": VAE,
    "kmeans/transformer/diffusion_pytorch_model.safetensors.index.json": SHARDS,
    "kmeans/vq4dit.json": RECORD,
    "comparison/report.json": REPORT,
    "out.job/job.json": JOB,
}


def write_whole(content: str | bytes, path: Path) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_entry(entry: str, value: Any, path: Path) -> None:
    values = json.loads(path.read_text()) if path.exists() else {"metadata": {}, "weight_map": {}}
    *outer, last = entry.split("/")
    inner = values
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(values))


def no_file(make: Callable[[Path], None], path: Path) -> None:
    """Something that is no file stands there."""
    path.unlink(missing_ok=True)
    make(path)


STRANGE: Mapping[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link loop": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "no file": lambda path: None,
}


def check(file: str, command: list[str], write: Callable[[Path], None], worker: Worker, home: Path) -> Iterator[Complaint]:
    folders = {"model", "kmeans", "comparison"} & {*command, file.split("/")[0]} | (
        {"kmeans", "comparison"} if command == ["card"] else set()
    )
    for folder in folders:
        shutil.copytree(worker.folder / folder, home / folder)
    if file.startswith("out.job"):
        shutil.copytree(worker.folder / "kmeans.job", home / "out.job")
    if file.endswith("index.json") and "transformer" in file:  # it is only read where there is no single file
        weights = home / file.removesuffix(".index.json")
        weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    write(home / file)
    call = ["card", "kmeans", "comparison"] if command == ["card"] else ["cli", *command]
    outcome = worker.run(home, *call)
    yield from outcome.complaints(growth=int(BASE_BYTES))


def changes(file: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """All that is written into a file, by name."""
    for name, content in WHOLE.items():
        yield name, partial(write_whole, content)
    for name, make in STRANGE.items():
        yield name, partial(no_file, make)
    for entry, values in ENTRIES[file].items():
        for value in values:
            yield f"{entry} = {shortened(value)}".replace("/", "."), partial(write_entry, entry, value)


def shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:20]}...{len(text)}"


def cases(seed: int) -> list[Case]:
    found = []
    for file, readers in READERS.items():
        for command in readers:
            for name, write in changes(file):
                group = f"configs/{command[0]} {file.replace('/', ' ')}"
                found.append(Case(f"{group}/{name}", partial(check, file, command, write)))
    return found
