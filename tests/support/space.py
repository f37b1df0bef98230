"""The app as on a Space, with the loopback Hub as the place to sign in, to read from and to publish to, for a whole module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from app_server import AppServer
from browsing import Visitor
from hub_environment import PORT
from hub_server import Hub
from playwright.sync_api import expect
from tiny import new_pipeline

SCOPES = "openid profile contribute-repos gated-repos"
OWNER = "hf_" + "o" * 34  # token of the Space's owner, which it must not lend


@pytest.fixture(scope="module", name="hub")
def new_hub() -> Iterator[Hub]:
    with Hub(PORT) as found:
        found.login.orgs = {"acme": "write", "museum": "read"}
        yield found


@pytest.fixture(scope="module", name="place")
def new_place(tmp_path_factory) -> Path:
    """Everything that the server may write to: its workspace, log, cache and temporary files."""
    folder = tmp_path_factory.mktemp("space")
    new_pipeline().save_pretrained(folder / "root" / "tiny")
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module", name="server")
def new_server(place, hub) -> Iterator[AppServer]:
    with AppServer(place / "jobs", "--root", str(place / "root"), **settings(place, hub)) as found:
        yield found


def settings(place: Path, hub: Hub) -> dict[str, str]:
    """The environment of a Space."""
    space = {"SYSTEM": "spaces", "SPACE_ID": "me/demo", "OAUTH_SCOPES": SCOPES, "OPENID_PROVIDER_URL": hub.url}
    space |= {"OAUTH_CLIENT_ID": hub.login.client_id, "OAUTH_CLIENT_SECRET": hub.login.client_secret}
    space |= {"HF_TOKEN": OWNER, "HF_HUB_OFFLINE": "0", "HF_HUB_VERBOSITY": "debug"}
    return space | {"HF_HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "GRADIO_ANALYTICS_ENABLED": "False"}


def sign_in(visitor: Visitor, name: str = "ann") -> None:
    """As people do it: who comes back and is not signed in (a few times in a hundred runs, under load) presses again."""
    signed_in = f"Sign out ({name})"
    visitor.press("#login")
    try:
        expect(visitor.page.locator("#login")).to_have_text(signed_in, timeout=100_000)
    except AssertionError:
        visitor.press("#login")
        expect(visitor.page.locator("#login")).to_have_text(signed_in, timeout=300_000)


def sign_out(visitor: Visitor) -> None:
    visitor.press("#login")
    expect(visitor.page.locator("#login")).to_have_text("Sign in with Hugging Face", timeout=400_000)


def set_name(visitor: Visitor, name: str) -> None:
    visitor.page.locator("#push-name textarea, #push-name input").fill(name)
    visitor.page.locator("#push-name textarea, #push-name input").blur()


def name_of(visitor: Visitor) -> str:
    return visitor.page.locator("#push-name textarea, #push-name input").input_value()


def token_of(hub: Hub) -> str:
    """Of the newest login."""
    return list(hub.users)[-1]


def traces_of(token: str, *folders: Path) -> list[Path]:
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in paths if token.encode() in path.read_bytes()]
