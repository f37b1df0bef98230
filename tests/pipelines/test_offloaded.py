"""What is somewhere else (on a disk, on another device) is brought back, decoded where there is room, or asked for."""

import accelerate
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.pipelines import decode_modes
from vq4dit.pipelines.decode_modes import Room, packed_layers

PLACES = {"pos_embed": "cpu", "transformer_blocks.0": "cpu", "transformer_blocks.1": "cpu", "proj_out_1": "cpu"}
PLACES |= {"proj_out_2": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("offloaded") / "tiny"
    vq4dit.save(vq4dit.quantize(new_pipeline(), quick_settings(recipe="kmeans")), target)
    return str(target)


def load(folder, **arguments) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", **arguments).eval()


@torch.no_grad()
def output(model, arguments):
    return model(**arguments).sample


OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("mode", ["load", "forward"])
def test_an_offloaded_model_computes_and_is_not_saved_before_it_is_back(tmp_path, folder, one_step_input, offload, mode):
    model = load(folder)
    vq4dit.set_decode_mode(model, mode)
    wanted = output(model, one_step_input)
    offload(model, tmp_path / "offloaded")
    assert torch.equal(output(model, one_step_input), wanted)
    for work in (lambda: model.save_pretrained(tmp_path / "out"), lambda: vq4dit.dequantize(model)):
        with pytest.raises(vq4dit.FormatError, match="is not in memory.*remove_hook_from_submodules|load the model again"):
            work()
    assert not (tmp_path / "out").exists()
    accelerate.hooks.remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path / "out"), one_step_input), wanted)


def test_an_offloaded_pipeline_says_what_brings_it_back(tmp_path, folder):
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(vq4dit.FormatError, match="is not in memory.*pipeline.remove_all_hooks"):
        vq4dit.save(pipeline, tmp_path / "out")
    pipeline.remove_all_hooks()
    vq4dit.save(pipeline, tmp_path / "out")


@pytest.mark.parametrize("away", ["transformer_blocks.0", "transformer_blocks.1"])
def test_blocks_that_share_an_embedder_may_lie_in_different_places(tmp_path, folder, one_step_input, away):
    wanted = output(load(folder), one_step_input)
    model = load(folder, device_map=PLACES | {away: "disk"}, offload_folder=str(tmp_path / "offloaded"))
    assert torch.equal(output(model, one_step_input), wanted)


def test_a_model_in_one_place_still_shares_its_embedders(folder):
    first, second = load(folder, device_map="cpu").transformer_blocks
    assert first.norm1.emb is second.norm1.emb


# --- where there is room ---


@pytest.fixture
def free(monkeypatch) -> dict[str, int]:
    """Bytes that are free on each device."""
    found = {"cpu": 10**9, "cuda": 10**9}
    monkeypatch.setattr(decode_modes, "available_memory", lambda device: found[torch.device(device).type])
    return found


def test_room_is_asked_for_once_at_each_place(folder, free):
    room = Room(packed_layers(load(folder)).values())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert room.suffices(cpu)
    free["cpu"] = 0  # it is taken by the first layers
    assert room.suffices(cpu)
    free["cuda"] = 1000
    assert not room.suffices(cuda) and not room.suffices(cpu)


@pytest.mark.parametrize("there", [True, False], ids=["room there", "no room there"])
@pytest.mark.parametrize("here", [True, False], ids=["room here", "no room here"])
@pytest.mark.parametrize("mode", ["auto", "load", "forward"])
def test_auto_decodes_by_the_memory_of_the_device_where_the_weights_come(
    folder, free, one_step_input, mode, here, there, monkeypatch
):
    """The other device is played by the CPU: only where it is asked for its memory is it another one."""
    free["cpu"], free["cuda"] = 10**9 * here, 10**9 * there
    model = load(folder)
    wanted = output(model, one_step_input)
    vq4dit.set_decode_mode(model, mode)
    decoded = {"auto": here, "load": True, "forward": False}[mode]
    assert {layer.decoded_weight is not None for layer in packed_layers(model).values()} == {decoded}
    for layer in packed_layers(model).values():
        finds_room = type(layer)._finds_room
        monkeypatch.setattr(type(layer), "_finds_room", lambda self, _, find=finds_room: find(self, torch.device("cuda")))
        break
    model.to("cpu")
    decoded = there if mode == "auto" else decoded
    assert {layer.decoded_weight is not None for layer in packed_layers(model).values()} == {decoded}
    assert torch.equal(output(model, one_step_input), wanted)


@pytest.mark.cuda
def test_auto_decodes_on_a_gpu(folder, free, one_step_input):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    free["cpu"] = 0
    model = load(folder)
    assert {layer.decoded_weight is None for layer in packed_layers(model).values()} == {True}
    model.to("cuda")
    assert {layer.decoded_weight.device.type for layer in packed_layers(model).values()} == {"cuda"}


def test_what_is_merged_stays_where_there_is_no_room(folder, free):
    model = load(folder)
    layer = model.transformer_blocks[0].attn1.to_q
    layer.weight.data += 1
    free["cpu"] = 0
    layer.room = Room([layer])
    layer.to("cpu")
    assert layer.is_changed
