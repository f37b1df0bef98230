"""What the page says is for its reader: no options of a command, no folders of this machine, still a cause and a next step."""

import ast
import re
import shutil
from pathlib import Path

import gradio as gr
import pytest
from app_server import HOME

from vq4dit.errors import CalibrationDivergedError, FormatError, HubError, JobError, UnsupportedModelError, VQ4DiTError
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.messages import on_page, without_options, without_paths
from vq4dit.projects.worker import failure
from vq4dit.projects.workspace import Workspace
from vq4dit.web.answers import Answers
from vq4dit.web.endpoints import Endpoints
from vq4dit.web.messages import explain
from vq4dit.web.studio import Studio

KINDS = (VQ4DiTError, UnsupportedModelError, FormatError, CalibrationDivergedError, JobError, HubError, ValueError)
PACKAGE = HOME / "vq4dit"
PLACE = " /srv/jobs/0a1b/my-model.safetensors"  # stands where a message has a value
OPTION = re.compile(r"(?<![\w-])--\w")


def text_of(node: ast.expr) -> str | None:
    """A message with `PLACE` for its values, as far as it is written down where it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or PLACE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{text_of(node.left) or PLACE}{text_of(node.right) or PLACE}"
    return None


def messages(folder: Path = PACKAGE) -> list[tuple[str, str, dict[str, str]]]:
    """(class, message, keyword texts) of every exception that is made in the package, or in a folder of it."""
    names = {kind.__name__ for kind in KINDS}
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                page = {k.arg: text for k in node.keywords if k.arg == "page" and (text := text_of(k.value))}
                if (text := text_of(node.args[0])) is not None:
                    found.append((node.func.id, text, page))
    return found


@pytest.mark.parametrize("kind, text, page", messages(), ids=lambda value: str(value)[:60])
def test_no_message_of_the_package_takes_options_or_paths_to_the_page(kind, text, page):
    error = next(found for found in KINDS if found.__name__ == kind)(text, **page)
    told, status = explain(error), failure(error)
    for shown in (told.what, told.why, told.next_step, told.details, status.message, status.next_step, status.details):
        assert not OPTION.search(shown) and "/srv" not in shown and "/jobs" not in shown
    assert len(told.why) > 3 and len(told.next_step) > 3


def test_there_are_many():
    assert len(messages()) > 80


@pytest.mark.parametrize("package", ["recipes", "models", "projects"])  # what a job is made of
def test_no_advice_of_the_package_is_lost_with_the_option_that_it_names(package):
    """What is cut out of a message because it names an option was its remedy: such a message has words for the page."""
    lost = [text for _, text, page in messages(PACKAGE / package) if not page and OPTION.search(text)]
    assert lost == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x has a job: go on with it (--resume) or delete it", "x has a job: go on with it or delete it"),
        ("x is full. Use the same command with --resume; pieces are kept", "x is full; pieces are kept"),
        ("x is not empty: choose another output, or pass --overwrite to replace it", "x is not empty: choose another output"),
        ("x exists. Choose a pull request (--pr) or a commit (--commit)", "x exists. Choose a pull request or a commit"),
        ("nothing of that kind - or -- here", "nothing of that kind - or -- here"),
    ],
)
def test_what_speaks_of_options_is_left_out(text, shown):
    assert without_options(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b/c.json is damaged", "c.json is damaged"),
        ("there is '/a/b c'", "there is 'b c'"),
        ("see file:///a/b.txt, and /x/y/", "see b.txt, and y"),
        (r"C:\Users\ann\m.json is damaged", "m.json is damaged"),
        ("at https://huggingface.co/ann/x/blob or http://127.0.0.1:80/a", "at https://huggingface.co/ann/x/blob or http://127.0.0.1:80/a"),
        ("ann/model, 3 MB/s, and/or, 1/2, transformer/config.json", "ann/model, 3 MB/s, and/or, 1/2, transformer/config.json"),
        (f"{Path.home()}/my models/tiny is gone", "my models/tiny is gone"),
    ],
)  # fmt: skip
def test_paths_become_names_and_addresses_stay(text, shown):
    assert without_paths(text) == shown


def test_a_message_has_its_own_words_for_the_page():
    error = JobError("go on with --resume", page="press Resume")
    assert str(error) == "go on with --resume" and on_page(error) == "press Resume"
    assert on_page(JobError("the same for both")) == "the same for both"
    assert on_page(HubError("x", "rate", 3.0, page="y")) == "y"


# --- the real thing ---


@pytest.fixture
def root(tmp_path, model_folder):
    folder = tmp_path / "a root"
    shutil.copytree(model_folder, folder / "tiny")
    return folder


@pytest.fixture
def answers(tmp_path, root):
    return Answers(Studio(Catalog(HOME, root), Workspace(tmp_path / "jobs")))


def cut_short(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILED = {
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "broken index": lambda folder: (folder / "model_index.json").write_text("{"),
    "broken config": lambda folder: (folder / "transformer" / "config.json").write_text("{"),
    "no config": lambda folder: (folder / "transformer" / "config.json").unlink(),
    "no weights": lambda folder: shutil.rmtree(folder / "transformer"),
    "cut weights": cut_short,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_the_page_names_no_folder_of_the_server(answers, root, tmp_path, spoil):
    spoil(root / "tiny")
    visitor = answers.studio.workspace.visitor(None)
    choice = ("folder:tiny", 2, "kmeans", 0, "", "")
    shown = [answers.look(None, *choice)[0], answers.begin(visitor, 0, None, *choice)[0]]
    endpoints = Endpoints(answers.studio)
    for call in (endpoints.inspect, endpoints.estimate):
        with pytest.raises(gr.Error) as refused:
            call("folder:tiny")
        shown.append(str(refused.value))
    for text in shown:
        assert str(tmp_path) not in text and "a root" not in text and not OPTION.search(text)
    assert all("What to do" in text for text in shown[:2])


def test_closed_folders_are_told_in_the_pages_words(tmp_path):
    answers = Answers(Studio(Catalog(HOME), Workspace(tmp_path / "jobs")))
    told = answers.look(None, "folder:tiny", 2, "best", 0, "")[0]
    assert "--root" not in told and "Pick a model from the list" in told


def test_what_nobody_foresaw_names_no_folder_either(tmp_path):
    try:
        raise RuntimeError(f"cannot open {tmp_path}/x.json")
    except RuntimeError as error:
        told = explain(error)
    assert "x.json" in told.details and str(tmp_path) not in told.details and str(HOME) not in told.details
