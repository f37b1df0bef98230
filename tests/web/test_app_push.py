"""Signing in and publishing in a real browser, against the loopback Hub, which is also where people sign in.

The whole way once: sign in, quantize, push, read the card, the model back in a fresh process, sign out; and a login leaves
no trace. Then what can go wrong on that way.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from app_server import HOME, AppServer
from browsing import Visitor, needs_chromium, new_browser  # noqa: F401  fixtures
from playwright.sync_api import expect
from space import OWNER, new_hub, new_place, new_server, set_name, sign_in, token_of, traces_of  # noqa: F401  fixtures

from vq4dit.errors import HubError
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.workspace import Workspace
from vq4dit.web.push_answers import PushAnswers
from vq4dit.web.studio import Studio

pytestmark = [needs_chromium, pytest.mark.slow]

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_sign_in_quantize_push_pull_sign_out(server, place, browser, hub, tmp_path):
    visitor = Visitor(browser, server.url).arrive("?model=assets/emoji-dit&recipe=kmeans&seed=0")
    visitor.see("#scopes", "contribute-repos")
    visitor.see("#who", "Nobody is signed in")
    sign_in(visitor)
    visitor.see("#who", "Signed in as ann.")
    visitor.see("#command", "--recipe kmeans")
    visitor.press("#start")
    visitor.see("#progress .done", "is packed")
    visitor.see("#push-form")
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    assert visitor.page.locator("#push-name textarea, #push-name input").input_value() == "emoji-dit-vq4dit-2bit"
    visitor.see("#push-private", "Public at first: the licence of its base, apache-2.0, allows it.")
    visitor.page.locator("#push-owner input").click()
    expect(visitor.page.get_by_role("option")).to_have_text(
        [re.compile("ann$"), re.compile("acme$")]
    )  # not the museum, where ann only reads
    visitor.page.keyboard.press("Escape")
    visitor.shoot("5-push-form", "#keep-it")

    visitor.press("#push")
    visitor.see("#pushed .done", "ann/emoji-dit-vq4dit-2bit")
    visitor.see("#pushed", "The checksums of")
    assert visitor.page.locator("#pushed a").get_attribute("href") == f"{hub.url}/ann/emoji-dit-vq4dit-2bit"
    visitor.press("#push-compare")
    visitor.see("#pushed", "one image is the same, bit by bit")
    visitor.shoot("5-pushed", "#keep-it")

    repo = hub.repos["ann/emoji-dit-vq4dit-2bit"]
    assert len(repo.commits) == 2 and not repo.private
    card = visitor.context.request.get(f"{hub.url}/ann/emoji-dit-vq4dit-2bit/resolve/main/README.md").text()
    assert "license: apache-2.0" in card and 'from_pretrained("ann/emoji-dit-vq4dit-2bit")' in card
    assert "4 pairs of images" in card and {"samples.png", "report.json"} <= set(repo.head)
    (made,) = place.glob("jobs/*/*/result/emoji-dit-2bit")
    assert pulled_back_is_the_same("ann/emoji-dit-vq4dit-2bit", made, tmp_path)

    token = token_of(hub)
    kept_by_the_page = visitor.page.content() + json.dumps(visitor.context.storage_state()["origins"])
    visitor.press("#login")
    expect(visitor.page.locator("#login")).to_have_text("Sign in with Hugging Face")
    visitor.see("#who", "Nobody is signed in")
    assert not visitor.page.locator("#push-form").is_visible()

    pushed = b"".join(data for files in repo.commits.values() for data in files.values())
    assert len(token) > 30 and token.encode() not in pushed and token not in kept_by_the_page
    assert (place / "jobs.log").stat().st_size and traces_of(token, place) == []
    assert not any(token in request for request in hub.requests)
    assert visitor.errors == []


def pulled_back_is_the_same(repo_id: str, made: Path, home: Path) -> bool:
    """Whether a fresh process, without a login or a cache, draws from the Hub what the visitor's own folder draws."""
    code = (
        "import sys, numpy, torch, vq4dit; from diffusers import DiTPipeline\n"
        "images = [DiTPipeline.from_pretrained(place)([5], num_inference_steps=4, output_type='np', "
        "generator=torch.Generator().manual_seed(3)).images for place in sys.argv[1:]]\n"
        "print('same' if numpy.array_equal(*images) else 'different')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, repo_id, str(made)]
    done = subprocess.run(command, cwd=HOME, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip() == "same"


def test_what_can_go_wrong_is_words_and_nothing_is_overwritten(server, place, browser, hub):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=1")
    sign_in(visitor)
    visitor.press("#start")
    visitor.see("#progress .done", "is packed")
    visitor.see("#push-private", "Private at first: the licence of its base is not known.")
    assert visitor.page.locator("#push-private input").is_checked()

    hub.add_repo("ann/older", {"config.json": b"{}"}, private=True, created_with={"contribute-repos"})
    before = dict(hub.repos["ann/older"].head)
    set_name(visitor, "older")
    visitor.press("#push")
    visitor.see("#pushed .trouble", "This repository exists already")
    visitor.see("#pushed .trouble", "a pull request or a new commit")
    assert hub.repos["ann/older"].head == before
    visitor.page.locator("#push-existing label").nth(1).click()
    visitor.press("#push")
    visitor.see("#pushed .done", "ann/older")
    assert hub.repos["ann/older"].head == before and len(hub.repos["ann/older"].pull_requests) == 1
    visitor.page.locator("#push-existing label").nth(0).click()

    set_name(visitor, "a b")
    visitor.press("#push")
    visitor.see("#pushed .trouble", "This name cannot be used")

    hub.lfs.clear()  # else it has the file already
    hub.fail("PUT /lfs/", slow=3, times=9)
    set_name(visitor, "slow")
    visitor.press("#push")
    visitor.see("#pushed .running", "kB of")
    visitor.press("#push-cancel")
    visitor.see("#pushed .trouble", "The push was cancelled")
    assert WEIGHTS not in hub.repos["ann/slow"].head
    hub.faults.clear()
    visitor.press("#push")
    visitor.see("#pushed .done", "ann/slow")
    assert WEIGHTS in hub.repos["ann/slow"].head and hub.repos["ann/slow"].private

    hub.users[token_of(hub)].expires_at = 0  # revoked
    requests = len(hub.requests)
    set_name(visitor, "late")
    visitor.press("#push")
    visitor.see("#pushed .trouble", "You are not signed in")
    assert "ann/late" not in hub.repos and not any("PUT" in request for request in hub.requests[requests:])
    hub.login.lifetime = 30.0  # ends before an upload could
    visitor.press("#login")
    expect(visitor.page.locator("#login")).to_have_text("Sign in with Hugging Face")
    sign_in(visitor)
    visitor.see("#who .trouble", "The login has expired, or will within a minute.")
    assert traces_of(token_of(hub), place) == [] and "Traceback" not in visitor.page.content()


def test_the_owners_login_is_lent_to_nobody(server, browser, hub):
    hub.users[OWNER] = hub.users[hub.add_user("me")]
    hub.add_repo("me/secret", {"model_index.json": b"{}"}, private=True)
    visitor = Visitor(browser, server.url).arrive("?model=me/secret")
    visitor.see("#card .trouble", "there is no repository me/secret, or it is private")
    visitor.see("#who", "Nobody is signed in")
    assert not visitor.page.locator("#push-form").is_visible()


@pytest.mark.parametrize(
    ("host", "share", "login"), [("127.0.0.1", False, "own"), ("127.0.0.1", True, "none"), ("0.0.0.0", False, "none")]
)
def test_where_strangers_may_come_the_login_of_the_machine_is_not_used(host, share, login, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    whose_login = runpy.run_path(str(HOME / "app.py"))["whose_login"]
    assert whose_login(Namespace(host=host, share=share)) == login
    answers = PushAnswers(Studio(Catalog(HOME), Workspace(tmp_path)), own_login=False)
    with pytest.raises(HubError, match="nobody is signed in"):
        answers.account(None)
    assert "Nobody is signed in" in answers.invite("", "", None, None)[0]


def test_at_home_the_login_of_the_machine_is_used(place, browser, hub):
    token = hub.add_user("bob")
    home = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home-of-bob"), "HF_TOKEN": token}
    with AppServer(place / "at-home", "--root", str(place / "root"), **home) as server:
        visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=1")
        visitor.see("#scopes", "hf auth login")
        assert visitor.page.locator("#login").count() == 0
        visitor.press("#start")
        visitor.see("#who", "Signed in as bob.")
        visitor.press("#push")
        visitor.see("#pushed .done", "bob/tiny-vq4dit-2bit")
    assert traces_of(token, place) == []
