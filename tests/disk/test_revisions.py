"""A name may hold another model tomorrow: whatever is kept by a model's name is kept by its content too."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import new_pipeline

from vq4dit.disk.revisions import content_revision
from vq4dit.errors import JobError
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.workspace import Workspace
from vq4dit.web.answers import Answers
from vq4dit.web.choice import Choice
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.studio import Studio

HOME = Path(__file__).parents[2]
CHOICE = Choice("folder:tiny", 2, "kmeans", 0, "")


@pytest.fixture
def root(tmp_path, model_folder) -> Path:
    shutil.copytree(model_folder, tmp_path / "root" / "tiny")
    return tmp_path / "root"


@pytest.fixture
def studio(root, tmp_path) -> Studio:
    return Studio(Catalog(HOME, root), Workspace(tmp_path / "jobs"))


def train_on(folder: Path) -> None:
    """The same names and sizes, other weights."""
    pipeline = new_pipeline()
    with torch.no_grad():
        for p in pipeline.transformer.parameters():
            p.mul_(0.5)
    pipeline.transformer.save_pretrained(folder / "transformer")


def done(studio: Studio, visitor: str):
    project = studio.begin(visitor, CHOICE)
    studio.line_up(project)
    list(studio.quantize(project))
    assert project.status().phase == "done", project.status()
    return project


# --- the law ---


def change_a_weight(folder):
    train_on(folder)


def change_a_config(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("false", "true", 1))


def change_the_index(folder):
    (folder / "model_index.json").write_text((folder / "model_index.json").read_text().replace("cat", "cow"))


def add_a_shard(folder):
    (folder / "vae" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"x")


def remove_a_file(folder):
    (folder / "vae" / "config.json").unlink()


def touch_a_file(folder):
    path = folder / "vae" / "config.json"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [change_a_weight, change_a_config, change_the_index, add_a_shard, remove_a_file, touch_a_file],
    ids=lambda change: change.__name__,
)
def test_every_change_of_what_is_loaded_gives_another_revision(root, change):
    before = content_revision(root / "tiny")
    assert content_revision(root / "tiny") == before and len(before) == 40
    change(root / "tiny")
    assert content_revision(root / "tiny") != before


def test_what_is_not_loaded_and_where_it_lies_do_not_matter(root):
    before = content_revision(root / "tiny")
    (root / "tiny" / "README.md").write_text("words")
    (root / "tiny" / ".git").mkdir()
    (root / "tiny" / ".git" / "HEAD").write_text("x")
    (root / "tiny" / "vae" / ".DS_Store").write_text("x")
    (root / "tiny").rename(root / "moved")
    assert content_revision(root / "moved") == before


def test_linked_weights_are_looked_through(root, tmp_path):
    weights = root / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    before = content_revision(root / "tiny")
    (tmp_path / "blob").write_bytes((tmp_path / "blob").read_bytes() + b"x")
    assert content_revision(root / "tiny") != before


# --- everywhere ---


def test_a_model_that_was_trained_on_is_another_project_and_never_done_already(studio, root):
    visitor = studio.workspace.visitor(None)
    first = done(studio, visitor)
    assert studio.begin(visitor, CHOICE).key == first.key  # as long as it is the same
    train_on(root / "tiny")
    second = studio.begin(visitor, CHOICE)
    assert second.key != first.key and second.status().phase == "new"
    studio.line_up(second)
    list(studio.quantize(second))
    weights = [(p.result / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for p in (first, second)]
    assert weights[0] != weights[1]


def test_the_page_shows_the_card_of_what_is_there_now(studio, root):
    before = studio.card("folder:tiny")
    assert studio.card("folder:tiny") is before
    new_pipeline(num_layers=3).save_pretrained(root / "tiny")
    after = studio.card("folder:tiny")
    assert (before.inspection.num_blocks, after.inspection.num_blocks) == (2, 3)


def test_a_pipeline_in_memory_is_not_lent_for_what_replaced_it(studio, root):
    visitor = studio.workspace.visitor(None)
    old = studio.begin(visitor, CHOICE)
    kept = studio.loader.original(old)
    assert studio.loader.original(old) is kept
    train_on(root / "tiny")
    with pytest.raises(JobError, match="the files of tiny have changed since this job began.*: press Quantize"):
        studio.loader.original(old)
    fresh = studio.loader.original(studio.begin(visitor, CHOICE))
    weights = [dict(p.transformer.named_parameters())["transformer_blocks.0.ff.net.2.weight"] for p in (kept, fresh)]
    assert torch.allclose(weights[0] * 0.5, weights[1])
    assert len(studio.loader._kept) == 1, "the old one would only fill the memory"


def test_a_result_that_was_made_again_is_loaded_again(studio, quantized_folder):
    visitor = studio.workspace.visitor(None)
    project = done(studio, visitor)
    kept = studio.loader.quantized(project)
    assert studio.loader.quantized(project) is kept
    shutil.rmtree(project.result)
    shutil.copytree(quantized_folder, project.result, copy_function=shutil.copy)
    assert studio.loader.quantized(project) is not kept


def test_a_paused_job_whose_model_changed_says_so_and_pairs_are_not_drawn_with_another(studio, root):
    visitor = studio.workspace.visitor(None)
    project = done(studio, visitor)
    train_on(root / "tiny")
    compare = CompareAnswers(studio)
    compare.begin_drawing(visitor, project.key, 0, [0])
    *_, last = compare.draw(visitor, project.key, 1, [0], 1)
    assert "have changed since this job began" in last[0] and "Press Quantize" in last[0]
    told = Answers(studio).begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "")
    assert told[-2] != project.key


def test_a_repository_is_known_by_its_commit(hub, ann, model_folder):
    files = {str(p.relative_to(model_folder)): p.read_bytes() for p in Path(model_folder).rglob("*") if p.is_file()}
    hub.add_repo("ann/tiny-dit", files)
    catalog = Catalog(HOME)
    before = catalog.revision("ann/tiny-dit", ann.token)
    assert before == catalog.card("ann/tiny-dit", token=ann.token).commit
    hub.repos["ann/tiny-dit"].commit("main", files | {"x.txt": b"x"}, "another")
    assert catalog.revision("ann/tiny-dit", ann.token) != before


def test_projects_of_earlier_versions_have_no_revision_and_go_on(studio, root):
    visitor = studio.workspace.visitor(None)
    old = studio.workspace.open(visitor, "folder:tiny", CHOICE.settings(), "")
    assert Loader(studio.catalog).original(old)
