"""The OpenID provider of the loopback Hub: authorization code flow, consent given at once, ID tokens signed with RS256.

GET  /.well-known/openid-configuration     where everything is
GET  /oauth/authorize                      redirects back with a code
POST /oauth/token                          code -> access token (a user of the Hub) and ID token
GET  /oauth/userinfo, /oauth/jwks
"""

from __future__ import annotations

import base64
import secrets
import time
from urllib.parse import parse_qs, urlencode

from joserfc import jwk, jwt

PATHS = {
    "authorization_endpoint": "/oauth/authorize",
    "token_endpoint": "/oauth/token",
    "userinfo_endpoint": "/oauth/userinfo",
    "jwks_uri": "/oauth/jwks",
}


class Provider:
    """Whoever comes is `user_name`; set `lifetime` for logins that expire."""

    def __init__(self, hub):
        self.hub = hub
        self.client_id, self.client_secret = "client-of-the-space", "secret-of-the-space"
        self.user_name, self.orgs, self.lifetime = "ann", {"acme": "write"}, 3600.0
        self.codes: dict[str, dict] = {}
        self.key = jwk.RSAKey.generate_key(2048, parameters={"kid": "loopback", "alg": "RS256"})

    def serve(self, request, path: str) -> bool:
        """Answer the request if it is one of ours."""
        if path == "/.well-known/openid-configuration":
            about = {"issuer": self.hub.url, "response_types_supported": ["code"], "subject_types_supported": ["public"]}
            urls = {name: self.hub.url + place for name, place in PATHS.items()}
            request.answer({**about, **urls, "id_token_signing_alg_values_supported": ["RS256"]})
        elif path == PATHS["authorization_endpoint"]:
            self.authorize(request)
        elif path == PATHS["token_endpoint"]:
            self.token(request)
        elif path == PATHS["userinfo_endpoint"]:
            request.answer(self.claims(request.user().name))
        elif path == PATHS["jwks_uri"]:
            request.answer({"keys": [self.key.as_dict(private=False)]})
        else:
            return False
        return True

    def authorize(self, request) -> None:
        query = request.query
        if query.get("client_id") != self.client_id:
            return request.answer({"error": "unauthorized_client"}, 400)
        code = secrets.token_hex(8)
        self.codes[code] = query
        back = query["redirect_uri"] + ("&" if "?" in query["redirect_uri"] else "?")
        request.answer({}, 302, Location=back + urlencode({"code": code, "state": query.get("state", "")}))

    def token(self, request) -> None:
        form = {key: values[0] for key, values in parse_qs(request.body.decode()).items()}
        basic = request.headers.get("Authorization", "").removeprefix("Basic ")
        given = base64.b64decode(basic).decode() if basic else f"{form.get('client_id')}:{form.get('client_secret')}"
        asked = self.codes.pop(form.get("code", ""), None)
        if given != f"{self.client_id}:{self.client_secret}" or asked is None:
            return request.answer({"error": "invalid_grant"}, 400)
        access = self.hub.add_user(self.user_name, self.orgs, asked["scope"].split(), self.lifetime)
        now = int(time.time())
        claims = {**self.claims(self.user_name), "iss": self.hub.url, "aud": self.client_id, "iat": now, "exp": now + 600}
        if "nonce" in asked:
            claims["nonce"] = asked["nonce"]
        signed = jwt.encode({"alg": "RS256", "kid": "loopback"}, claims, self.key)
        answer = {"access_token": access, "token_type": "bearer", "id_token": signed, "scope": asked["scope"]}
        request.answer({**answer, "expires_in": int(self.lifetime)})

    def claims(self, name: str) -> dict:
        about = {"sub": f"id-of-{name}", "name": name.title(), "preferred_username": name}
        return {**about, "profile": f"{self.hub.url}/{name}", "picture": f"{self.hub.url}/{name}.png"}
