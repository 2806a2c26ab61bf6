"""An OpenAI-compatible server over a merged model: the engine's sampler behind another protocol.

`protocol` reads OpenAI's request bodies, `decoder` runs the sampler, `text` turns tokens into text
that can be streamed, `replies` writes OpenAI's answers, `app` has the routes, `server` starts and
stops it, `smoke` is the test that a deploy must pass.
"""

from __future__ import annotations

from course_lib.serve.app import create_app
from course_lib.serve.decoder import ServedModel
from course_lib.serve.server import serve
from course_lib.serve.smoke import smoke_test

__all__ = ["ServedModel", "create_app", "serve", "smoke_test"]
