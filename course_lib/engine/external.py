"""How are weights taken away? As PEFT files, encrypted with age if asked, by URL.

A URL carries its own proof (an HMAC over path, file and expiry), because whoever downloads sends no
key. age (https://age-encryption.org) is spoken by `pyrage`, an optional package.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from course_lib.engine.names import shown
from course_lib.engine.requests import RequestError
from course_lib.engine.tensors import write_adapter

if TYPE_CHECKING:
    from torch import Tensor

MAX_RECIPIENTS = 10
URL_VALID_S = 3600


def age_recipients(texts: list[str] | None) -> list[Any]:
    """The keys to encrypt to: native `age1...` or SSH public keys; empty means no encryption."""
    if not texts:
        return []
    if len(texts) > MAX_RECIPIENTS:
        raise RequestError(f"age_encryption_recipients: at most {MAX_RECIPIENTS} are allowed")
    try:
        from pyrage import ssh, x25519
    except ImportError as error:
        raise RequestError(
            "age encryption needs a package in the engine's environment: pip install pyrage"
        ) from error
    recipients = []
    for text in texts:
        reader = x25519.Recipient if text.startswith("age1") else ssh.Recipient
        try:
            recipients.append(reader.from_str(text))
        except Exception as error:  # pyrage's own error type is not public
            raise RequestError(
                f"age_encryption_recipients: {shown(text)} is neither an age1... key nor an SSH "
                "public key"
            ) from error
    return recipients


def write_external(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any], recipients: list[Any]
) -> None:
    """Write the adapter's files; with recipients each is encrypted and gets the suffix `.age`."""
    write_adapter(folder, state, config)
    if not recipients:
        return
    import pyrage

    for file in list(folder.iterdir()):
        pyrage.encrypt_file(str(file), f"{file}.age", recipients)
        file.unlink()


class Signer:
    """Makes and checks download tokens; its secret lives as long as the engine."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def url(self, base_url: str, place: str) -> str:
        """A URL for `place`, a checkpoint's file or a session's trace, that opens without a key."""
        expires = int(time.time()) + URL_VALID_S
        token = self._token(place, expires)
        return f"{base_url}/api/v1/download/{quote(place)}?expires={expires}&token={token}"

    def expires(self) -> str:
        """When a URL made now expires, in ISO form."""
        return datetime.fromtimestamp(time.time() + URL_VALID_S, UTC).isoformat()

    def check(self, place: str, expires: str, token: str) -> None:
        """Raises: RequestError when the URL was changed or is too old."""
        if not expires.isdecimal() or len(expires) > 12 or int(expires) < time.time():
            raise RequestError("The download URL has expired; ask for a new one")
        if not hmac.compare_digest(self._token(place, int(expires)).encode(), token.encode()):
            raise RequestError("The download URL is not one that this engine made")

    def _token(self, place: str, expires: int) -> str:
        return hmac.new(self._secret, f"{place}?{expires}".encode(), hashlib.sha256).hexdigest()
