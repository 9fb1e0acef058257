"""An HTTP stand-in for the Kubeflow Pipelines API, v2beta1: it checks bodies and keeps state."""

import json
import threading
import urllib.parse
import uuid
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2


class KfpServer:
    """Start it with `with KfpServer() as server`; `server.address` is what `kfp.Client(host=…)` takes."""

    def __init__(self) -> None:
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "KfpServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/healthz":
            return 200, {"multi_user": False}
        for name, kept in (("pipelines", self.pipelines), ("experiments", self.experiments), ("runs", self.runs)):
            if path == f"/{name}":
                return 200, {name: list(kept.values()), "total_size": len(kept)}
            if path.startswith(f"/{name}/"):
                found = kept.get(path.split("/")[2])
                return (200, found) if found else (404, {"message": f"{path} not found"})
        return 404, {"message": f"no such path {path}"}

    def upload(self, query: dict[str, str], headers: Message, body: bytes) -> tuple[int, Any]:
        boundary = headers.get_param("boundary")
        if headers.get_content_type() != "multipart/form-data" or not boundary:
            return 400, {"message": "an upload is multipart/form-data"}
        parts = body.split(b"--" + str(boundary).encode())
        files = [part for part in parts if b'name="uploadfile"' in part]
        if len(files) != 1:
            return 400, {"message": "the form needs one 'uploadfile'"}
        content = files[0].split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        try:
            spec = parse_spec(content.decode())
        except (yaml.YAMLError, json_format.ParseError, ValueError) as error:
            return 400, {"message": f"not a pipeline: {error}"}
        name = query.get("name") or spec["pipeline_spec"]["pipelineInfo"]["name"]
        if any(known["display_name"] == name for known in self.pipelines.values()):
            return 409, {"message": f"there is a pipeline {name} already"}
        pipeline = {"pipeline_id": str(uuid.uuid4()), "display_name": name, "spec": spec}
        self.pipelines[pipeline["pipeline_id"]] = pipeline
        return 200, {key: value for key, value in pipeline.items() if key != "spec"}

    def create(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/experiments":
            experiment = {**body, "experiment_id": str(uuid.uuid4())}
            self.experiments[experiment["experiment_id"]] = experiment
            return 200, experiment
        if path == "/runs":
            if body.get("experiment_id") not in self.experiments:
                return 400, {"message": "a run needs an experiment"}
            spec = body["pipeline_spec"]
            root = (spec.get("pipeline_spec") or spec)["root"]["inputDefinitions"]["parameters"]
            unknown = set(body.get("runtime_config", {}).get("parameters", {})) - set(root)
            if unknown:
                return 400, {"message": f"unknown parameters {sorted(unknown)}"}
            run = {**body, "run_id": str(uuid.uuid4()), "state": "PENDING"}
            self.runs[run["run_id"]] = run
            return 200, run
        return 404, {"message": f"no such path {path}"}

    def _handler(server: "KfpServer") -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _path(self) -> tuple[str, dict[str, str]]:
                url = urllib.parse.urlsplit(self.path)
                return url.path.removeprefix("/apis/v2beta1"), dict(urllib.parse.parse_qsl(url.query))

            def do_GET(self) -> None:
                self._answer(*server.get(self._path()[0]))

            def do_POST(self) -> None:
                path, query = self._path()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if path == "/pipelines/upload":
                    self._answer(*server.upload(query, self.headers, body))
                else:
                    self._answer(*server.create(path, json.loads(body)))

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def parse_spec(text: str) -> dict[str, Any]:
    """The documents of a compiled pipeline, the first checked against KFP's own protocol buffer."""
    documents = list(yaml.safe_load_all(text))
    if not 1 <= len(documents) <= 2:
        raise ValueError(f"{len(documents)} YAML documents")
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    if len(documents) == 2:
        json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    return {"pipeline_spec": documents[0], "platform_spec": documents[1] if len(documents) == 2 else None}
