"""connect(), and the service client that it returns."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import logging
import os
import weakref
from typing import TYPE_CHECKING, Literal

import tinker

from course_lib.client.choice import Choice, choose
from course_lib.client.loopback import prefer_loopback
from course_lib.client.loops import fast_loops
from course_lib.client.probe import bypass_proxies, is_loopback, probe
from course_lib.client.tokenizers import teach
from course_lib.client.watch import leave, watch
from course_lib.dotenv import setting
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from tinker.lib.internal_client_holder import InternalClientHolder
    from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

    from course_lib.engine import Engine

BASE_NAME = "course/base"
SDK_VERSIONS = ((0, 38), (0, 39))  # from, below: the protocol changes with the SDK's releases
CLOSE_TIMEOUT_S = 3.0


class CourseService(tinker.ServiceClient):
    """The SDK's ServiceClient, which also knows where it leads."""

    def __init__(
        self,
        choice: Choice,
        url: str,
        api_key: str,
        models: list[str],
        base_model: str | None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(base_url=url, api_key=api_key)
        self.backend = choice.backend
        self.reason = choice.reason
        self.url = url
        self.models = models  # the SDK names that can be trained there
        self.engine = engine
        self._chosen_model = base_model
        self._connected = False

    @property
    def holder(self) -> InternalClientHolder:
        """The SDK's connection; making the first one also starts the event loop of all."""
        if self._connected:
            return super().holder
        with fast_loops():
            holder = super().holder
        if self.engine is not None:
            prefer_loopback(holder)
        self._connected = True
        return holder

    @property
    def base_model(self) -> str:
        """The SDK name of the model to train.

        Raises:
            CourseError: the server has several and none was chosen.
        """
        if self._chosen_model is None:
            raise CourseError(
                "connect",
                f"{self.url} has {len(self.models)} models and none was chosen",
                f"pass model=..., for example {', '.join(self.models[:3])}",
            )
        return self._chosen_model

    def close(
        self, status: Literal["success", "errored", "interrupted"], detail: str | None = None
    ) -> AwaitableConcurrentFuture[None]:
        """Finish the session: no more calls, and nobody to ask whether the server answers."""
        leave(self.url, self)
        return super().close(status, detail)

    @property
    def rest(self) -> tinker.RestClient:
        """Runs, checkpoints and sessions on the same server."""
        return tinker.RestClient(base_url=self._base_url, api_key=self._api_key)


def connect(
    backend: str | None = None,
    *,
    model: str | None = None,
    store: str | os.PathLike[str] | None = None,
    confirm: bool = False,
    quiet: bool = False,
) -> CourseService:
    """A service client for `backend`: "embedded", "hosted", a URL, or None (see `choose`).

    Args:
        model: on the embedded engine a folder or hub name to load in place of the shipped model;
            elsewhere the SDK name of a model that the server has.
        store: the embedded engine's folder of checkpoints.
        confirm: consent to a hosted run, which costs money.

    Raises:
        CourseError: the SDK's version does not fit, nobody answers, the key is missing or refused,
            the model is not there, or a hosted run was not confirmed.
    """
    check_sdk_version()
    logging.getLogger("tinker").addHandler(
        logging.NullHandler()
    )  # its errors reach us as exceptions
    choice = choose(backend)
    if choice.backend == "embedded":
        service = _embedded(choice, model, store)
    else:
        service = _remote(choice, model, confirm)
    _close_at_exit(service)
    if not quiet:
        print(describe(service))
    return service


def describe(service: CourseService) -> str:
    """One line: where the calls go, and why. The key is never in it."""
    if service.backend == "embedded":
        engine = service.engine
        place = f"the embedded engine in this process, store {engine.rooms.store.root}"  # type: ignore
    else:
        place = service.url if service.backend == "url" else "hosted Tinker, which costs money"
    return f"Calls go to {place} ({service.reason})."


def check_sdk_version() -> None:
    """Raises: CourseError when the SDK that is loaded speaks another protocol than we have tested:
    not the one that has been installed since, which this process will not see any more."""
    parts = tuple(int(part) for part in tinker.__version__.split(".")[:2] if part.isdecimal())
    if not SDK_VERSIONS[0] <= parts < SDK_VERSIONS[1]:
        raise CourseError(
            f"tinker {tinker.__version__}",
            "this course speaks the protocol of 0.38",
            "install it with: pip install 'tinker>=0.38,<0.39' (in a notebook: then restart the "
            "kernel)",
        )


def _embedded(
    choice: Choice, model: str | None, store: str | os.PathLike[str] | None
) -> CourseService:
    from course_lib.engine import start

    bypass_proxies()
    engine = start(model=model, store=store)  # type: ignore[arg-type]
    teach({name: served.tokenizer_id for name, served in engine.models.items()})
    return CourseService(choice, engine.url, engine.api_key, list(engine.models), BASE_NAME, engine)


def _remote(choice: Choice, model: str | None, confirm: bool) -> CourseService:
    api_key = _api_key(choice)
    if choice.backend == "hosted" and not confirm:
        raise CourseError(
            "connect",
            f"the calls would go to hosted Tinker and cost money ({choice.reason})",
            'agree with confirm=True (command line: --yes), or pass backend="embedded"',
        )
    url = choice.url or hosted_url()
    if is_loopback(url):
        bypass_proxies()
    listed = probe(url, api_key, tinker.__version__, hosted=choice.backend == "hosted")
    teach({m["model_name"]: m["tokenizer_id"] for m in listed if m.get("tokenizer_id")})
    names = [m["model_name"] for m in listed if m.get("model_name") and m.get("trainable", True)]
    service = CourseService(choice, url, api_key, names, _default_model(names))
    if model is not None:
        service._chosen_model = resolve_model(service, model)
    watch(url, service)
    return service


def _default_model(names: list[str]) -> str | None:
    if BASE_NAME in names:
        return BASE_NAME
    return names[0] if len(names) == 1 else None


def hosted_url() -> str:
    from tinker.lib.base_url import DEFAULT_BASE_URL

    return DEFAULT_BASE_URL


def _api_key(choice: Choice) -> str:
    key = setting("TINKER_API_KEY")
    if not key:
        raise CourseError(
            "TINKER_API_KEY",
            f"it is not set, and {choice.url or 'hosted Tinker'} needs a key ({choice.reason})",
            "set it in the environment or in .env, or use the embedded engine",
        )
    if not key.startswith(("tml-", "eyJ")):
        raise CourseError("TINKER_API_KEY", "it does not begin with tml-", "copy the whole key")
    if not (key.isascii() and key.isprintable() and len(key.split()) == 1):
        finding = "it holds a blank, a line break or a letter that no key has"
        raise CourseError("TINKER_API_KEY", finding, "copy the key again, and nothing else")
    return key


def resolve_model(service: CourseService, name: str = "auto") -> str:
    """The SDK name to train: the back end's own for "auto", else `name` if the back end has it.

    Raises:
        CourseError: the back end does not have it.
    """
    if name == "auto":
        return service.base_model
    if service.models and name not in service.models:
        near = difflib.get_close_matches(name, service.models, n=3, cutoff=0.3)
        raise CourseError(
            f"model {name}",
            f"{service.url} does not have it",
            f"use {', '.join(near or service.models[:5])}",
        )
    return name


def _close_at_exit(service: CourseService) -> None:
    """Finish the session when Python ends, so that the server need not wait for its heartbeat."""
    reference = weakref.ref(service)

    def close() -> None:
        alive = reference()
        if alive is None or (alive.engine is not None and not alive.engine.running):
            return
        with contextlib.suppress(Exception):
            alive.close("success").result(timeout=CLOSE_TIMEOUT_S)

    atexit.register(close)
