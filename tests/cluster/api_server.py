"""The API server of the stand-in: kmock's, with what kmock 0.8 lacks.

Its own: `watch=True`, label and field selectors, pod logs, uid, creationTimestamp and resourceVersion, 409 and 422,
deletion that waits, PUT and merge patches, bearer tokens, RBAC, faults. kmock's: the HTTP side and API discovery.
"""

import asyncio
import json
import os
import secrets
import threading
import uuid
from pathlib import Path
from typing import Any

import aiohttp.web
import kmock
import yaml

from tests.cluster.access import Call, allows, verb_of
from tests.cluster.errors import ApiError
from tests.cluster.faults import Faults
from tests.cluster.pod_logs import LogRequest, PodLogs
from tests.cluster.selection import by_fields, by_labels
from tests.cluster.store import KINDS, Store
from tests.cluster.streams import Streams, write_log, write_watch

KEPT_REQUESTS = 50  # kmock keeps every request and slows down with their number
SERVICE_ACCOUNT = "system:serviceaccount:{namespace}:pipeline-runner"


def _keep_manifest(name: str, body: dict[str, Any]) -> None:
    """Write a job as it was posted to the folder OSFT_KEPT_MANIFESTS, for whoever wants to check it otherwise, too."""
    folder = os.environ.get("OSFT_KEPT_MANIFESTS")
    if folder:
        file = Path(folder) / f"{name}-{uuid.uuid4().hex[:8]}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(body), encoding="utf-8")


class Cut(Exception):
    """The connection is to be reset."""


class ApiServer(kmock.KubernetesScaffold):
    """Serve `store` on a port of the loopback interface, in a thread of its own, from `start()` to `stop()`."""

    def __init__(self, store: Store, logs: PodLogs, faults: Faults, namespace: str) -> None:
        super().__init__(strict=True)  # an error of the stand-in itself is raised by stop()
        self.store, self.logs, self.faults, self.home = store, logs, faults, namespace
        self.calls: list[Call] = []
        self.role: dict[str, Any] | None = None
        self.token = secrets.token_urlsafe(16)
        self.streams = Streams()
        self.address = ""
        self._refusal: ApiError | None = None
        """What everything is answered with while the server starts."""
        for kind in KINDS.values():
            self.resources[f"{kind.api_version}/{kind.plural}"] = kmock.ResourceInfo(kind=kind.name, namespaced=True)
        self._started, self._stopping = threading.Event(), asyncio.Event()
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="api-server", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Raises what went wrong inside the stand-in while it served."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        if self._failure:
            raise self._failure

    def write_kubeconfig(self, path: Path) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": {"server": self.address}}],
            "users": [{"name": "pipeline-runner", "user": {"token": self.token}}],
            "contexts": [
                {
                    "name": "stand-in",
                    "context": {"cluster": "stand-in", "user": "pipeline-runner", "namespace": self.home},
                }
            ],
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        path.chmod(0o600)

    def restart(self, refused: float, forbidden: float, unavailable: float) -> None:
        """As `Cluster.restart_api`."""
        asyncio.run_coroutine_threadsafe(self._restart(refused, forbidden, unavailable), self._loop)

    def drop_streams(self, clean: bool = False) -> None:
        """Cut every open log stream and watch; `clean`: end it as a server does whose time for it is over."""
        asyncio.run_coroutine_threadsafe(self.streams.drop(clean), self._loop).result()

    def stall_streams(self) -> None:
        """Leave every open stream open, with nothing more to come."""
        self._loop.call_soon_threadsafe(self.streams.stall)

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._serve_until_stopped())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve_until_stopped(self) -> None:
        async with self:
            self._runner = aiohttp.web.ServerRunner(aiohttp.web.Server(self), shutdown_timeout=0.1)
            await self._runner.setup()
            self._site = aiohttp.web.TCPSite(self._runner, "127.0.0.1", 0)
            await self._site.start()
            self._port = self._runner.addresses[0][1]
            self.address = f"http://127.0.0.1:{self._port}"
            self._started.set()
            await self._stopping.wait()
            await self.streams.drop(clean=False)
            await self._runner.cleanup()

    async def _restart(self, refused: float, forbidden: float, unavailable: float) -> None:
        await self._site.stop()
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(refused)
        self._site = aiohttp.web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()
        self._refusal = ApiError(403, "forbidden: not yet ready to handle request")
        await asyncio.sleep(forbidden)
        self._refusal = ApiError(503, "apiserver is shutting down")
        await asyncio.sleep(unavailable)
        self._refusal = None

    async def _handle(self, request: kmock.Request) -> aiohttp.web.StreamResponse:
        del self._requests[:-KEPT_REQUESTS]
        raw = request._raw_request
        assert raw is not None
        try:
            if request.resource is None or request.resource.plural is None:
                self._authenticate(request)
                return await super()._handle(request)
            return await self._answer(request, request.resource, raw)
        except kmock.KubernetesError as error:
            return await self._render_error(error)
        except ApiError as error:
            return aiohttp.web.json_response(error.body(), status=error.status, headers=error.headers)
        except Cut:
            if raw.transport is not None:
                raw.transport.abort()
            return aiohttp.web.Response()

    async def _answer(
        self, request: kmock.Request, resource: kmock.resource, raw: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        plural = str(resource.plural)
        watch = request.params.get("watch", "").lower() in ("true", "1")
        verb = verb_of(request.method.value.upper(), request.name, watch)
        call = Call(
            verb,
            str(resource.group),
            f"{plural}/{request.subresource}" if request.subresource else plural,
        )
        self.calls.append(call)
        self._authenticate(request)
        if self._refusal is not None:
            raise self._refusal
        faults = self.faults.take(call)
        await asyncio.sleep(sum(fault.seconds for fault in faults))
        for fault in faults:
            if fault.status:
                message = fault.message or f"the test refuses {call.verb} {call.resource}"
                raise ApiError(fault.status, message, headers=fault.headers)
            if fault.cut == "before":
                raise Cut
        self._authorize(call, request)
        kind = KINDS.get(plural)
        if kind is None or (kind.group, kind.version) != (resource.group, resource.version):
            raise ApiError(404, "the server could not find the requested resource")
        response = await self._serve(call, plural, request, raw)
        if any(fault.cut == "after" for fault in faults):
            raise Cut
        if any(fault.cut == "within" for fault in faults):
            return await self._break_off(response, raw)
        return response

    async def _break_off(
        self, response: aiohttp.web.StreamResponse, raw: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        """Send a body up to its middle, and close the connection."""
        assert isinstance(response, aiohttp.web.Response)
        assert isinstance(response.body, bytes)
        broken = aiohttp.web.StreamResponse(status=response.status)
        broken.content_type, broken.content_length = response.content_type, len(response.body)
        await broken.prepare(raw)
        await broken.write(response.body[: len(response.body) // 2])
        if raw.transport is not None:
            raw.transport.close()
        return broken

    def _authenticate(self, request: kmock.Request) -> None:
        given = {key.lower(): value for key, value in request.headers.items()}.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise ApiError(401, "Unauthorized")

    def _authorize(self, call: Call, request: kmock.Request) -> None:
        inside = request.namespace == self.home  # a Role holds in its own namespace only
        if self.role is not None and not (inside and allows(self.role, call, request.name)):
            what = call.resource.split("/")[0] + (f".{call.group}" if call.group else "")
            raise ApiError(
                403,
                f'{what} "{request.name or ""}" is forbidden: User "{SERVICE_ACCOUNT.format(namespace=self.home)}"'
                f' cannot {call.verb} resource "{call.resource}" in API group "{call.group}" in the namespace '
                f'"{request.namespace}"',
            )

    async def _serve(
        self, call: Call, plural: str, request: kmock.Request, raw: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        if request.subresource == "log" and plural == "pods" and call.verb == "get":
            return await self._serve_log(request, raw)
        if request.subresource not in (None, "status"):
            raise ApiError(404, f"the stand-in has no subresource {call.resource}")
        if call.verb == "watch":
            return await self._serve_watch(plural, request, raw)
        with self.store.lock:
            # Made into text while nobody changes the object.
            status, body = self._serve_objects(call, plural, request)
            text = json.dumps(body)
        return aiohttp.web.json_response(text=text, status=status)

    def _serve_objects(self, call: Call, plural: str, request: kmock.Request) -> tuple[int, dict[str, Any]]:
        if call.verb == "list":
            return 200, self._list(plural, request)
        if call.verb == "create":
            if request.namespace is None:
                raise ApiError(405, "objects are created in a namespace")
            dry_run = request.params.get("dryRun") == "All"
            body = self._object(request)
            created = self.store.create(plural, body, request.namespace, dry_run)
            if plural == "pytorchjobs":
                _keep_manifest(created["metadata"]["name"], body)
            return 201, created
        if request.name is None or request.namespace is None:
            raise ApiError(405, f"the stand-in does not {call.verb} {plural} without a name and a namespace")
        found = self.store.get(plural, request.namespace, request.name)
        if call.verb == "get":
            return 200, found
        if call.verb == "delete":
            return 200, self._delete(found, request)
        if call.verb == "update":
            return 200, self._replace(found, self._object(request), plural, request)
        if call.verb == "patch":
            if "json-patch" in request.headers.get("Content-Type", ""):
                raise ApiError(415, "the stand-in takes merge patches, and no JSON patches")
            return 200, self._replace(found, merged(found, self._object(request)), plural, request)
        raise ApiError(405, f"the stand-in cannot {call.verb} {plural}")

    def _object(self, request: kmock.Request) -> dict[str, Any]:
        if not isinstance(request.data, dict):
            raise ApiError(400, "the body is not a JSON object")
        return request.data

    def _replace(
        self, found: dict[str, Any], new: dict[str, Any], plural: str, request: kmock.Request
    ) -> dict[str, Any]:
        if request.subresource == "status":
            found["status"] = new.get("status") or {}
            self.store.changed(found)
            return found
        return self.store.update(plural, str(request.namespace), str(request.name), new)

    def _delete(self, found: dict[str, Any], request: kmock.Request) -> dict[str, Any]:
        options = request.data if isinstance(request.data, dict) else {}
        grace = options.get("gracePeriodSeconds", request.params.get("gracePeriodSeconds"))
        self.store.delete(
            found,
            propagation=options.get("propagationPolicy") or request.params.get("propagationPolicy"),
            grace_seconds=None if grace is None else int(grace),
            preconditions=options.get("preconditions"),
        )
        return found

    def _list(self, plural: str, request: kmock.Request) -> dict[str, Any]:
        labels = by_labels(request.params.get("labelSelector"))
        fields = by_fields(plural, request.params.get("fieldSelector"))
        items = [
            found
            for found in self.store.objects(plural, request.namespace)
            if labels(found) and fields(found) and request.name in (None, found["metadata"]["name"])
        ]
        kind = KINDS[plural]
        return {
            "apiVersion": kind.api_version,
            "kind": f"{kind.name}List",
            "metadata": {"resourceVersion": str(self.store.version)},
            "items": items,
        }

    async def _serve_watch(
        self, plural: str, request: kmock.Request, raw: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        labels = by_labels(request.params.get("labelSelector"))
        fields = by_fields(plural, request.params.get("fieldSelector"))

        def selected(found: dict[str, Any]) -> bool:
            inside = request.namespace in (None, found["metadata"]["namespace"])
            return inside and request.name in (None, found["metadata"]["name"]) and labels(found) and fields(found)

        since, seconds = request.params.get("resourceVersion"), request.params.get("timeoutSeconds")
        with self.streams.opened(raw) as stream:
            return await write_watch(
                stream,
                self.store,
                plural,
                selected,
                int(since) if since and since != "0" else None,
                float(seconds) if seconds else None,
            )

    async def _serve_log(self, request: kmock.Request, raw: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        with self.store.lock:
            pod = self.store.get("pods", str(request.namespace), str(request.name))
            log = self.logs.open(pod, LogRequest.parse(request.params))
        with self.streams.opened(raw) as stream:
            return await write_log(stream, log)


def merged(found: Any, patch: Any) -> Any:
    """`found` after a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(found) if isinstance(found, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
