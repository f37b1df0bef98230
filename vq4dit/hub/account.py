"""Who is signed in at the Hub, where they may publish, and what they may read.

A login is a token: of huggingface_hub's own login in a terminal, of OAuth on a Space. It lives in an `Account` for as long
as somebody needs it; it is never written to a file, and neither `repr` nor an error shows it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from huggingface_hub import HfApi, ModelInfo, get_token

from vq4dit.errors import HubError
from vq4dit.hub.base import Base
from vq4dit.pipelines.hub_errors import ask
from vq4dit.pipelines.provenance import Origin, copied

EXPIRY_MARGIN = 60.0  # seconds a login must still last when something long begins


@dataclass(frozen=True)
class Account:
    """A login that the Hub has just accepted."""

    name: str
    organizations: tuple[str, ...]  # where this login may create models
    token: str = field(repr=False)
    expires_at: float | int | None = None  # seconds since 1970; None if it is not known to end

    @property
    def targets(self) -> tuple[str, ...]:
        """Whose repositories can be pushed to: the own name first."""
        return (self.name, *self.organizations)

    def check(self) -> None:
        """Raise `HubError` if the login has expired, or soon will."""
        if self.expires_at is not None and self.expires_at < time.time() + EXPIRY_MARGIN:
            raise HubError("the login has expired, or will within a minute: sign in again before you upload", "login")

    def repo_id(self, name: str) -> str:
        """ "model" -> "ann/model"; "acme/model" stays.

        Raises:
            HubError: if the login may not publish there.
        """
        owner, _, rest = name.rpartition("/")
        if owner and owner not in self.targets:
            raise HubError(
                f"{self.name} may not publish as {owner}: choose one of {', '.join(self.targets)}, or sign in again and grant "
                f"the organisation {owner}",
                "organization",
            )
        return f"{owner or self.name}/{rest}"


def sign_in(token: str | None = None, expires_at: float | int | None = None) -> Account:
    """Ask the Hub whose token this is.

    Args:
        token: of an OAuth login; None for huggingface_hub's own (`hf auth login`, or the variable HF_TOKEN), but never on a
            Space: that one is its owner's, not the visitor's.
        expires_at: seconds since 1970, as OAuth says.

    Raises:
        HubError: if there is no login, or the Hub does not accept it (any more).
    """
    if token is None and "SPACE_ID" in os.environ:
        raise HubError("nobody is signed in: sign in with your Hugging Face account first", "login")
    token = token or get_token()
    if token is None:
        raise HubError("nobody is signed in: run `hf auth login`, or set HF_TOKEN to a token with write access", "login")
    answer = ask("sign in", lambda: HfApi(token=token).whoami())
    writable = [org["name"] for org in answer.get("orgs", []) if org.get("roleInOrg", "write") != "read"]
    account = Account(answer["name"], tuple(writable), token, expires_at)
    account.check()
    return account


def look_up_base(origin: Origin, token: str | None = None) -> Base:
    """What is known about the base of a quantized model now: licence, and whether it is gated or private.

    A base that this login cannot see (any more) has an unknown licence; that is no error.

    Raises:
        HubError: if the Hub cannot be reached.
    """
    if not origin.model:
        return Base(metadata=copied(origin.metadata))
    try:
        info: ModelInfo = ask(f"look up {origin.model}", lambda: HfApi(token=token).model_info(origin.model), origin.model)
    except HubError as error:
        if error.reason not in ("missing", "gated"):
            raise
        return Base(model=origin.model, revision=origin.revision)
    metadata = copied(info.card_data.to_dict()) if info.card_data else {}
    restricted = "gated" if info.gated else "private" if info.private else ""
    return Base(model=origin.model, revision=origin.revision, metadata=metadata, restricted=restricted)
