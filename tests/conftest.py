"""Tiny real models, seeded, shared by all tests. Nothing here needs a network or a GPU."""

import hub_environment  # noqa: F401  sets the environment, so it comes first
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from hub_fixtures import ann, hub  # noqa: F401  fixtures
from tiny import new_pipeline, new_transformer

import vq4dit
from vq4dit.projects.work_queue import WorkQueue


@pytest.fixture(autouse=True)
def no_work_goes_on(monkeypatch):
    """What a test leaves to the thread of a queue ends with it.

    It would load models beside the next test, and accelerate does that by changing `nn.Module` for all threads.
    """
    begun = []
    put = WorkQueue.put
    monkeypatch.setattr(WorkQueue, "put", lambda queue, task: begun.append((queue, task.project)) or put(queue, task))
    yield
    for queue, project in begun:
        entry = queue.find(project)
        if entry is not None and not queue.drop(project):
            project.ask_to_stop()
            assert entry.over.wait(120), "a task does not hear that it shall stop"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def transformer() -> DiTTransformer2DModel:
    return new_transformer()


@pytest.fixture
def pipeline() -> DiTPipeline:
    return new_pipeline()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """The tiny pipeline as a folder, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    new_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory):
    """The tiny pipeline at 2 bits by k-means, saved."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-2bit"
    vq4dit.save(vq4dit.quantize(new_pipeline(), vq4dit.QuantizationSettings(recipe="kmeans")), folder)
    return folder


@pytest.fixture
def one_step_input():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return {"hidden_states": latents, "timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([0, 1000])}
