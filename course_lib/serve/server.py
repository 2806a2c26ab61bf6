"""How does it start and stop? The app on uvicorn, until Ctrl-C or SIGTERM.

A stop lets everything that is running finish (up to a minute), while new connections are refused.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from course_lib.engine.server import bind, raise_file_limit, url_host
from course_lib.export.versions import model_folder
from course_lib.serve.app import create_app
from course_lib.serve.decoder import model_name

KEY_VARIABLE = "POSTTRAIN_API_KEY"
FINISH_S = 60  # seconds that running answers get after a stop was asked for


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a deploy folder's current model until Ctrl-C or SIGTERM.

    Where the model cannot be loaded, /ready says why until then; after Ctrl-C it is raised.
    The key is `key`, else POSTTRAIN_API_KEY, else a new one, which is printed.
    """
    import uvicorn

    given = key or os.environ.get(KEY_VARIABLE)
    key = given or f"posttrain-{secrets.token_urlsafe(24)}"
    model_folder(folder)  # a folder without a model is said before a port is taken
    app = create_app(folder, key)
    raise_file_limit()
    listener = bind(host, port)
    url = f"http://{url_host(host)}:{listener.getsockname()[1]}"
    say(f"OPENAI_BASE_URL={url}/v1")
    say(f"OPENAI_API_KEY={key if not given else '(the one you gave)'}")
    say(
        f"# model {model_name(folder)!r}; {url}/ready answers 200 once it is loaded; Ctrl-C ends it"
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=FINISH_S
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once all is finished
        uvicorn.Server(config).run(sockets=[listener])
    failed = app.state.served.failed
    if failed:
        raise failed
