"""The same laws on a GPU: everything follows the pipeline's device, a seed is the same noise, and files read the same.

`python -m pytest tests/gpu -n 0` where there is one; elsewhere these are skipped.
"""

import json

import numpy as np
import pytest
import torch
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.cli.main import main
from vq4dit.devices import resolve
from vq4dit.evaluation.images import sample
from vq4dit.evaluation.layer_errors import layer_noise_errors
from vq4dit.evaluation.metrics import layer_errors, noise_nmse
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.load import load_pipeline
from vq4dit.randomness import named_generator
from vq4dit.recipes.kmeans import fit_codebook

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine, or this build of torch, has no CUDA device"),
]
RECIPES = ["kmeans", "paper", "best"]


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda:0")


def devices_of(module: torch.nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*module.parameters(), *module.buffers())}


def test_auto_takes_the_gpu(cuda):
    assert resolve() == cuda


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantizing_follows_the_pipeline(cuda, recipe, tmp_path):
    pipeline = new_pipeline().to(cuda)
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
    assert devices_of(quantized.transformer) == {cuda} == devices_of(pipeline.transformer)
    on_cpu = vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe))
    errors = [layer_errors(p.transformer, q.transformer) for p, q in ((pipeline, quantized), (new_pipeline(), on_cpu))]
    for there, here in zip(*errors, strict=True):
        assert there.name == here.name and there.relative_error == pytest.approx(here.relative_error, rel=0.1)
    vq4dit.save(quantized, tmp_path / "q")
    read = load_pipeline(str(tmp_path / "q")).to(cuda)
    for name, layer in packed_layers(read.transformer).items():
        assert torch.equal(layer.weight, packed_layers(quantized.transformer)[name].weight)


@pytest.mark.parametrize("recipe", ["kmeans", "best"])
def test_a_file_decodes_to_the_same_bits_on_every_device(cuda, recipe):
    quantized = vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe)).transformer
    weights = {name: layer.reconstruct(torch.float32) for name, layer in packed_layers(quantized).items()}
    for name, layer in packed_layers(quantized.to(cuda)).items():
        found = layer.reconstruct(torch.float32)
        assert found.device == cuda and torch.equal(found.cpu(), weights[name]), name


def test_a_seed_is_the_same_picture_on_every_device(cuda):
    images = [sample(p, [0, 1], [5, 6], num_inference_steps=4) for p in (new_pipeline(), new_pipeline().to(cuda))]
    assert np.abs(images[0] - images[1]).max() < 0.02


def test_figures_agree_with_those_of_the_cpu(cuda):
    few = {"num_trajectories": 2, "num_inference_steps": 3}
    found = []
    for device in ("cpu", cuda):
        pipeline = new_pipeline()
        quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
        for model in (pipeline, quantized):
            model.to(device)
        found.append((noise_nmse(pipeline, quantized, **few), layer_noise_errors(pipeline, quantized, **few)))
    (nmse, parts), (nmse_there, parts_there) = found
    assert nmse_there == pytest.approx(nmse, rel=0.02)
    assert parts_there == pytest.approx(parts, rel=0.05)


def test_codebooks_fit_as_well(cuda, generator):
    points = torch.randn(20000, 4, generator=generator)
    books = [fit_codebook(p, 64, generator=named_generator(0, "x")) for p in (points, points.to(cuda))]
    errors = [(torch.cdist(points, book.cpu()).min(1).values ** 2).mean().item() for book in books]
    assert books[1].device == cuda and errors[1] == pytest.approx(errors[0], rel=0.02)


def test_the_commands_use_it_by_default(tmp_path, model_folder, capsys):
    quantized = str(tmp_path / "q")
    assert main(["quantize", model_folder, "--recipe", "kmeans", "--output", quantized, "--json"]) == 0
    assert capsys.readouterr().err.startswith("device: cuda:0 (")
    compare = ["compare", model_folder, quantized, "--steps", "2", "--labels", "cat", "--json", "--output"]
    assert main([*compare, str(tmp_path / "there")]) == 0 and main([*compare, str(tmp_path / "here"), "--device", "cpu"]) == 0
    there, here = (json.loads((tmp_path / place / "report.json").read_text()) for place in ("there", "here"))
    assert there["noise_nmse"] == pytest.approx(here["noise_nmse"], rel=0.02)
    assert there["peak_memory_bytes"] == torch.cuda.max_memory_allocated() < here["peak_memory_bytes"]


def test_a_gpu_that_is_not_there_is_refused(model_folder, tmp_path, capsys):
    number = torch.cuda.device_count()
    assert main(["quantize", model_folder, "--output", str(tmp_path / "q"), "--device", f"cuda:{number}"]) == 1
    assert f"there is no device cuda:{number} here" in capsys.readouterr().err
