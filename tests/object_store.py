"""An S3 stand-in for tests: moto's application behind a real HTTP server, which can be told to fail."""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

SECRET = "a-secret-that-nothing-may-write-down"
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>told to fail</Message></Error>"


class ObjectStore:
    """What `moto.server.ThreadedMotoServer` runs, with a log of the requests and faults in between."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.requests: list[tuple[str, str]] = []
        """Method and path, `/bucket/key`, of each request."""
        self._fault: Callable[[str, str], int | None] = lambda method, path: None

    @property
    def environment(self) -> dict[str, str]:
        """What its users need to have set."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "the-id-of-a-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> "ObjectStore":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()

    def bucket(self) -> str:
        """The URI of a new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.files.mkdir(name)
        return f"s3://{name}"

    @property
    def files(self) -> Any:
        """A client that looks at the store from the outside."""
        given = self.environment
        return fsspec.filesystem(
            "s3",
            key=given["AWS_ACCESS_KEY_ID"],
            secret=given["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=given["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )

    def names(self, uri: str) -> set[str]:
        """The files below a URI, relative to it."""
        base = uri.removeprefix("s3://") + "/"
        return {name.removeprefix(base) for name in self.files.find(base)}

    @contextmanager
    def failing(self, fault: Callable[[str, str], int | None]) -> Iterator[None]:
        """Answer with the status that `fault(method, path)` gives, where it gives one."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = lambda method, path: None

    def _answer(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        self.requests.append((method, path))
        status = self._fault(method, path)
        if status is None:
            return self._application(environment, start_response)
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} told to fail", [("Content-Type", "application/xml")])
        return [ERROR % (b"SlowDown" if status == 503 else b"AccessDenied")]
