"""Copied or referenced, in a real browser, of a model on the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import Visitor, needs_chromium, new_browser  # noqa: F401  fixtures
from playwright.sync_api import expect
from referring import contents, index_of
from space import new_hub, new_place, new_server  # noqa: F401  fixtures

from vq4dit.pipelines.references import KEY

pytestmark = [needs_chromium, pytest.mark.slow]


def test_a_link_by_reference_is_quantized_drawn_and_downloaded_and_is_nothing_for_a_bundled_model(
    server, browser, hub, model_folder, tmp_path
):
    hub.add_repo("corp/tiny", contents(Path(model_folder)))
    visitor = Visitor(browser, server.url).arrive("?model=corp/tiny&recipe=kmeans")
    visitor.open("#advanced-box")
    fetched, copied = (visitor.page.locator("#components label").filter(has_text=words) for words in ("fetched", "copied"))
    expect(fetched.locator("input")).to_be_enabled()
    fetched.click()
    visitor.see("#command", "--components reference")
    visitor.arrive("?model=corp/tiny&recipe=kmeans&components=reference")
    visitor.see("#command", "--components reference")
    visitor.press("#start")
    visitor.see("#progress .done", "is packed")
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    folder = visitor.download(tmp_path)
    visitor.see("#kept", "load_pipeline")
    assert index_of(folder)[KEY]["model"] == "corp/tiny" and not (folder / "vae").exists()
    visitor.arrive("?model=assets/emoji-dit&components=reference")
    visitor.see("#command", "assets/emoji-dit")
    assert "--components" not in visitor.text("#command")
    visitor.open("#advanced-box")
    expect(fetched.locator("input")).to_be_disabled()
    expect(copied.locator("input")).to_be_checked()
    assert visitor.errors == []
