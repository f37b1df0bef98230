"""What does not fit is refused before the work, with both numbers; what an allocator refuses is one paragraph."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import new_pipeline

from vq4dit import memory
from vq4dit.cli import quantize as quantize_cli
from vq4dit.cli.main import main
from vq4dit.errors import VQ4DiTError
from vq4dit.memory import available_memory, check_memory, is_out_of_memory
from vq4dit.pipelines.load import load_pipeline


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))


def test_quantizing_is_refused_with_both_numbers(little, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantize_cli, "load_pipeline", lambda *a, **k: pytest.fail("weights were read"))
    assert main(["quantize", model_folder, "--output", str(tmp_path / "out"), "--recipe", "kmeans"]) == 1
    told = capsys.readouterr().err
    assert "takes about 502" in told.replace("\n", " ") or "takes about 50" in told
    assert "10.0 MB are free here: close other programs" in told and not list(tmp_path.iterdir())


def test_loading_is_refused_with_both_numbers(model_folder, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    with pytest.raises(VQ4DiTError, match=r"loading .* takes about 1\.4 MB of memory, and 1\.0 MB are free here: close other"):
        load_pipeline(model_folder)


def test_a_container_has_what_its_group_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 2500\n")
    assert available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 10**6


def test_what_fits_is_not_refused():
    check_memory(1, "nothing")
    with pytest.raises(VQ4DiTError):
        check_memory(10**18, "everything")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_an_allocators_refusal_is_one_paragraph(error, model_folder, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(quantize_cli, "load_pipeline", fail)
    assert main(["quantize", model_folder, "--output", str(tmp_path / "out"), "--recipe", "kmeans"]) == 1
    told = capsys.readouterr().err
    assert "memory is used up" in told and "Traceback" not in told


def test_the_allocators_of_the_cpu_are_known():
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(torchs.value)
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("Unable to allocate"))


def test_a_pipeline_is_loaded_where_there_is_room(model_folder):
    assert type(load_pipeline(model_folder)) is type(new_pipeline())
