"""What the tests of the Hub side share: the loopback Hub with quick retries, a signed-in user, one way to publish."""

from types import SimpleNamespace

import pytest
from hub_environment import PORT
from hub_server import Hub
from huggingface_hub import close_session, constants

from vq4dit.hub import push as hub_module
from vq4dit.hub.account import Account, look_up_base, sign_in
from vq4dit.hub.model_card import model_card
from vq4dit.hub.push import Pushed, Target, push
from vq4dit.pipelines import hub_errors
from vq4dit.pipelines.provenance import read_origin


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    impatient = SimpleNamespace(sleep=lambda seconds: None)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", impatient)
    for module in (hub_module, hub_errors):
        monkeypatch.setattr(module, "WAITS", (0.0, 0.0, 0.0))
    with Hub(PORT) as server:
        yield server
    close_session()  # its connections belong to this server


@pytest.fixture
def ann(hub) -> Account:
    return sign_in(hub.add_user("ann", orgs=["acme"]))


def publish(folder, account, repo_id="ann/tiny", private=False, existing="refuse", **more) -> Pushed:
    card = model_card(folder, repo_id, look_up_base(read_origin(folder), account.token))
    return push(folder, Target(repo_id=repo_id, private=private, existing=existing), account, card=card, **more)
