"""What the page says about signing in and publishing, as HTML."""

from __future__ import annotations

from vq4dit.hub.push import Pushed
from vq4dit.progress import Progress
from vq4dit.web.html import empty, note
from vq4dit.web.messages import duration, escape, size

SCOPES = {
    "contribute-repos": "it may create repositories for you and change only those it made itself",
    "gated-repos": "it may read the gated models that you have access to",
}


def heading() -> str:
    return (
        '<div class="hub-heading"><h3>Push to the Hub</h3><p class="note">The packed model in your own account, with a card '
        "that says how it was made and what was measured.</p></div>"
    )


def scopes() -> str:
    """What a login through this page permits."""
    rows = "".join(f"<li><code>{name}</code>: {meaning}</li>" for name, meaning in SCOPES.items())
    return f'<div class="scopes"><p>Signing in lets this app do two things, until you sign out:</p><ul>{rows}</ul></div>'


def own_login() -> str:
    return (
        '<p class="note">Here the login of this machine is used. If there is none: run <code>hf auth login</code> in a '
        "terminal with a token that may write, then reload this page.</p>"
    )


def no_login() -> str:
    return (
        '<p class="note">This page can be reached from other machines, so it lends nobody its owner\'s login. Download the '
        "model and publish it with <code>python -m vq4dit push</code>.</p>"
    )


def signed_out() -> str:
    return empty("Nobody is signed in. The download above needs no login.")


def nothing_yet(name: str) -> str:
    return (signed_in(name) if name else "") + empty("When a model is packed, it can be published here.")


def signed_in(name: str) -> str:
    return note(f"Signed in as {name}.")


def sending(progress: Progress) -> str:
    """How far a push came."""
    share = progress.done / max(1, progress.total)
    if seconds := progress.metrics.get("wait_seconds"):
        told = f"The Hub asks to wait; going on in {duration(seconds)}"
    elif progress.done >= progress.total > 1:
        told = "Everything is stored; making it visible and comparing checksums"
    else:
        told = f"{size(progress.done)} of {size(progress.total)}" if progress.total > 1 else "Looking at the repository"
    return (
        f'<div class="progress running"><p role="status"><span class="pill">Pushing</span> {told}</p>'
        f'<div class="bar" role="progressbar" aria-label="Pushing: {told}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div></div>'
    )


def published(pushed: Pushed | None) -> str:
    """Where it is, and how much of it was verified; nothing if it was never pushed."""
    if pushed is None:
        return ""
    url, shown = escape(pushed.url), "private" if pushed.private else "public"
    state = "It was there already; nothing was sent." if pushed.was_there else f"{size(pushed.num_bytes)} in one commit."
    return (
        f'<div class="progress done"><p role="status"><span class="pill">Published</span> <a href="{url}" target="_blank" '
        f'rel="noopener">{escape(pushed.repo_id)}</a> ({shown})</p></div>'
        + note(f"{state} The checksums of {pushed.num_files} files agree with the Hub's.")
    )


def compared(same: bool) -> str:
    """The answer of the download check."""
    if same:
        return note("Downloaded again and loaded: one image is the same, bit by bit.")
    return (
        '<div class="trouble" role="alert"><strong>The downloaded model draws another image</strong><p>Its checksums agree, '
        'so it was loaded differently.</p><p class="next"><b>What to do:</b> Tell the authors of vq4dit.</p></div>'
    )
