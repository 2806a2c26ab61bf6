"""How does it start and stop? The app on uvicorn, in a daemon thread or in the foreground."""

from __future__ import annotations

import atexit
import contextlib
import errno
import ipaddress
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.dotenv import setting
from course_lib.engine.access import LOCAL_OWNER, LOOPBACK, Access, new_key, read_keys
from course_lib.errors import CourseError
from course_lib.startup import collect_all

if TYPE_CHECKING:
    from course_lib.engine.limits import Limits
    from course_lib.engine.rooms import Compute
    from course_lib.engine.runs import Model

DEFAULT_STORE = "runs/store"
OPEN_FILES = 8192  # each sample in flight holds sockets
EVERYWHERE = ("0.0.0.0", "::")  # every address of this machine
STOP_S = 10  # the request being computed has half of it to end
BACKLOG = 2048  # connections that wait to be accepted: uvicorn's own default

_lock = threading.Lock()
_running: dict[tuple[Any, ...], Engine] = {}


class Engine:
    """A running engine: where it answers, the key it wants, and how to end it."""

    def __init__(
        self,
        models: dict[str, Model],
        store: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        owners: dict[str, str] | None = None,
        compute: Compute | None = None,
        limits: Limits | None = None,
        client_config: dict[str, Any] | None = None,
    ) -> None:
        import uvicorn

        from course_lib.engine.app import create_app
        from course_lib.engine.rooms import Rooms, torch_compute
        from course_lib.engine.storage import Store

        self.api_key = "" if owners else new_key()
        access = Access(owners or {self.api_key: LOCAL_OWNER}, host)
        self.models = models
        self.socket = bind(host, port)
        self.url = f"http://{url_host(host)}:{self.socket.getsockname()[1]}"
        self.rooms = Rooms.build(
            models, Store(store), compute or torch_compute(), limits, single_owner=not owners
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(self.rooms, access, client_config),
                log_config=None,
                proxy_headers=False,  # nobody stands between
                server_header=False,
                date_header=False,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=600,  # idle connections of the SDK stay open: no lost requests
                timeout_graceful_shutdown=1,
            )
        )
        self._close_connections = self._server.shutdown
        self._server.shutdown = self._shut_down
        self._thread: threading.Thread | None = None

    def launch(self) -> Engine:
        """Answer requests from a daemon thread; returns when it does."""
        self.rooms.worker.start()
        thread = threading.Thread(target=self._serve, name="engine-http", daemon=True)
        self._thread = thread
        thread.start()
        while not self._server.started and thread.is_alive():
            thread.join(0.005)
        return self

    def serve(self) -> None:
        """Answer requests in this thread until Ctrl-C."""
        self.rooms.worker.start()
        with contextlib.suppress(KeyboardInterrupt):
            self._serve()

    def _serve(self) -> None:
        self._server.run(sockets=[self.socket])

    async def _shut_down(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer those who wait, then close their connections: without an answer the SDK asks for
        ever. It holds the loop up, for no thread may be begun while the interpreter exits."""
        self.rooms.close()
        await self._close_connections(sockets)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the server and free its memory; what is in the store stays."""
        self._end()
        with _lock:
            mine = [key for key, engine in _running.items() if engine is self]
            for key in mine:
                del _running[key]
        if mine:  # its model was loaded without collecting
            atexit.unregister(self._end)
            collect_all()

    def _end(self) -> None:
        self._server.should_exit = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_S)
        if not self._server.started:
            self.rooms.close()
        self.socket.close()


def start(
    model: str | Path | None = None,
    store: str | Path | None = None,
    port: int = 0,
    aliases: dict[str, str] | None = None,
) -> Engine:
    """The engine of this process: started at the first call, the same one at every later call.

    Raises:
        CourseError: an engine with another model or store is running; the model cannot be loaded.
    """
    from course_lib.engine.models import load_models, shipped_model

    place = Path(store or setting("COURSE_STORE") or DEFAULT_STORE).resolve()
    names = {name: whereabouts(source) for name, source in (aliases or {}).items()}
    key = (whereabouts(model or shipped_model()), place, tuple(sorted(names.items())))
    with _lock:
        for running, engine in _running.items():
            if engine.running and running == key:
                return engine
            if engine.running:
                if running[0] != key[0]:
                    from course_lib.engine.model import find_model

                    find_model(key[0])  # for one that is not there nobody need stop the engine
                others = ", ".join(f"{name}={source}" for name, source in running[2])
                raise CourseError(
                    "engine",
                    f"one is running already, with model {running[0]}, store {running[1]} and "
                    f"{f'the aliases {others}' if others else 'no aliases'}",
                    "stop it with service.engine.stop(), or restart the kernel",
                )
        raise_file_limit()
        engine = Engine(load_models(model, aliases), place, port=port)
        _running.clear()
        _running[key] = engine.launch()
    atexit.register(engine._end)
    return engine


def serve_forever(
    model: str | Path | None = None,
    aliases: dict[str, str] | None = None,
    port: int = 0,
    store: str | Path | None = None,
    host: str = "127.0.0.1",
    keys: str | Path | None = None,
) -> None:
    """Run an engine on its own: print its URL and key, then answer until Ctrl-C.

    Raises:
        CourseError: the host is open to others and no keys file is given; the port is taken; the
            model cannot be loaded.
    """
    from course_lib.engine.models import load_models, tokenizer_home
    from course_lib.engine.storage import Store

    if host not in LOOPBACK and keys is None:
        raise CourseError(
            f"--host {host}",
            "others can reach that address, and a key printed on the screen is not theirs",
            "give --keys FILE with a line per learner, or leave --host out",
        )
    owners = read_keys(keys) if keys is not None else None
    raise_file_limit()
    place = Path(store or setting("COURSE_STORE") or DEFAULT_STORE).resolve()
    Store(place)  # what can be refused is refused before a model is loaded
    bind(host, port).close()
    models = load_models(model, aliases)
    engine = Engine(models, place, host=host, port=port, owners=owners)
    home = tokenizer_home(place / "tokenizers", models)
    print(f"TINKER_BASE_URL={engine.url}")
    print(f"TINKER_API_KEY={engine.api_key or '(the key on your line of the keys file)'}")
    if host in EVERYWHERE:
        print(f"# from other machines: this one's name or address in place of {url_host(host)}")
    print(f"# serving {', '.join(models)}; store {place}")
    print(f"# tokenizers by these names, for other programs: HF_HOME={home} HF_HUB_OFFLINE=1")
    print("# Ctrl-C ends it", flush=True)
    engine.serve()


def bind(host: str, port: int) -> socket.socket:
    """A listening address; port 0 takes a free one. Who calls before the app runs waits for it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once only on sockets that say they are TCP; others wait 40 ms.
    server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name != "nt":  # there it would let two servers share a port
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        server.close()
        if isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL:
            remedy = "leave it out, or give an address or name that this machine has"
            raise CourseError(f"--host {host}", f"cannot be used ({error})", remedy) from error
        raise CourseError(
            f"--port {port}", f"{host} cannot be used ({error})", "choose another port, or 0"
        ) from error
    return server


def whereabouts(model: str | Path) -> str:
    """One name for a model, however its folder is written; hub names stay as they are."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else str(model)


def url_host(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def raise_file_limit() -> None:
    """Ask for more open files where the default is low (256 on macOS); harmless where it fails."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
