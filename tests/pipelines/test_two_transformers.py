"""Pipelines with two transformers, each for the steps it serves: both are quantized, packed, described and loaded again."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipelines import CALLS, build

import vq4dit
from vq4dit import CalibrationConfig, QuantizationSettings
from vq4dit.denoisers import Denoisers, denoiser_of, denoisers_of, names_of_denoisers
from vq4dit.disk.job import Job, fingerprint
from vq4dit.errors import FormatError, UnsupportedModelError
from vq4dit.evaluation.images import sample
from vq4dit.hub.base import Base
from vq4dit.hub.model_card import model_card
from vq4dit.models.rehearsal import rehearse
from vq4dit.models.trajectories import record_calls
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.inspect import inspect, tensor_bytes
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.save import is_finished
from vq4dit.recipes.quantize import run

CALL = {**CALLS["wan22"], "height": 16, "width": 16}
BOTH = ["transformer", "transformer_2"]
KMEANS = QuantizationSettings(recipe="kmeans", call=CALL)


def drawn(pipeline) -> torch.Tensor:
    return torch.as_tensor(sample(pipeline, ["a red fox"], [0], num_inference_steps=4, call=CALL))


@pytest.fixture(scope="module")
def original():
    return build("wan22")


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "wan22"
    original.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(original):
    return vq4dit.quantize(original, KMEANS)


@pytest.fixture(scope="module")
def packed(quantized, folder, tmp_path_factory) -> Path:
    packed = tmp_path_factory.mktemp("packed") / "wan22"
    vq4dit.save(quantized, packed, source=folder)
    return packed


def test_every_part_of_the_transformers_class_is_a_denoiser():
    kinds = {"vae": "V", "transformer_2": "T", "transformer": "T", "unconditional_transformer": "T", "text_encoder": None}
    assert names_of_denoisers(kinds) == ["transformer", "transformer_2", "unconditional_transformer"]
    assert names_of_denoisers({"transformer": "T", "prior": "P"}) == ["transformer"]
    assert names_of_denoisers({"unet": "U"}) == []


def test_one_alone_is_its_pipelines_denoiser_itself(pipeline):
    assert denoiser_of(pipeline) is pipeline.transformer


def test_both_are_sampled_and_each_call_knows_its_own(original):
    sampling = rehearse(original, CALL)
    calls = record_calls(original, sampling, 1, torch.Generator().manual_seed(0))
    assert [part for part in dict.fromkeys(call.part for call in calls)] == BOTH
    first_of_second = next(call.step for call in calls if call.part == "transformer_2")
    assert all((call.step >= first_of_second) == (call.part == "transformer_2") for call in calls)
    with torch.no_grad():
        assert torch.equal(calls[-1].run(denoiser_of(original)), calls[-1].run(Denoisers(denoisers_of(original))))
        assert not torch.equal(calls[-1].run(denoiser_of(original)), calls[0].run(denoiser_of(original)))


def test_both_are_packed_and_load_bit_equal_in_both_modes(quantized, packed):
    wanted = drawn(quantized)
    for mode in ("load", "forward"):
        with vq4dit.decode_mode(mode):
            loaded = load_pipeline(str(packed))
        for part in BOTH:
            assert len(packed_layers(loaded.components[part])) == 20
        assert torch.equal(drawn(loaded), wanted)


def test_what_is_predicted_is_what_is_written(folder, packed):
    found = inspect(str(folder), recipe="kmeans")
    assert (found.num_transformers, found.num_blocks) == (2, 4)
    assert (
        found.file_bytes
        == tensor_bytes(str(folder))
        == sum(path.stat().st_size for part in BOTH for path in (folder / part).glob("*.safetensors"))
    )
    assert tensor_bytes(str(packed)) == pytest.approx(found.predictions[0].file_bytes, rel=0.01)
    layers = {layer.name.split(".")[0] for layer in found.predictions[0].layers}
    assert layers == set(BOTH)


def test_a_result_is_finished_only_while_both_are_as_they_were(original, folder, tmp_path):
    output = tmp_path / "result"
    with Job.open(tmp_path / "job", KMEANS, original, resume=False) as job:
        quantized = run(job, original)
    vq4dit.save(quantized, output, source=folder)
    assert is_finished(output, KMEANS, original, folder, overwrite=False)
    other = copy.copy(original)
    other.register_modules(transformer_2=copy.deepcopy(original.transformer_2))
    with torch.no_grad():
        other.transformer_2.proj_out.bias += 1
    assert fingerprint(other) != fingerprint(original)
    assert not is_finished(output, KMEANS, other, folder, overwrite=False)


def test_one_whose_layers_are_all_kept_stays_as_it_is(original, folder, tmp_path):
    for kept, packed_part in (("transformer_2", "transformer"), ("transformer", "transformer_2")):
        settings = QuantizationSettings(recipe="kmeans", keep=(f"{kept}.*",), call=CALL)
        quantized = vq4dit.quantize(original, settings)
        assert quantized.components[kept] is original.components[kept]
        vq4dit.save(quantized, tmp_path / packed_part, source=folder)
        loaded = load_pipeline(str(tmp_path / packed_part))
        assert not packed_layers(loaded.components[kept]) and packed_layers(loaded.components[packed_part])
        weights = "diffusion_pytorch_model.safetensors"
        assert (tmp_path / packed_part / kept / weights).read_bytes() == (folder / kept / weights).read_bytes()
        assert f"{packed_part}.blocks" not in model_card(tmp_path / packed_part, "me/it", Base())
        with pytest.raises(UnsupportedModelError, match="quantized already"):
            inspect(str(tmp_path / packed_part))
        with pytest.raises(UnsupportedModelError, match="quantized already"):
            vq4dit.quantize(loaded, KMEANS)


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_a_calibrated_one_goes_on_where_it_was_stopped(recipe, original, tmp_path):
    calibration = CalibrationConfig(steps=6, num_inference_steps=3, num_trajectories=1)
    coding = vq4dit.EntropyCodingConfig(tokens=200, sensitivity_tokens=100, beam=1, probes=(1,))
    keep = tuple(f"{part}.blocks.{rest}" for part in BOTH for rest in ("0.attn*", "1.*"))
    settings = QuantizationSettings(recipe=recipe, calibration=calibration, entropy_coding=coding, keep=keep, call=CALL)
    whole = denoiser_of(vq4dit.quantize(original, settings)).state_dict()
    slices = 0
    while True:
        with Job.open(tmp_path / "job", settings, original, resume=True) as job:
            slices += 1
            if (pieced := run(job, original, seconds=0.0)) is not None:
                break
    assert slices > 2
    made = denoiser_of(pieced).state_dict()
    assert made.keys() == whole.keys() and all(torch.equal(made[key], whole[key]) for key in whole)


def test_a_broken_second_one_is_told_by_its_name(packed, tmp_path):
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    path = broken / "transformer_2" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": 3}))
    with pytest.raises(FormatError, match="transformer_2/config.json: quantization_config"):
        load_pipeline(str(broken))
    path.write_text(json.dumps(config | {"num_layers": 10**9}))
    with pytest.raises(FormatError, match="transformer_2"):
        load_pipeline(str(broken))
    path.write_text(json.dumps(config))
    weights = broken / "transformer_2" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="transformer_2"):
        load_pipeline(str(broken))


def test_its_card_names_the_layers_of_both(packed):
    card = model_card(packed, "me/wan22-2bit", Base())
    assert "256 codewords of 4 weights in 40 layers" in card
    assert f"{tensor_bytes(str(packed)):,}" in card


def test_the_same_transformer_in_both_places_stays_so(original):
    twice = copy.copy(original)
    twice.register_modules(transformer_2=original.transformer)
    quantized = vq4dit.quantize(twice, KMEANS)
    assert quantized.transformer is quantized.transformer_2 and len(packed_layers(quantized.transformer)) == 20


def test_compiled_parts_are_what_they_were(original):
    compiled = copy.copy(original)
    compiled.transformer, compiled.vae = torch.compile(original.transformer), torch.compile(original.vae)
    assert list(denoisers_of(compiled)) == BOTH


def test_one_that_is_kept_whole_is_predicted_as_it_is_copied(folder, tmp_path):
    found = inspect(str(folder), ["transformer_2.*"], recipe="kmeans")
    settings = QuantizationSettings(recipe="kmeans", keep=("transformer_2.*",), call=CALL)
    vq4dit.save(vq4dit.quantize(load_pipeline(str(folder)), settings), tmp_path / "kept", source=folder)
    assert tensor_bytes(str(tmp_path / "kept")) == pytest.approx(found.predictions[0].file_bytes, rel=0.01)
