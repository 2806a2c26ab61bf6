"""The embedded engine: a Tinker-compatible server in this process, on a loopback port.

    engine = start()                    # loads the shipped base model, once per process
    engine.url, engine.api_key          # what tinker.ServiceClient(base_url=..., api_key=...) takes
    engine.stop()

README.md follows one request through the files; COMPATIBILITY.md lists what is answered.
Left out: several machines.
"""

from __future__ import annotations

from course_lib.engine.server import Engine, serve_forever, start

__all__ = ["Engine", "serve_forever", "start"]
