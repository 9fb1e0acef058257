"""An HTTP stand-in for the Kubeflow Pipelines API, v2beta1: it checks bodies and keeps state."""

import json
import re
import threading
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Answer = tuple[int, Any]

TIMES = {"start_time", "end_time"}
CONFIG = {"parameters", "pipeline_root"}
NEEDED = {"display_name", "experiment_id", "runtime_config", "pipeline_version_reference"}
RUN = {*NEEDED, "description", "service_account"}
RECURRING = {*RUN, "max_concurrency", "trigger", "mode", "no_catchup", "namespace"}


class Refused(Exception):
    """What is wrong with a request, and the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class KfpServer:
    """Start it with `with KfpServer() as server`; `server.address` is what `kfp.Client(host=…)` takes."""

    def __init__(self) -> None:
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring_runs: dict[str, dict[str, Any]] = {}
        self.multi_user = False
        self.release = "2.17.0"
        self.can_orphan = False
        """Whether runs outlive the recurring run that started them: since 2.16, where the call asks for it."""
        self.requests: list[tuple[str, str, Any]] = []
        """Method, path and body of every request, in order."""
        self.headers: list[Message] = []
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        """Asked before each request; a status that it returns is the answer."""
        self.lose_answer: Callable[[str, str], bool] = lambda method, path: False
        """Asked after each request; if true, what it did is done, and the answer is an error."""
        self.progress: dict[str, list[dict[str, Any]]] = {}
        """Run id -> what each GET of the run changes of it, one after the other."""
        self.most_enabled: Counter[str] = Counter()
        """Name -> how many recurring runs of that name were enabled at one time, at most."""
        self._time = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "KfpServer":
        threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def changes(self) -> list[str]:
        """The requests that changed something, as METHOD /path without ids."""
        plain = [(method, re.sub(r"[0-9a-f-]{36}", "ID", path)) for method, path, _ in self.requests if method != "GET"]
        return [f"{method} {path}" for method, path in plain]

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message, body: bytes) -> Answer:
        upload = path == "/pipelines/upload_version"
        content = json.loads(body) if body and not upload else None
        failure = self.fail(method, path)
        self.requests.append((method, path, content))
        self.headers.append(headers)
        if failure:
            return failure, {"message": "the server is not well"}
        try:
            if upload:
                value = self.upload(query, headers, body)
            else:
                value = {"GET": self.get, "POST": self.create, "DELETE": self.delete}[method](path, query, content)
        except Refused as refused:
            return refused.status, {"message": str(refused)}
        enabled = Counter(one["display_name"] for one in self.recurring_runs.values() if one["status"] == "ENABLED")
        self.most_enabled |= enabled
        return (504, {"message": "the answer is lost"}) if self.lose_answer(method, path) else (200, value)

    def get(self, path: str, query: dict[str, str], _: Any) -> Any:
        if path == "/healthz":
            return {"multi_user": self.multi_user, "tag_name": self.release, "commit_sha": "0123abc"}
        versions = re.fullmatch(r"/pipelines/([^/]+)/versions(?:/([^/]+))?", path)
        if versions:
            kept = {key: one for key, one in self.versions.items() if one["pipeline_id"] == versions[1]}
            return _one(kept, versions[2]) if versions[2] else _page(kept, query, "pipeline_versions")
        for folder, name, kept in (
            ("pipelines", "pipelines", self.pipelines),
            ("experiments", "experiments", self.experiments),
            ("runs", "runs", self.runs),
            ("recurringruns", "recurringRuns", self.recurring_runs),
        ):
            if path == f"/{folder}":
                if self.multi_user and not query.get("namespace"):
                    raise Refused("a namespace is needed in multi-user mode")
                return _page(kept, query, name)
            if path.startswith(f"/{folder}/"):
                found = _one(kept, path.split("/")[2])
                if name == "runs" and self.progress.get(found["run_id"]):
                    found.update(self.progress[found["run_id"]].pop(0))
                return found
        raise Refused(f"no such path {path}", 404)

    def upload(self, query: dict[str, str], headers: Message, body: bytes) -> Any:
        boundary = headers.get_param("boundary")
        if headers.get_content_type() != "multipart/form-data" or not boundary:
            raise Refused("an upload is multipart/form-data")
        parts = body.split(b"--" + str(boundary).encode())
        files = [part for part in parts if b'name="uploadfile"' in part]
        if len(files) != 1:
            raise Refused("the form needs one 'uploadfile'")
        content = files[0].split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        try:
            spec = parse_spec(content.decode())
        except (yaml.YAMLError, json_format.ParseError, ValueError) as error:
            raise Refused(f"not a pipeline: {error}") from None
        pipeline = _one(self.pipelines, query["pipelineid"])
        return self._new_version(pipeline, query["name"], spec, query["description"])

    def create(self, path: str, query: dict[str, str], body: Any) -> Any:
        run = re.fullmatch(r"/runs/([^/]+):terminate", path)
        if run:
            found = _one(self.runs, run[1])
            if found["state"] not in ("PENDING", "RUNNING"):
                raise Refused("only a run that is running can be terminated")
            return found.update(state="CANCELING") or {}
        switch = re.fullmatch(r"/recurringruns/([^/]+):(enable|disable)", path)
        if switch:
            _one(self.recurring_runs, switch[1])["status"] = switch[2].upper() + "D"
            return {}
        if path == "/pipelines":
            _check(body, {"display_name"}, {"display_name", "name", "description", "namespace"})
            return self._new_pipeline(body)
        if path == "/experiments":
            _check(body, {"display_name"}, {"display_name", "description", "namespace"})
            return self._keep(self.experiments, "experiment_id", body)
        if path == "/runs":
            _check(body, NEEDED, RUN)
            self._check_source(body)
            return self._keep(self.runs, "run_id", {**body, "state": "PENDING"})
        if path == "/recurringruns":
            _check(body, {*NEEDED, "trigger", "max_concurrency"}, RECURRING)
            self._check_source(body)
            _check_trigger(body["trigger"])
            if not 1 <= int(body["max_concurrency"]) <= 10:
                raise Refused("max concurrency is out of range. Support 1-10")
            if body.get("mode") not in ("ENABLE", "DISABLE"):
                raise Refused(f"no such mode {body.get('mode')}")
            answered = {**body, "status": body["mode"] + "D", "max_concurrency": str(body["max_concurrency"])}
            return self._keep(self.recurring_runs, "recurring_run_id", answered)
        raise Refused(f"no such path {path}", 404)

    def delete(self, path: str, query: dict[str, str], _: Any) -> Any:
        found = re.fullmatch(r"/recurringruns/([^/]+)", path)
        if not found:
            raise Refused(f"no such path {path}", 404)
        _one(self.recurring_runs, found[1])
        if query.get("propagation_policy") not in (None, "FOREGROUND", "BACKGROUND", "ORPHAN"):
            raise Refused("no such policy")
        if not self.can_orphan or query.get("propagation_policy") != "ORPHAN":  # the workflows are owned by it
            for run in self.runs.values():
                if run.get("recurring_run_id") == found[1] and run["state"] in ("PENDING", "RUNNING"):
                    run["state"] = "FAILED"
        del self.recurring_runs[found[1]]
        return {}

    def start(self, recurring_run_id: str) -> str:
        """What a schedule does when its time has come. Returns the run's id."""
        entry = {"display_name": "scheduled", "recurring_run_id": recurring_run_id, "state": "RUNNING"}
        run_id: str = self._keep(self.runs, "run_id", entry)["run_id"]
        return run_id

    def _check_source(self, body: dict[str, Any]) -> None:
        if body["experiment_id"] not in self.experiments:
            raise Refused("there is no such experiment")
        _check(body["runtime_config"], set(), CONFIG)
        reference = body["pipeline_version_reference"]
        _check(reference, {"pipeline_id"}, {"pipeline_id", "pipeline_version_id"})
        own = [one for one in self.versions.values() if one["pipeline_id"] == reference["pipeline_id"]]
        wanted = reference.get("pipeline_version_id")
        matching = [one for one in own if wanted in (None, one["pipeline_version_id"])]
        if not matching:
            raise Refused("there is no such version", 404)
        spec = matching[-1]["pipeline_spec"]["pipeline_spec"]
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        unknown = set(body["runtime_config"].get("parameters", {})) - set(known)
        if unknown:
            raise Refused(f"unknown parameters {sorted(unknown)}")

    def _new_pipeline(self, body: dict[str, Any]) -> dict[str, Any]:
        if any(known["display_name"] == body["display_name"] for known in self.pipelines.values()):
            raise Refused(f"there is a pipeline {body['display_name']} already", 409)
        return self._keep(self.pipelines, "pipeline_id", body)

    def _new_version(self, pipeline: dict[str, Any], name: str, spec: Any, description: str) -> dict[str, Any]:
        own = [one for one in self.versions.values() if one["pipeline_id"] == pipeline["pipeline_id"]]
        if any(one["display_name"] == name for one in own):
            raise Refused(f"there is a version {name} already", 409)
        body = {"pipeline_id": pipeline["pipeline_id"], "display_name": name, "description": description}
        return self._keep(self.versions, "pipeline_version_id", {**body, "pipeline_spec": spec})

    def _keep(self, kept: dict[str, dict[str, Any]], key: str, body: dict[str, Any]) -> dict[str, Any]:
        self._time += timedelta(seconds=1)
        entry = {**body, key: str(uuid.uuid4()), "created_at": self._time.isoformat()}
        kept[entry[key]] = entry
        return entry

    def _handler(server: "KfpServer") -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                path = urllib.parse.unquote(url.path.removeprefix("/apis/v2beta1"))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = dict(urllib.parse.parse_qsl(url.query))
                status, value = server.answer(self.command, path, query, self.headers, body)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def _check(body: Any, required: set[str], allowed: set[str]) -> None:
    if not isinstance(body, dict):
        raise Refused("the body is not an object")
    if set(body) - allowed:
        raise Refused(f"unknown fields {sorted(set(body) - allowed)}")
    if any(not body.get(name) for name in required - {"runtime_config"}) or required - set(body):
        raise Refused(f"{sorted(required)} are required, got {sorted(body)}")


def _check_trigger(trigger: dict[str, Any]) -> None:
    if len(trigger) != 1:
        raise Refused("one trigger is needed")
    if "cron_schedule" in trigger:
        _check(trigger["cron_schedule"], {"cron"}, TIMES | {"cron"})
        if len(trigger["cron_schedule"]["cron"].split()) != 6:
            raise Refused("Schedule cron is not a supported format")
    else:
        _check(trigger, {"periodic_schedule"}, {"periodic_schedule"})
        _check(trigger["periodic_schedule"], {"interval_second"}, TIMES | {"interval_second"})
        if int(trigger["periodic_schedule"]["interval_second"]) < 1:
            raise Refused("Set at interval to least 1 second")


def _one(kept: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    if key not in kept:
        raise Refused(f"{key} not found", 404)
    return kept[key]


def _page(kept: dict[str, dict[str, Any]], query: dict[str, str], name: str) -> dict[str, Any]:
    """A page of a list; the names in a filter match in any case, as in the newest servers."""
    found = list(kept.values())
    for predicate in json.loads(query["filter"])["predicates"] if query.get("filter") else []:
        if predicate["operation"] not in (1, "EQUALS") or predicate["key"] != "display_name":
            raise Refused(f"this stand-in knows no filter {predicate}")
        wanted = (predicate.get("stringValue") or predicate["string_value"]).lower()
        found = [one for one in found if one["display_name"].lower() == wanted]
    if query.get("sort_by"):
        key, _, direction = query["sort_by"].partition(" ")
        found.sort(key=lambda one: one[key], reverse=direction == "desc")
    start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
    page = {name: found[start : start + size], "total_size": len(found)}
    return page | ({"next_page_token": str(start + size)} if start + size < len(found) else {})


def parse_spec(text: str) -> dict[str, Any]:
    """The documents of a compiled pipeline, the first checked against KFP's own protocol buffer."""
    documents = list(yaml.safe_load_all(text))
    if not 1 <= len(documents) <= 2:
        raise ValueError(f"{len(documents)} YAML documents")
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    if len(documents) == 2:
        json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    return {"pipeline_spec": documents[0], "platform_spec": documents[1] if len(documents) == 2 else None}
