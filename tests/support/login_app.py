"""A page with a login and a push, as on a Space: `python login_app.py PORT FOLDER`; started by `test_hub_login.py`."""

import sys
from pathlib import Path

import gradio as gr

from vq4dit.errors import HubError
from vq4dit.hub.account import look_up_base, sign_in
from vq4dit.hub.model_card import model_card
from vq4dit.hub.push import Target, push
from vq4dit.pipelines.provenance import read_origin

FOLDER = Path(sys.argv[2])


def name(profile: gr.OAuthProfile | None) -> str:
    return profile.username if profile else "nobody"


def publish(repo_id: str, token: gr.OAuthToken | None) -> str:
    if token is None:
        return "sign in first"
    try:
        account = sign_in(token.token, token.expires_at)
        card = model_card(FOLDER, account.repo_id(repo_id), look_up_base(read_origin(FOLDER), account.token))
        pushed = push(FOLDER, Target(repo_id=account.repo_id(repo_id), private=True), account, card=card)
        return f"{pushed.url} {' '.join(account.targets)}"
    except HubError as error:
        return f"{error.reason}: {error}"


with gr.Blocks() as page:
    gr.LoginButton()
    box = gr.Textbox()
    gr.Button().click(publish, box, box, api_name="publish")
    gr.Button().click(name, None, box, api_name="name")

page.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), ssr_mode=False, quiet=True)
