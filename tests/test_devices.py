"""Which device a name means, which one is taken when none is named, and what is said when it is not there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vq4dit import devices
from vq4dit.cli.main import main
from vq4dit.devices import available, describe, exact, resolve
from vq4dit.errors import VQ4DiTError
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.pipeline_cache import Loader


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, and perhaps Apple's."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "taken"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda:0"), (2, True, "cuda:0")]
)
def test_auto_is_cuda_then_mps_then_cpu(machine, cuda, mps, taken):
    machine(cuda, mps)
    assert str(resolve()) == str(resolve("auto")) == taken


def test_every_device_that_is_there_can_be_named(machine):
    machine(2, True)
    assert [str(device) for device in available()] == ["cuda:0", "cuda:1", "mps", "cpu"]
    assert [str(resolve(name)) for name in ("cpu", "mps", "cuda", "cuda:0", "cuda:1")] == [
        "cpu",
        "mps",
        "cuda:0",
        "cuda:0",
        "cuda:1",
    ]


@pytest.mark.parametrize(
    ("wanted", "cuda", "choice"),
    [
        ("cuda", 0, "cpu"),
        ("cuda:256", 1, "cuda:0 or cpu"),
        ("cuda:999", 1, "cuda:0 or cpu"),
        ("cuda:2", 2, "cuda:0 or cuda:1 or cpu"),
        ("mps", 1, "cuda:0 or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(machine, wanted, cuda, choice):
    machine(cuda)
    with pytest.raises(VQ4DiTError, match=f"there is no device {wanted} here.*: choose {choice}, or leave --device out"):
        resolve(wanted)


@pytest.mark.parametrize(
    "wanted",
    ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu:0", "cuda:0 ", "cuda:0007", "cuda:00", "cuda:９", "cuda:" + "9" * 20],
)
def test_what_names_no_device_is_misuse(wanted):
    with pytest.raises(ValueError, match="a device is auto, cpu, cuda"):
        resolve(wanted)


def test_a_gpu_is_told_by_its_name(machine):
    machine(2)
    assert describe(torch.device("cuda:1")) == "cuda:1 (GPU number 1)" and describe(torch.device("cpu")) == "cpu"


def test_values_become_float64_and_keep_what_they_are():
    values = torch.tensor([1.5, -2.25])
    assert exact(values).dtype == torch.float64 and torch.equal(exact(values).float(), values)
    assert devices.exact_device(torch.device("mps")) == torch.device("cpu")
    assert devices.exact_device(torch.device("cuda:1")) == torch.device("cuda:1")


# --- as the commands say it ---


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
@pytest.mark.parametrize("command", ["quantize", "sample", "compare"])
def test_commands_refuse_a_device_that_is_not_there_before_the_work(machine, tmp_path, model_folder, capsys, command, device):
    machine()
    output = tmp_path / "out.png"
    arguments = {
        "quantize": [model_folder, "--output", output],
        "sample": [model_folder, "--labels", "cat", "--output", output],
        "compare": [model_folder, model_folder, "--output", output],
    }[command]
    assert main([command, *map(str, arguments), "--device", device]) == 1
    said = capsys.readouterr()
    assert f"there is no device {device} here" in said.err and "choose cpu" in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and not said.out


@pytest.mark.parametrize("command", ["quantize", "sample", "compare"])
def test_a_name_of_no_device_is_wrong_usage(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "model", "--output", "x.png", "--device", "gpu"])
    assert stopped.value.code == 2 and "must be auto, cpu, cuda, cuda:N or mps, got 'gpu'" in capsys.readouterr().err


def test_the_first_line_says_the_device(tmp_path, model_folder, capsys):
    assert (
        main(
            ["sample", model_folder, "--labels", "cat", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "x.png")]
        )
        == 0
    )
    assert capsys.readouterr().err.splitlines()[0] == "device: cpu"


def test_a_gpu_without_enough_memory_is_told(tmp_path, model_folder, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("vq4dit.cli.sample.sample", full)
    assert main(["sample", model_folder, "--labels", "cat", "--output", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err
    assert "the GPU's memory is used up" in said and "--device cpu" in said and "Traceback" not in said


# --- the app ---


def test_the_app_works_on_the_same_device_as_the_commands(tmp_path, model_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("vq4dit.projects.pipeline_cache.load_pipeline", lambda *_, **__: SimpleNamespace(to=asked.append))
    monkeypatch.setattr("vq4dit.projects.pipeline_cache.resolve", lambda: torch.device("mps"))
    Loader(Catalog(tmp_path, Path(model_folder).parent))._load(model_folder, None)
    assert asked == [torch.device("mps")]
