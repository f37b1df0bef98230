"""The event handlers of signing in and publishing.

Gradio hands a visitor's login over by the type of an argument; it is used for that one answer and kept nowhere. Without
one, the machine's own login is used, but only if nobody else can reach the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import gradio as gr
from huggingface_hub import get_token

from vq4dit.errors import HubError
from vq4dit.hub.account import Account, sign_in
from vq4dit.hub.push import Existing, Target
from vq4dit.projects.project import Project
from vq4dit.projects.publish import offer, publish, pushed_of
from vq4dit.web import html, push_html
from vq4dit.web.links import asked
from vq4dit.web.messages import explain
from vq4dit.web.studio import Studio


class PushAnswers:
    """One method per event; whatever fails becomes words on the page."""

    def __init__(self, studio: Studio, own_login: bool):
        self.studio, self.own_login = studio, own_login

    def account(self, token: gr.OAuthToken | None) -> Account:
        """Who asks.

        Raises:
            HubError: if nobody is signed in, or the login has expired.
        """
        if token is not None:
            return sign_in(token.token, token.expires_at)
        if not self.own_login:
            raise HubError("nobody is signed in, or the login has expired: sign in with your Hugging Face account", "login")
        return sign_in()

    def invite(self, key: str, project_key: str, profile: gr.OAuthProfile | None, token: gr.OAuthToken | None) -> tuple:
        """What can be published now, by whom, and as what."""
        return self._invite(key, project_key, profile, token, {})

    def welcome_back(
        self,
        key: str,
        project_key: str,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        token: gr.OAuthToken | None,
    ) -> tuple:
        """On arrival: the form as its link has it, because signing in and out leaves the page."""
        query = asked(request)
        existing = query.get("existing")
        kept = existing if existing in get_args(Existing) else gr.skip()
        return *self._invite(key, project_key, profile, token, query), kept

    def _invite(
        self,
        key: str,
        project_key: str,
        profile: gr.OAuthProfile | None,
        token: gr.OAuthToken | None,
        asked: Mapping[str, str],
    ) -> tuple:
        if token is None and not (self.own_login and get_token()):
            return hidden(push_html.signed_out())
        project = self.finished(key, project_key)
        if project is None:
            return hidden(push_html.nothing_yet(profile.username if profile else ""))
        try:
            return offered(project, self.account(token), asked)
        except Exception as error:
            return hidden(html.trouble(explain(error)))

    def finished(self, key: str, project_key: str) -> Project | None:
        project = self.studio.found(key, project_key)
        return project if project and project.status().phase == "done" else None

    def push(
        self, key: str, project_key: str, owner: str, name: str, private: bool, existing: Any, token: gr.OAuthToken | None
    ) -> Iterator[tuple]:
        """Streamed; the same again after any failure goes on."""
        try:
            yield html.note("Signing in …"), *busy()
            project, account = self.studio.project(key, project_key), self.account(token)
            target = Target(repo_id=account.repo_id(f"{owner}/{name.strip()}"), private=bool(private), existing=existing)
            for progress in publish(project, self.studio.workspace.projects(key), target, account):
                yield push_html.sending(progress), *busy()
            yield push_html.published(pushed_of(project)), *idle(True)
        except Exception as error:
            yield html.trouble(explain(error)), *idle(False)

    def cancel(self, key: str, project_key: str) -> str:
        if (project := self.studio.found(key, project_key)) is not None:
            project.ask_to_stop()
        return html.note("Cancelling …")

    def compare(self, key: str, project_key: str, token: gr.OAuthToken | None) -> Iterator[str]:
        """Download it again, load it, draw one image."""
        try:
            project, account = self.studio.project(key, project_key), self.account(token)
            told = push_html.published(pushed_of(project))
            for is_same in self.studio.check_download(project, account):
                doing = html.note("Downloading it again, and drawing one image with each …")
                yield told + (doing if is_same is None else push_html.compared(is_same))
        except Exception as error:
            yield html.trouble(explain(error))


def hidden(told: str) -> tuple:
    """The step when nothing can be published: a word on why, no form, and no news of another project."""
    return told, gr.Column(visible=False), *(gr.skip(),) * 3, "", gr.Button(visible=False)


def offered(project: Project, account: Account, asked: Mapping[str, str]) -> tuple:
    """The step when something can: as the link asks, if it is about this model, else as we suggest."""
    found, pushed = offer(project, account), pushed_of(project)
    if (asked.get("model"), asked.get("bits")) != (project.model, str(project.settings.bits)) or not asked.get("name"):
        asked = {}
    owner = asked.get("owner")
    targets = gr.Dropdown(choices=list(found.targets), value=owner if owner in found.targets else found.targets[0])
    private = gr.Checkbox(
        value=found.private or asked.get("private") == "true",  # no link makes public what we suggest to keep private
        info=f"{'Private' if found.private else 'Public'} at first: {found.reason}.",
    )
    name = asked.get("name", found.name)[:96]
    told, state = push_html.signed_in(account.name), push_html.published(pushed)
    return told, gr.Column(visible=True), targets, name, private, state, gr.Button(visible=pushed is not None)


def busy() -> tuple:
    """Push, cancel and compare while a push goes on."""
    return gr.Button(visible=False), gr.Button(visible=True), gr.Button(visible=False)


def idle(published: bool) -> tuple:
    return gr.Button(visible=True), gr.Button(visible=False), gr.Button(visible=published)
