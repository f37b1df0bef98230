"""What strangers wrote is shown and never obeyed, at the terminal and on the page."""

import io
import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from vq4dit.cli.main import main
from vq4dit.cli.terminal import Console
from vq4dit.printable import printable
from vq4dit.progress import Event
from vq4dit.projects.drawn_pairs import Pair
from vq4dit.web import charts, html, pictures
from vq4dit.web.messages import Trouble, escape

PACKAGE = Path(__file__).parents[1] / "vq4dit"
NASTY = "a\x1b]52;c;aGk=\x07\x1b[2J\x9b31mb\u202egpj\u2066x\u200e\x00\x08\r\udce9\u2028c"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800-\udfff]")


def test_what_would_be_obeyed_is_shown_by_its_code():
    assert printable("a\x1b[31mb\u202ec\x9bd\x7f") == "a\\x1b[31mb\\u202ec\\x9bd\\x7f"
    assert not STEERS.search(printable(NASTY)) and printable(NASTY).encode()


def test_every_character_of_unicode_is_harmless_afterwards():
    everything = "".join(chr(c) for c in range(0x110000))
    found = {unicodedata.category(c) for c in set(printable(everything)) - set("\n\u200c\u200d")}
    assert not found & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("text", ["", "plain", "ö é ж 猫 🚀 ‖W − Ŵ‖²", "two\nlines", "नमस्ते\u200dक", "👩\u200d🚀"])
def test_ordinary_text_stays_as_it_is(text):
    assert printable(text) == text and printable(printable(NASTY)) == printable(NASTY)


# --- the terminal ---


def shown(*things, **settings) -> str:
    file = io.StringIO()
    console = Console(file=file, width=200, **settings)
    for thing in things:
        console.print(thing)
    return file.getvalue()


@pytest.mark.parametrize("colours", [False, True])
def test_nothing_that_steers_reaches_the_terminal_but_our_own_colours(colours):
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    text = shown(NASTY, f"[bold]{NASTY.replace('[', '')}[/]", table, force_terminal=colours)
    assert not STEERS.search(re.sub("\x1b\\[[0-9;]*m", "", text)) and "\\x1b" in text


def test_bars_are_watched_too():
    file = io.StringIO()
    with Progress(console=Console(file=file, force_terminal=True, width=200)) as bars:
        bars.add_task(NASTY.replace("[", ""), total=1)
    own = "\x1b\\[[0-9;?]*[a-zA-Z]"
    assert not STEERS.search(re.sub(own, "", file.getvalue()).replace("\r", "")) and "\\x1b" in file.getvalue()


def test_no_command_has_another_door():
    for path in PACKAGE.glob("*.py"):
        assert path.name == "terminal.py" or not re.search(r"rich\.console|import rich\b", path.read_text()), path.name


def test_every_commands_words_are_harmless(tmp_path, model_folder, capsys):
    """Labels, classes and files of strangers, in errors, tables and usage."""
    model = Path(shutil.copytree(model_folder, tmp_path / NASTY.replace("\x00", "").replace("\udce9", "")))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": NASTY, "1": "dog"}}))
    assert main(["inspect", str(model)]) == 0
    picture = tmp_path / "\x1b[31m.png"
    assert main(["sample", str(model), "--labels", "1", "--steps", "1", "--output", str(picture)]) == 0
    assert main(["sample", str(model), "--labels", "\x1b[2Jwhale", "--output", str(picture)]) == 1
    assert main(["inspect", str(model / "\x1bnowhere")]) == 1
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": NASTY}))
    assert main(["inspect", str(model)]) == 1
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": NASTY}))
    assert main(["quantize", str(model), "--output", str(tmp_path / "q")]) == 1
    with pytest.raises(SystemExit):
        main(["inspect", str(model), "\x1b[2Jmore"])
    captured = capsys.readouterr()
    assert not STEERS.search(captured.out) and not STEERS.search(captured.err.replace("\r", ""))
    assert "\\x1b" in captured.out and "\\x1b" in captured.err


# --- the page ---


class Texts(HTMLParser):
    """All that a browser would show, or read out."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.tags = "", set()
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.found += data

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.found += "".join(value or "" for _, value in attributes)


def test_the_pages_html_is_harmless():
    nasty = NASTY + "<script>x</script>\"'>"
    layer = {"name": nasty, "rows": 1, "columns": 2, "bits_per_weight": 2.0, "relative_error": 0.1}
    event = Event(nasty, 1, 2, 0.1, {nasty: 1.0}, nasty)
    for page in (
        escape(nasty),
        html.trouble(Trouble(nasty, nasty, nasty, nasty)),
        html.log([event]),
        html.layers_table([layer]),
        charts.chart([layer], 1, [event, event]),
        html.note(nasty),
        html.welcome(nasty, nasty),
        html.load_snippet(nasty),
    ):
        read = Texts(page)
        assert not STEERS.search(read.found) and "script" not in read.tags
    assert pictures.figures(None, [Pair(0, nasty, 0, 1.0, 1.0, "x", 1.0, 1.0)])
