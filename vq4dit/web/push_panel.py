"""The part of the page that signs in and publishes."""

from __future__ import annotations

import json
from typing import Any, Literal

import gradio as gr

from vq4dit.web import push_html
from vq4dit.web.push_answers import PushAnswers
from vq4dit.web.studio import Studio

# Whose login publishes: the visitor's, by OAuth; this machine's own, if nobody else can reach the page; or nobody's.
Login = Literal["oauth", "own", "none"]
IF_IT_EXISTS = [
    ("tell me, so that I choose a new name", "refuse"),
    ("open a pull request", "pull-request"),
    ("add a commit", "commit"),
]
FORM = ["owner", "name", "private", "existing"]  # as they are called in the link
# Signing in leaves the page, so all that is chosen on it goes along as its link; what the page does not know (yet) stays as
# the old link has it. Quoted, because Gradio's button appends the link to another address as it is.
TAKE_ALONG = """(...values) => {
    const search = location.search.slice(1), query = new URLSearchParams();
    const asked = new URLSearchParams(search), quoted = new URLSearchParams([...asked.keys()].join('&'));
    const link = asked.has('model') ? asked : quoted;
    const arrived = document.querySelector('#card .card, #card .trouble'), filled = values[NAMES.indexOf('name')];
    NAMES.forEach((name, i) => {
        const known = FORM.includes(name) ? filled : arrived;
        const value = known ? [values[i]].flat().join(' ') : link.get(name);
        if (value) query.set(name, value);
    });
    history.replaceState(null, '', '?' + encodeURIComponent(query));
}"""


class PushPanel:
    """The components, inside the page's last step, and their wiring."""

    def __init__(self, studio: Studio, login: Login):
        self.answers = PushAnswers(studio, own_login=login == "own")
        self.login_button: gr.LoginButton | None = None
        with gr.Column(elem_id="hub"):
            gr.HTML(push_html.heading())
            if login == "oauth":
                gr.HTML(push_html.scopes(), elem_id="scopes")
                self.login_button = gr.LoginButton("Sign in with Hugging Face", "Sign out ({})", elem_id="login")
            else:
                gr.HTML(push_html.own_login() if login == "own" else push_html.no_login(), elem_id="scopes")
            self.who = gr.HTML(elem_id="who")
            with gr.Column(visible=False, elem_id="push-form") as self.form:
                self._form()
            self.told = gr.HTML(elem_id="pushed")

    def _form(self) -> None:
        with gr.Row():
            self.owner = gr.Dropdown([], label="Account or organisation", elem_id="push-owner", scale=2)
            self.name = gr.Textbox(label="Repository name", max_lines=1, elem_id="push-name", scale=3)
        self.private = gr.Checkbox(True, label="Private: only the account can see it", elem_id="push-private")
        self.existing = gr.Radio(
            IF_IT_EXISTS, value="refuse", label="If that repository has other content", elem_id="push-existing"
        )
        with gr.Row(elem_classes="buttons"):
            self.push = gr.Button("Push to the Hub", variant="primary", elem_id="push")
            self.cancel = gr.Button("Cancel", visible=False, elem_id="push-cancel")
            self.compare = gr.Button("Download again and compare", visible=False, elem_id="push-compare")

    def wire(self, job: list, settings: dict[str, Any], arrived: Any, occasions: list[Any]) -> None:
        """Look who is there and what is finished, on arrival and on the `occasions`, and answer the buttons.

        Args:
            settings: components whose values shall survive the way to the login, by their name in the link.
        """
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        answers = self.answers
        form = [self.who, self.form, self.owner, self.name, self.private, self.told, self.compare]
        arrived.then(answers.welcome_back, job, [*form, self.existing], **hidden)
        for event in occasions:
            event.then(answers.invite, job, form, **hidden)
        if self.login_button:
            along = settings | dict(zip(FORM, (self.owner, self.name, self.private, self.existing), strict=True))
            take_along = TAKE_ALONG.replace("NAMES", json.dumps(list(along))).replace("FORM", json.dumps(FORM))
            self.login_button.click(None, list(along.values()), js=take_along)
        chosen = [*job, self.owner, self.name, self.private, self.existing]
        buttons = [self.told, self.push, self.cancel, self.compare]
        self.push.click(answers.push, chosen, buttons, concurrency_id="push", concurrency_limit=4, **hidden)
        self.cancel.click(answers.cancel, job, [self.told], queue=False, **hidden)
        self.compare.click(answers.compare, job, [self.told], concurrency_id="gpu", concurrency_limit=1, **hidden)
