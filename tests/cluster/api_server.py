"""The API server of the stand-in: the calls that a launcher makes, over HTTP, and what can be broken of them.

It serves create, get, list (by label or field) and delete of namespaced objects, and logs of pods, also as they come.
"""

import contextlib
import json
import os
import re
import select
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster import crds
from tests.cluster.container import ContainerLog
from tests.cluster.installation import Installation
from tests.cluster.store import API_VERSIONS, KINDS, ApiError, Object, Store
from tests.cluster.trainer import admission_problem

POLL_SECONDS = 0.02
PATH = re.compile(
    r"/apis?/(?P<api_version>.+)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?"
)


class Call(NamedTuple):
    """What a request does, in the words of RBAC: `resource` has its subresource after a slash (`pods/log`)."""

    verb: str
    group: str
    resource: str


@dataclass(kw_only=True)
class Fault:
    """Of the next `times` answers to calls that match (patterns as of the shell); None: of all."""

    verb: str
    resource: str
    times: int | None
    status: int | None = None
    """What is answered, and nothing is done."""
    message: str = "the test refuses this"
    details: str | None = None
    """Name of the object that the answer is about."""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """That a call waits for its turn, as in an overloaded server; for who has hung up by then nothing is done."""
    cut: str = ""
    """The connection is cut `after` the request was served, or `within` the answer's body."""

    def matches(self, call: Call) -> bool:
        return self.times != 0 and fnmatchcase(call.verb, self.verb) and fnmatchcase(call.resource, self.resource)


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, api: "ApiServer", port: int) -> None:
        self.api = api
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a connection that is cut
            self.api.failure = error

    def close(self) -> None:
        """Refuse connections, and cut those that there are."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            _cut(connection)


class ApiServer:
    """Serves `store` on a port of the loopback interface from `start()` to `stop()`."""

    def __init__(self, store: Store, logs: Mapping[str, ContainerLog]) -> None:
        self.store, self.logs = store, logs
        self.installation = Installation(store.namespace)
        """What there is besides jobs and pods, to be read."""
        self.calls: list[Call] = []
        """Every request, refused ones too."""
        self.faults: list[Fault] = []
        self.role: dict[str, Any] | None = None
        """The dict of a Role's manifest; calls beyond it are 403. None: everything is allowed."""
        self.older_trainer = False
        """Kubeflow Trainer 2.1, whose TrainJobs have no runtimePatches."""
        self.following: set[socket.socket] = set()
        self.failure: BaseException | None = None
        """What went wrong in the stand-in itself."""
        self._refusal: ApiError | None = None

    def start(self) -> None:
        self._listen(0)
        self.port = self._http.server_port

    def stop(self) -> None:
        self._http.close()

    def _listen(self, port: int) -> None:
        self._http = _Http(self, port)
        threading.Thread(target=self._http.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    def restart(self) -> None:
        """As a kube-apiserver: it refuses connections, then forbids everything (403), then answers 503."""
        self._http.close()
        time.sleep(0.3)
        self._refusal = ApiError(403, "forbidden: not yet ready to handle request")
        self._listen(self.port)
        time.sleep(0.3)
        self._refusal = ApiError(503, "apiserver is shutting down")
        time.sleep(2.0)
        self._refusal = None

    def drop_streams(self) -> None:
        """Cut every log that is being followed."""
        for connection in list(self.following):
            _cut(connection)

    def fault(self, call: Call) -> Fault | None:
        """The one that this call meets, which is used up by that."""
        with self.store.lock:
            found = next((fault for fault in self.faults if fault.matches(call)), None)
            if found is not None and found.times is not None:
                found.times -= 1
        return found

    def answer(self, call: Call, target: re.Match[str], query: Mapping[str, str], body: Object) -> tuple[int, Object]:
        """Status and body. Raises ApiError."""
        plural, name = target["plural"], target["name"]
        api_version = API_VERSIONS.get(KINDS.get(plural, ""))
        if api_version != target["api_version"]:
            raise ApiError(404, "404 page not found")
        with self.store.lock:
            if call.verb == "list":
                items = [found for found in self.store.objects(plural) if _selected(found, query)]
                return 200, {"kind": f"{KINDS[plural]}List", "items": json.loads(json.dumps(items))}
            if call.verb == "create":
                body = self._admitted(plural, body, strict=query.get("fieldValidation") == "Strict")
                created = json.loads(json.dumps(self.store.create(plural, body)))
                _keep_manifest(body)
                return 201, created
            found = self.store.get(plural, name)
            if call.verb == "delete":
                uid = (body.get("preconditions") or {}).get("uid", "")
                self.store.delete(found, propagation=body.get("propagationPolicy", "Background"), uid=uid)
            return 200, json.loads(json.dumps(found))

    def tried(self, call: Call, target: re.Match[str], query: Mapping[str, str], body: Object) -> tuple[int, Object]:
        """What `answer` would be to a creation, of which nothing is kept. Raises ApiError."""
        plural = target["plural"]
        if plural == "pods":
            self.installation.admit(body)
        with self.store.lock:  # no controller sees it
            found = self.answer(call, target, query, body)
            self.store.remove(self.store.get(plural, body["metadata"]["name"]))
        return found

    def _admitted(self, plural: str, body: Object, *, strict: bool) -> Object:
        """What is kept of a body: fields that the CRD lacks are dropped, or, if that was asked for, refused."""
        if plural not in crds.PLURALS:
            return body
        unknown = list(crds.unknown_fields(body, crds.schema(plural)))
        if self.older_trainer and "runtimePatches" in body["spec"]:
            unknown.append("spec.runtimePatches")
        if unknown and strict:
            told = ", ".join(f'unknown field "{name}"' for name in unknown)
            raise ApiError(
                400, f'{body["kind"]} in version "v1alpha1" cannot be handled: strict decoding error: {told}'
            )
        for path in unknown:
            *parents, name = path.split(".")
            part: Any = body
            for key in parents:
                part = part[key]
            del part[name]
        if plural == "trainjobs" and (problem := admission_problem(body, self.store)):
            webhook = "validator.trainjob.trainer.kubeflow.org"
            raise ApiError(403, f'admission webhook "{webhook}" denied the request: {problem}')
        return body

    def authorize(self, call: Call) -> None:
        """Raises ApiError (401, 403) while the server starts, and for what no rule of the role covers."""
        if self._refusal is not None:
            raise self._refusal
        if not self.allows(call.verb, call.group, call.resource):
            raise ApiError(403, f"the service account cannot {call.verb} resource {call.resource}")

    def allows(self, verb: str, group: str, resource: str) -> bool:
        """Whether a rule of the role covers it."""
        rules = [{"verbs": ["*"]}] if self.role is None else self.role["rules"]
        wanted = {"verbs": verb, "apiGroups": group, "resources": resource}
        return any(
            all(value in rule.get(key, [value]) or "*" in rule[key] for key, value in wanted.items()) for rule in rules
        )

    def log(self, name: str) -> ContainerLog:
        """Raises ApiError where a real kubelet has none."""
        with self.store.lock:
            pod = self.store.get("pods", name)
            log = self.logs.get(pod["metadata"]["uid"])
        if log is None:
            raise ApiError(400, f'container in pod "{name}" is waiting to start: ContainerCreating')
        return log


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def _serve(self) -> None:
        api, url = self.server.api, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        target = PATH.fullmatch(url.path)
        cut = ""
        try:
            installed = api.installation.answer(self.command, url.path, body, api.allows)
            if installed is not None:
                return self._send(*installed)
            if target is None:
                raise ApiError(404, "404 page not found")
            call = _call(self.command, target)
            api.calls.append(call)
            fault = api.fault(call)
            if fault is not None and fault.seconds:
                time.sleep(fault.seconds)
                if _has_hung_up(self.connection):
                    return None
            if fault is not None and fault.status is not None:
                raise ApiError(fault.status, fault.message, name=fault.details, headers=dict(fault.headers))
            cut = fault.cut if fault is not None else ""
            api.authorize(call)
            if call.resource == "pods/log":
                return self._send_log(api.log(target["name"]), query)
            if not api.installation.serves(target["api_version"], target["plural"]):
                raise ApiError(404, "404 page not found")
            act = api.tried if query.get("dryRun") == "All" else api.answer
            status, answer = act(call, target, query, body)
            headers: Mapping[str, str] = {}
        except ApiError as error:
            status, answer, headers = error.status, error.body(), error.headers
        if cut == "after":
            return _cut(self.connection)
        return self._send(status, answer, headers, cut_within=cut == "within")

    def _send(
        self, status: int, answer: Object, headers: Mapping[str, str] | None = None, *, cut_within: bool = False
    ) -> None:
        if "as=PartialObjectMetadata" in (self.headers.get("Accept") or "") and status == 200:
            answer = {"kind": "PartialObjectMetadata", "metadata": answer["metadata"]}
        content = json.dumps(answer).encode()
        self._begin(
            status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        )
        if cut_within:
            self.wfile.write(content[: len(content) // 2])
            return _cut(self.connection)
        self.wfile.write(content)
        return None

    do_GET = do_POST = do_DELETE = _serve

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_log(self, log: ContainerLog, query: Mapping[str, str]) -> None:
        """The lines that are asked for; with follow=True, to the end of the container."""
        timestamps, follow = "timestamps" in query, "follow" in query
        self._begin(200, {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"})
        self.server.api.following |= {self.connection} if follow else set()
        position, complete = 0, False
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.api.following.discard, self.connection)
            while not complete:
                complete = log.closed or not follow  # asked before reading: what is written until then is read
                first = position == 0
                lines, position = log.read(position)
                if first and "sinceSeconds" in query:
                    oldest = (datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))).isoformat().encode()
                    lines = [line for line in lines if line >= oldest]
                if "tailLines" in query:
                    lines = lines[-int(query["tailLines"]) :]
                content = b"".join(line if timestamps else line.partition(b" ")[2] for line in lines)
                if content:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))
                if not complete:
                    time.sleep(POLL_SECONDS)
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


def _call(method: str, target: re.Match[str]) -> Call:
    group = target["api_version"].rpartition("/")[0]
    resource = "/".join(filter(None, (target["plural"], target["subresource"])))
    verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if target["name"] else "list")
    return Call(verb, group, resource)


def _selected(found: Object, query: Mapping[str, str]) -> bool:
    """Whether it has the label, and the field, that is asked for: `name=value`, once each."""
    label, _, value = query.get("labelSelector", "").partition("=")
    if label and (found["metadata"].get("labels") or {}).get(label) != value:
        return False
    path, _, value = query.get("fieldSelector", "").partition("=")
    part: Any = found
    for key in path.split(".") if path else ():
        part = part.get(key, {})
    return not path or part == value


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the client has closed it, or is dead; it says nothing more until it has an answer."""
    return bool(select.select([connection], [], [], 0)[0])


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _keep_manifest(job: Object) -> None:
    """Write an accepted PyTorchJob as it was posted to the folder OSFT_KEPT_MANIFESTS, for another schema."""
    folder = os.environ.get("OSFT_KEPT_MANIFESTS")
    if folder and job["kind"] == "PyTorchJob":
        file = Path(folder) / f"{job['metadata']['name']}-{uuid.uuid4().hex[:8]}.json"
        file.write_text(json.dumps(job), encoding="utf-8")
