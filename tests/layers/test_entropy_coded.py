"""A layer of coded integers is a linear with the weight diag(r) Z diag(c), alone and in a saved model beside other kinds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from coded_models import new_coded, new_mixed_pipeline, save_mixed, separable_integers, single_stream
from diffusers import DiTPipeline, DiTTransformer2DModel
from packed_layer_checks import check_compiled_equals_eager, check_decoding_changes_no_bit
from safetensors.torch import load_file, save_file
from tiny import new_pipeline, quick_settings
from torch import nn

import vq4dit
from vq4dit.errors import FormatError
from vq4dit.evaluation.metrics import layer_errors
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear, nearest_step, step_size
from vq4dit.layers.vector import VQLinear
from vq4dit.pipelines.decode_modes import packed_layers

ROWS, COLUMNS = 12, 40
PACKED = {"coded_weight"}
SHAPE_OF_FIRST = (64, 64)  # of the first coded layer in the file
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def x(generator) -> torch.Tensor:
    return torch.randn(2, 3, COLUMNS, generator=generator)


@pytest.fixture
def layer(generator) -> EntropyCodedLinear:
    return new_coded(ROWS, COLUMNS, generator)


# --- a layer ---


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_forward_is_a_linear_with_scaled_integers(bias, x, generator):
    integers, _ = separable_integers(ROWS, COLUMNS, generator)
    row, column = (torch.exp2(torch.randint(-40, 9, (n,), generator=generator) / 8) for n in (ROWS, COLUMNS))
    values = torch.randn(ROWS, generator=generator).half().float() if bias else None
    layer = EntropyCodedLinear.from_integers(integers, row, column, values)
    assert torch.equal(layer.unpack()[0], integers)
    torch.testing.assert_close(layer(x), F.linear(x, torch.diag(row) @ integers.float() @ torch.diag(column), values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decoding_changes_no_bit_of_the_output(dtype, x, generator):
    layer = new_coded(ROWS, COLUMNS, generator, dtype=dtype)
    check_decoding_changes_no_bit(layer, x.to(dtype))


def test_every_step_is_its_own_nearest_and_no_scale_is_further_than_a_sixteenth_octave_from_one(generator):
    steps = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(nearest_step(step_size(steps)), steps)
    assert step_size(steps)[128] == 1 and step_size(steps)[136] == 2
    scales = torch.exp2(30 * torch.rand(1000, generator=generator) - 15)
    assert (step_size(nearest_step(scales)) / scales).log2().abs().max() <= 1 / 16 + 1e-6
    assert torch.equal(nearest_step(torch.tensor([0.0, 1e-30, 1e30])), torch.tensor([0, 0, 255], dtype=torch.uint8))


def test_what_is_written_into_the_weight_is_used_and_noticed(layer, x, generator):
    before, delta = layer(x), torch.randn(ROWS, COLUMNS, generator=generator)
    assert layer.weight.shape == (ROWS, COLUMNS) and not layer.is_changed
    layer.weight.data += delta
    assert layer.is_changed
    torch.testing.assert_close(layer(x), before + F.linear(x, delta))
    layer.drop_decoded()
    assert not layer.is_changed and torch.equal(layer(x), before)


def test_numbers_are_rounded_to_fp16_so_that_saving_changes_nothing(generator):
    integers, _ = separable_integers(ROWS, COLUMNS, generator)
    row, column, bias = (torch.rand(n, generator=generator) for n in (ROWS, COLUMNS, ROWS))
    layer = EntropyCodedLinear.from_integers(integers, row, column, bias)
    assert torch.equal(layer.bias, bias.half().float())
    again = EntropyCodedLinear.from_integers(integers, *(step_size(nearest_step(scale)) for scale in (row, column)), layer.bias)
    assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), again.parameters(), strict=True))


def test_casting_keeps_scales_and_bytes_exact(layer):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.decode(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.decoded_weight.dtype == torch.bfloat16
    for name in PACKED:
        assert torch.equal(getattr(layer, name), before[name]) and getattr(layer, name).dtype == before[name].dtype


@pytest.mark.parametrize("decoded", [False, True], ids=["packed", "decoded"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_only_packed_tensors_are_saved_and_make_the_layer_again(decoded, bias, x, generator):
    layer = new_coded(ROWS, COLUMNS, generator, bias=bias)
    if decoded:
        layer.decode(torch.float32)
    tensors = layer.state_dict()
    assert set(tensors) == PACKED | ({"bias"} if bias else set())
    assert torch.equal(EntropyCodedLinear.from_tensors(tensors, (ROWS, COLUMNS))(x), layer(x))


def test_a_packed_layer_is_a_linear_that_takes_no_gradients(layer):
    assert isinstance(layer, nn.Linear) and not isinstance(layer, VQLinear)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_bits_per_weight_count_all_bytes(layer):
    num_bytes = len(layer.coded_weight)
    assert layer.bits_per_weight == pytest.approx(8 * num_bytes / (ROWS * COLUMNS))


def test_a_damaged_stream_is_found_by_name(layer):
    layer.check("block.to_q")
    assert layer.decoded_weight is None
    layer.coded_weight.data = layer.coded_weight[:-4]
    for use in (lambda: layer.check("block.to_q"), lambda: layer.decode(torch.float32, "block.to_q")):
        with pytest.raises(vq4dit.FormatError, match="block.to_q: the coded integers are damaged"):
            use()
    assert layer.decoded_weight is None


# --- a model with both kinds ---


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("mixed") / "tiny")


@pytest.fixture
def broken(tmp_path, mixed_folder) -> Path:
    return shutil.copytree(mixed_folder, tmp_path / "broken")


def load(folder: Path, **arguments) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", **arguments).eval()


@torch.no_grad()
def output(model, arguments):
    return model(**arguments).sample


def coded_name(model) -> str:
    return next(name for name, layer in packed_layers(model).items() if isinstance(layer, EntropyCodedLinear))


@pytest.mark.parametrize("mode", ["load", "forward"])
def test_both_kinds_are_loaded_from_one_file_bit_by_bit(mixed_folder, one_step_input, mode):
    made = new_mixed_pipeline().transformer
    with vq4dit.decode_mode(mode):
        loaded = load(mixed_folder)
    kinds = [type(layer) for layer in packed_layers(loaded).values()]
    assert kinds == [type(layer) for layer in packed_layers(made).values()] and set(kinds) == {VQLinear, EntropyCodedLinear}
    assert all((layer.decoded_weight is None) == (mode == "forward") for layer in packed_layers(loaded).values())
    assert torch.equal(output(loaded, one_step_input), output(made, one_step_input))


def test_the_file_holds_what_readme_says(mixed_folder):
    stored = load_file(mixed_folder / WEIGHTS)
    config = json.loads((mixed_folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 5
    name = next(key.removesuffix(".coded_weight") for key in stored if key.endswith(".coded_weight"))
    parts = {key.removeprefix(f"{name}."): tensor.dtype for key, tensor in stored.items() if key.startswith(f"{name}.")}
    assert parts == dict.fromkeys(PACKED, torch.uint8) | {"bias": torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one file", "sharded"])
def test_save_load_save_gives_the_same_bytes(tmp_path, dtype, shard):
    vq4dit.save(new_mixed_pipeline(), tmp_path / "a", max_shard_size=shard)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "a", dtype=dtype)
    pipeline.save_pretrained(tmp_path / "b", max_shard_size=shard)
    a, b = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "transformer").iterdir() if path.name != "config.json"}
        for name in "ab"
    )
    assert a == b and (len(a) > 3) == (shard != "5GB")


@pytest.mark.parametrize(
    "arguments", [{"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_other_ways_of_loading_keep_the_scales(mixed_folder, arguments):
    wanted, found = (packed_layers(load(mixed_folder, **options)) for options in ({}, arguments))
    for name, layer in wanted.items():
        assert torch.equal(found[name].reconstruct(torch.float32), layer.reconstruct(torch.float32))


def test_it_runs_offloaded_to_disk(tmp_path, mixed_folder, one_step_input):
    places = {"pos_embed": "cpu", "transformer_blocks": "disk", "proj_out_1": "cpu", "proj_out_2": "cpu"}
    offloaded = load(mixed_folder, device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(output(offloaded, one_step_input), output(load(mixed_folder), one_step_input))


def test_a_merged_lora_is_not_lost_silently(tmp_path, mixed_folder):
    model = load(mixed_folder)
    packed_layers(model)[coded_name(model)].weight.data += 1
    with pytest.raises(vq4dit.FormatError, match="merged LoRA"):
        model.save_pretrained(tmp_path / "lost")
    vq4dit.set_decode_mode(model, "load")
    model.save_pretrained(tmp_path / "saved")


def test_dequantized_is_an_ordinary_model(mixed_folder, one_step_input):
    model = load(mixed_folder)
    wanted = output(model, one_step_input)
    assert torch.equal(output(vq4dit.dequantize(model), one_step_input), wanted)
    assert not packed_layers(model)


def test_the_layers_table_tells_both_kinds(pipeline, mixed_folder):
    model = load(mixed_folder)
    table = {row.name: row for row in layer_errors(pipeline.transformer, model)}
    assert list(table) == list(packed_layers(model))
    for name, layer in packed_layers(model).items():
        assert table[name].bits_per_weight == layer.bits_per_weight > 0


def test_compiled_equals_eager_in_both_modes(mixed_folder):
    check_compiled_equals_eager(mixed_folder)


# --- broken files ---


def change_tensors(folder: Path, change) -> str:
    """Change the tensors of the first coded layer, by their short names; returns the layer's name."""
    tensors = load_file(folder / WEIGHTS)
    name = next(key.removesuffix(".coded_weight") for key in tensors if key.endswith(".coded_weight"))
    parts = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
    change(parts)
    save_file(
        tensors | {f"{name}.{part}": tensor for part, tensor in parts.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    return name


def as_single_stream(change):
    """The layer as format version 3 has it, and then changed."""

    def changed(tensors) -> None:
        layer = EntropyCodedLinear.from_tensors(dict(tensors), SHAPE_OF_FIRST)
        tensors.pop("coded_weight")
        tensors.update(single_stream(layer))
        change(tensors)

    return changed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("coded_weight"), "weight; the file is incomplete"),
        (lambda t: t.update(coded_weight=t["coded_weight"].half()), "must be of type U8, got F16"),
        (lambda t: t.update(coded_weight=t["coded_weight"][:-1].clone()), "whole 16-bit words"),
        (lambda t: t.update(coded_weight=t["coded_weight"].view(1, -1).clone()), "whole 16-bit words"),
        (lambda t: t.update(coded_weight=t["coded_weight"][:-4].clone()), "coded integers are damaged"),
        (lambda t: t.update(coded_weight=t["coded_weight"] ^ 1), "coded integers are damaged"),
        (as_single_stream(lambda t: t.pop("side_models")), "side_models is missing"),
        (as_single_stream(lambda t: t.pop("coded_integers")), "is missing"),
        (as_single_stream(lambda t: t.update(side_models=t["side_models"][1:].clone())), "side_models must be 4 x 2"),
        (as_single_stream(lambda t: t.update(coded_integers=t["coded_integers"][:-1].clone())), "whole 32-bit words"),
        (as_single_stream(lambda t: t.update(coded_integers=t["coded_integers"][:-4].clone())), "coded integers are damaged"),
        (as_single_stream(lambda t: t.update(side_models=t["side_models"] + 1)), "coded integers are damaged"),
    ],
    ids=[
        "no bytes",
        "type",
        "odd",
        "2-d",
        "short",
        "bits",
        "no models",
        "no stream",
        "few models",
        "odd stream",
        "short stream",
        "models",
    ],
)
@pytest.mark.parametrize("mode", ["load", "forward"])
def test_a_coded_layer_that_does_not_fit_is_refused(broken, change, message, mode):
    name = change_tensors(broken, change)
    with vq4dit.decode_mode(mode), pytest.raises(vq4dit.FormatError, match=f"{name}.*{message}"):
        load(broken)


@pytest.mark.parametrize(
    "version, message",
    [(2, "format version 2 was a draft"), (6, "format version 6, this library reads up to 5: upgrade vq4dit")],
)
def test_other_versions_are_refused(broken, version, message):
    path = broken / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = version
    path.write_text(json.dumps(config))
    with pytest.raises(vq4dit.FormatError, match=message):
        load(broken)


def test_best_writes_format_version_5_and_decodes_what_it_returns(tmp_path):
    quantized = vq4dit.quantize(new_pipeline(), quick_settings(recipe="best"))
    assert all(layer.decoded_weight is not None for layer in packed_layers(quantized.transformer).values())
    vq4dit.save(quantized, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 5
    names = load_file(tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    assert sum(name.endswith(".coded_weight") for name in names) == 14


@pytest.mark.parametrize("change", ["no bytes", "floats", "a byte less", "2-d", "extra"])
def test_tensors_that_are_no_such_layer_are_refused(generator, change):
    tensors = new_coded(8, 16, generator).state_dict()
    if change == "no bytes":
        del tensors["coded_weight"]
    elif change == "floats":
        tensors["coded_weight"] = tensors["coded_weight"].float()
    elif change == "a byte less":
        tensors["coded_weight"] = tensors["coded_weight"][:-1]
    elif change == "2-d":
        tensors["coded_weight"] = tensors["coded_weight"].view(1, -1)
    else:
        tensors["codebook"] = torch.zeros(4, 2)
    with pytest.raises(FormatError):
        EntropyCodedLinear.from_tensors(tensors, (8, 16))


# --- format version 3 ---


def as_version_3(folder: Path) -> None:
    """The same model as it was written before there were lanes."""
    tensors = load_file(folder / WEIGHTS)
    config_path = folder / "transformer" / "config.json"
    config = json.loads(config_path.read_text())
    for name, layer in packed_layers(load(folder)).items():
        if isinstance(layer, EntropyCodedLinear):
            del tensors[f"{name}.coded_weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in single_stream(layer).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config["quantization_config"]["format_version"] = 3
    config_path.write_text(json.dumps(config))


@pytest.mark.parametrize("mode", ["load", "forward"])
def test_a_model_of_version_3_is_the_same_model_and_saved_as_it_is(tmp_path, broken, one_step_input, mode):
    wanted = output(load(broken), one_step_input)
    as_version_3(broken)
    with vq4dit.decode_mode(mode):
        loaded = load(broken)
    kinds = {type(layer) for layer in packed_layers(loaded).values()}
    assert kinds == {VQLinear, SingleStreamLinear} and torch.equal(output(loaded, one_step_input), wanted)
    loaded.save_pretrained(tmp_path / "again")
    saved, before = load_file(tmp_path / "again" / Path(WEIGHTS).name), load_file(broken / WEIGHTS)
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format_version"] == 3
