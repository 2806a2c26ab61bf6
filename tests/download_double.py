"""A stand-in for the service side of a download: the SDK's calls, and files on a loopback server.

The calls are those of `CourseService`, `RestClient` and `TrainingClient`; the real ones are used in
`test_deploy.py` against the embedded engine. Here the server can also misbehave on purpose.
"""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tinker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route


def future(value: Any) -> Future:
    done: Future = Future()
    done.set_result(value)
    return done


class FileServer:
    """Serves a folder at /files/NAME with ranges and ETags, unless told to do worse."""

    def __init__(self, folder: Path, chunk_bytes: int = 65536) -> None:
        self.folder, self.chunk_bytes = folder, chunk_bytes
        self.ranges = True
        self.cut_after: int | None = None  # bytes of a body, once
        self.digest: str | None = None  # a Repr-Digest to claim instead of the true one
        self.statuses: list[int] = []  # answered first, one request each
        self.seen: list[tuple[str, str | None]] = []  # (name, Range)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/files/{name:path}", self.file)])

    async def file(self, request: Request) -> Response:
        path = self.folder / request.path_params["name"]
        self.seen.append((path.name, request.headers.get("range")))
        if self.statuses:
            return Response(status_code=self.statuses.pop(0))
        data = path.read_bytes()
        digest = self.digest or base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {"repr-digest": f"sha-256=:{digest}:"}
        if self.cut_after is not None:
            cut, self.cut_after = self.cut_after, None
            etag = FileResponse(path, stat_result=path.stat()).headers["etag"]
            return CutResponse(data[:cut], headers={**headers, "etag": etag}, full=len(data))
        if not self.ranges:
            return Response(data, headers=headers)
        response = FileResponse(path, headers=headers)
        response.chunk_size = self.chunk_bytes
        return response


class CutResponse(Response):
    """Announces the whole length and closes the connection early."""

    def __init__(self, content: bytes, headers: dict[str, str], full: int) -> None:
        super().__init__(content, headers={**headers, "content-length": str(full)})

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})


class ServiceDouble:
    """The calls that a download makes, over one adapter folder."""

    def __init__(self, url: str, folder: Path, base_model: str, model_folder: Path) -> None:
        self.url, self.folder, self.base_model = url, folder, base_model
        self.model_folder = model_folder
        self.exports: dict[str, dict[str, str]] = {}
        self.logprobs: list[float] = []
        self.deleted: list[str] = []
        self.names = sorted(path.name for path in folder.iterdir())
        self.refuse_sampler = False

    # CourseService
    @property
    def rest(self) -> ServiceDouble:
        return self

    def create_training_client_from_state(self, path: str) -> Future:
        if self.refuse_sampler and "/sampler_weights/" in path:
            failed: Future = Future()
            failed.set_exception(ValueError("sampler weights cannot be loaded"))
            return failed
        return future(self)

    # RestClient
    def get_weights_info_by_tinker_path(self, path: str) -> Future:
        if "missing" in path:
            failed: Future = Future()
            failed.set_exception(ValueError("Error code: 404 - there is no such checkpoint"))
            return failed
        return future(SimpleNamespace(base_model=self.base_model))

    def get_external_weights_urls(self, path: str) -> Future:
        if path not in self.exports and "/external_weights/given" not in path:
            failed: Future = Future()
            failed.set_exception(ValueError("Error code: 404 - expired"))
            return failed
        urls = {name: f"{self.url}/files/{name}" for name in self.names}
        return future(SimpleNamespace(urls=urls | self.exports.get(path, {})))

    def delete_checkpoint_from_tinker_path(self, path: str) -> Future:
        self.deleted.append(path)
        return future(None)

    # TrainingClient
    def get_info(self) -> Any:
        return SimpleNamespace(model_data=SimpleNamespace(tokenizer_id=str(self.model_folder)))

    def get_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_folder)

    def forward(self, data: list[tinker.Datum], loss_fn: str) -> Future:
        assert loss_fn == "cross_entropy"
        import torch
        from peft import PeftModel

        from course_lib.export.verify import load_model

        tokens = [*data[0].model_input.to_ints(), data[0].loss_fn_inputs["target_tokens"].data[-1]]
        model = PeftModel.from_pretrained(load_model(self.model_folder), str(self.folder)).eval()
        with torch.no_grad():
            table = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)  # (T, V)
        logprobs = [table[i, int(token)].item() for i, token in enumerate(tokens[1:])]
        output = {"logprobs": SimpleNamespace(data=logprobs)}
        return future(SimpleNamespace(loss_fn_outputs=[output]))

    def save_weights_external(self, name: str, ttl_seconds: int) -> Future:
        path = f"tinker://other:train:0/external_weights/{name}"
        self.exports[path] = {}
        return future(SimpleNamespace(path=path))
