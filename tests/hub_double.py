"""A stand-in for the Hugging Face Hub: what huggingface_hub sends when a folder is uploaded.

It speaks the HTTP of repository creation, card validation, pre-upload, LFS upload and commit,
checks every request as the Hub does (token, hashes, sizes), and keeps what was committed. Left
out: the Xet transport, which is a binary protocol of its own; tests switch the client to LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field

import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_" + "x" * 8  # short, so that no scanner takes it for a real one
LARGE = (".safetensors", ".model")


@dataclass
class HubDouble:
    """The repositories: name -> {"private": ..., "files": {path: bytes}}."""

    repos: dict[str, dict] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    commits: int = 0

    def app(self) -> Starlette:
        repo = "/api/models/{owner}/{name}"
        return Starlette(
            routes=[
                self._route("/api/repos/create", self.create),
                self._route("/api/validate-yaml", self.validate),
                self._route(repo, self.info, "GET"),
                self._route(repo + "/preupload/{revision}", self.preupload),
                self._route(repo + "/commit/{revision}", self.commit),
                self._route("/{owner}/{name}.git/info/lfs/objects/batch", self.batch),
                self._route("/lfs/verify", self.verify),
                Route("/lfs/{oid}", self.put, methods=["PUT"]),
            ]
        )

    def _route(self, path: str, endpoint, method: str = "POST") -> Route:
        async def answer(request: Request) -> Response:
            self.requests.append(f"{request.method} {request.url.path}")
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                return JSONResponse({"error": "Invalid username or password."}, 401)
            return await endpoint(request)

        return Route(path, answer, methods=[method])

    async def create(self, request: Request) -> Response:
        body = await request.json()
        name = (
            f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        )
        url = f"https://huggingface.co/{name}"
        if name in self.repos:
            return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
        self.repos[name] = {"private": body.get("visibility") == "private", "files": {}}
        return JSONResponse({"url": url, "name": name})

    async def info(self, request: Request) -> Response:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        if name not in self.repos:
            return JSONResponse({"error": "Repository not found"}, 404)
        return JSONResponse({"id": name, "private": self.repos[name]["private"], "tags": []})

    async def validate(self, request: Request) -> Response:
        content = (await request.json())["content"]
        data = yaml.safe_load(content.split("---")[1])
        wrong = [k for k in ("license", "library_name", "pipeline_tag") if k not in data]
        errors = [{"message": f'"{key}" is required'} for key in wrong]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def preupload(self, request: Request) -> Response:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": files})

    async def batch(self, request: Request) -> Response:
        objects = []
        for wanted in (await request.json())["objects"]:
            if wanted["oid"] in self.blobs:
                objects.append(wanted)
                continue
            upload = {"href": f"{request.base_url}lfs/{wanted['oid']}"}
            verify = {"href": f"{request.base_url}lfs/verify"}
            objects.append({**wanted, "actions": {"upload": upload, "verify": verify}})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def put(self, request: Request) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]:
            return Response(status_code=400)
        self.blobs[request.path_params["oid"]] = data
        return Response()

    async def verify(self, request: Request) -> Response:
        body = await request.json()
        good = len(self.blobs.get(body["oid"], b"")) == body["size"]
        return JSONResponse({}, 200 if good else 404)

    async def commit(self, request: Request) -> Response:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        if name not in self.repos:
            return JSONResponse({"error": "Repository not found"}, 404)
        files = self.repos[name]["files"]
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        self.commits += 1
        return JSONResponse(
            {
                "commitUrl": f"https://huggingface.co/{name}/commit/{self.commits}",
                "commitOid": "0" * 40,
            }
        )
