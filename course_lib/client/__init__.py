"""connect(): where do my calls go? To hosted Tinker, to a server by URL, or to the embedded engine.

    service = connect()                       # prints one line: where, and why
    client = service.create_lora_training_client(base_model=service.base_model, rank=16).result()

What comes back is the SDK's own `tinker.ServiceClient` with a few attributes more.
"""

from __future__ import annotations

from course_lib.client.choice import Choice, choose
from course_lib.dotenv import setting
from course_lib.startup import uninterrupted, without_collecting

with without_collecting(), uninterrupted():  # it imports tinker, and that torch
    from course_lib.client.service import (
        CourseService,
        check_sdk_version,
        connect,
        resolve_model,
    )

__all__ = [
    "Choice",
    "CourseService",
    "check_sdk_version",
    "choose",
    "connect",
    "resolve_model",
    "setting",
]
