"""An engine of a test's own, on a port of its own: the process-wide one stays free for others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from course_lib.client import CourseService, connect
from course_lib.engine.models import load_models
from course_lib.engine.server import Engine


@contextlib.contextmanager
def own_engine(model: Path, store: Path) -> Iterator[CourseService]:
    """The real SDK, connected by URL to an engine that ends with the `with`."""
    engine = Engine(load_models(str(model), None), store).launch()
    try:
        with mock.patch.dict(os.environ, {"TINKER_API_KEY": engine.api_key}):
            service = connect(engine.url, quiet=True)
        yield service
        service.close("success").result(timeout=20)
    finally:
        engine.stop()
