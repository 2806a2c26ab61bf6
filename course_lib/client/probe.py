"""Does a Tinker server answer there, to this key? Asked once, with a time limit.

The SDK itself repeats a failing first call for minutes without a word; so we ask before it does.
"""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from course_lib.errors import CourseError

TIMEOUT_S = 8.0  # for everything: name look-up, connection, answers
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in LOOPBACK


def bypass_proxies() -> None:
    """Let calls to this machine go past HTTP_PROXY, which would swallow them."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        missing = [host for host in LOOPBACK if host not in hosts]
        os.environ[name] = ",".join(hosts + missing)
    if find_spec("socksio") is None:  # httpx can use no such proxy, and fails at the sight of one
        for name, value in list(os.environ.items()):
            if name.lower().endswith("_proxy") and value.lower().startswith("socks"):
                del os.environ[name]


def proxy_before(url: str) -> str | None:
    """The variable whose proxy the calls to `url` go through, if any; its value may hold a key."""
    parts, proxies = urlsplit(url), getproxies()
    names = [name for name in (parts.scheme, "all") if proxies.get(name)]
    if not names or is_loopback(url) or proxy_bypass(parts.netloc):
        return None
    return f"{names[0].upper()}_PROXY"


def probe(
    url: str, api_key: str, sdk_version: str, *, hosted: bool = False
) -> list[dict[str, Any]]:
    """The server's models, as it lists them.

    Raises:
        CourseError: nobody answers in time, somebody else answers, or the key is refused.
    """
    box: dict[str, Any] = {}

    def ask() -> None:
        try:
            box["models"] = _ask(url, api_key, sdk_version)
        except Exception as error:
            box["error"] = error

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up cannot be interrupted
    thread.start()
    thread.join(TIMEOUT_S)
    if isinstance(box.get("error"), CourseError):
        raise box["error"]
    if "models" not in box:
        why = box.get("error") or f"no answer within {TIMEOUT_S:.0f} s"
        remedy = "start one with `posttrain engine`, correct the URL, or unset TINKER_BASE_URL"
        if hosted:
            remedy = "look at your network, or stay on this machine with the back end embedded"
        elif proxy := proxy_before(url):
            remedy = f"set NO_PROXY={urlsplit(url).hostname} to go past it, or correct the URL"
            if isinstance(why, ImportError):  # of a SOCKS proxy: NO_PROXY would not help
                remedy = f"unset {proxy}, or: pip install 'httpx[socks]'"
            why = f"{why}, through the proxy of {proxy}"
        raise CourseError(url, f"no Tinker server can be reached there ({why})", remedy)
    return box["models"]


def _ask(url: str, api_key: str, sdk_version: str) -> list[dict[str, Any]]:
    import httpx

    headers = {"X-API-Key": api_key}
    with httpx.Client(timeout=TIMEOUT_S, trust_env=not is_loopback(url), headers=headers) as http:
        config = http.post(f"{url}/api/v1/client/config", json={"sdk_version": sdk_version})
        if _answer(config, url).get("pjwt_auth_enabled"):
            return []  # this server wants the key exchanged first, which is the SDK's business
        listed = http.get(f"{url}/api/v1/get_server_capabilities")
        models = _answer(listed, url).get("supported_models")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise _somebody_else(listed, url)
    return models


def _answer(response: Any, url: str) -> dict[str, Any]:
    """The JSON object that the server sent.

    Raises:
        CourseError: the key is refused, or it sent something else.
    """
    is_json = "json" in response.headers.get("content-type", "")
    if response.status_code in (401, 403) and (is_json or not proxy_before(url)):
        raise CourseError(
            url, "the server refuses the key in TINKER_API_KEY", "use the key that this server gave"
        )
    if response.status_code != 200 or not is_json:
        raise _somebody_else(response, url)
    try:
        answer = response.json()
    except ValueError as error:
        raise _somebody_else(response, url) from error
    if not isinstance(answer, dict):
        raise _somebody_else(response, url)
    return answer


def _somebody_else(response: Any, url: str) -> CourseError:
    finding = f"somebody answers (status {response.status_code}), but not as a Tinker server"
    remedy = "correct the URL; it ends before /api/v1"
    if proxy := proxy_before(url):
        finding += f"; perhaps the proxy of {proxy}"
        remedy = f"set NO_PROXY={urlsplit(url).hostname} to go past it, or {remedy}"
    return CourseError(url, finding, remedy)
