"""One file over HTTP, whole or not at all, going on where a stopped fetch broke off.

A partial file is continued by a Range request with If-Range and the ETag it was begun under; a
server without ranges costs a fresh start. The file gets its name once its size is right and, where
the server states a hash (Repr-Digest, RFC 9530), its hash.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import httpx

from course_lib.errors import naming
from course_lib.export.files import sha256_file
from course_lib.files import sync, write_whole

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class BrokenOff(Exception):
    """The file ended early or is not what the server announced; another attempt may do."""


def fetch(url: str, path: Path, on_bytes: Callable[[int, int], None] | None = None) -> None:
    """Fetch `url` into `path`; `on_bytes` is told (bytes so far, bytes in all; 0 = unknown).

    Raises BrokenOff or an httpx error; what arrived stays beside `path` for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag_file = (
        path.with_name(path.name + ".part.tmp"),
        path.with_name(path.name + ".etag.tmp"),
    )
    tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
    have = part.stat().st_size if tag else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    # A proxy in the environment must not swallow the way to this very machine.
    outside = httpx.URL(url).host not in LOOPBACK
    with (
        httpx.Client(trust_env=outside, timeout=60, follow_redirects=True) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        if response.status_code == 416:  # the part is no part of this file: begin again
            part.unlink()
            raise BrokenOff("the part that was here does not fit")
        response.raise_for_status()
        have = have if response.status_code == 206 else 0
        total = _announced_size(response, have)
        if not have:
            part.unlink(missing_ok=True)  # before its new tag: the two never disagree
            write_whole(tag_file, _strong_tag(response))
        with naming(path), open(part, "ab") as file:
            for piece in response.iter_bytes():  # as it arrives: a larger unit would be lost
                file.write(piece)
                file.flush()
                have += len(piece)
                if on_bytes:
                    on_bytes(have, total)
    if total and have != total:
        raise BrokenOff(f"{have} of {total} bytes")
    _check_digest(part, response.headers.get("repr-digest"))
    sync(part)
    part.replace(path)
    tag_file.unlink(missing_ok=True)


def _strong_tag(response: httpx.Response) -> str:
    """The ETag, if it promises equal bytes; a weak one does not."""
    tag = response.headers.get("etag", "")
    return "" if tag.startswith("W/") else tag


def _announced_size(response: httpx.Response, have: int) -> int:
    """The whole file's size in bytes as the response states it; 0 = not stated."""
    if response.status_code == 206:
        span, _, total = (
            response.headers.get("content-range", "").removeprefix("bytes ").partition("/")
        )
        if not span.startswith(f"{have}-"):
            raise BrokenOff(f"asked for bytes from {have}, got {span or 'an unnamed range'}")
        return int(total) if total.isdigit() else 0
    return int(response.headers.get("content-length", 0))


def _check_digest(part: Path, header: str | None) -> None:
    for item in (header or "").split(","):
        name, _, value = item.strip().partition("=")
        if name == "sha-256" and base64.b64decode(value.strip(":")).hex() != sha256_file(part):
            part.unlink()
            raise BrokenOff("the file's hash is not the one the server announced")
