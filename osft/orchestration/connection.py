"""A client of the Kubeflow Pipelines server, and its errors in the words of this project."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import kfp

IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
"""Where Kubeflow's manifests put the Pipelines API."""

_PAGE_SIZE = 100


class NotFoundError(ValueError):
    """The server does not know what was asked for."""


def connect(
    host: str | None = None,
    *,
    namespace: str | None = None,
    token_file: str | Path | None = None,
    cookies: str | None = None,
    ssl_ca_cert: str | Path | None = None,
) -> "kfp.Client":
    """A client of the Kubeflow Pipelines server.

    Args:
        host: URL of the server. None: KFP_ENDPOINT, then KF_PIPELINES_ENDPOINT, and in a pod of a cluster the service
            ml-pipeline of the namespace kubeflow.
        namespace: Namespace of your profile, where Pipelines serves several users.
        token_file: File with a bearer token. It is read again for each request, so that it can be renewed. None: the
            variable KFP_EXISTING_TOKEN (the token itself), then the token that the cluster mounts for Pipelines
            (KF_PIPELINES_SA_TOKEN_PATH, or /var/run/secrets/kubeflow/pipelines/token), then none.
        cookies: Header `Cookie` of each request, as kfp.Client takes it, such as a session of a login page.
        ssl_ca_cert: Certificate authority of the server, if it is not one that this machine trusts.

    Raises:
        ValueError: kfp is not installed, or there is no host.
        FileNotFoundError: There is no such token file.
        PermissionError: The server refuses who asks.
        ConnectionError: The server does not answer.
    """
    try:
        import kfp
        from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH
        from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
    except ImportError:
        raise ValueError("Kubeflow Pipelines needs the extra: pip install 'osft[pipelines]'") from None

    host = host or os.environ.get("KFP_ENDPOINT") or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER_HOST
    if not host:
        raise ValueError(
            "which Pipelines server? Give its URL with --host (host=…) or in KFP_ENDPOINT; after `kubectl port-forward "
            "-n kubeflow svc/ml-pipeline 8888` it is http://localhost:8888"
        )
    if "://" not in host:
        host = f"https://{host}"  # as kfp's client, without its warning
    token = None if token_file else os.environ.get("KFP_EXISTING_TOKEN")
    if token_file and not Path(token_file).is_file():
        raise FileNotFoundError(f"there is no token file {token_file}")
    mounted = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH
    if not token and not token_file and Path(mounted).is_file():
        token_file = mounted
    credentials = ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None

    class Client(kfp.Client):
        """Says at once what is wrong, where kfp's own asks five times in 20 s and logs each traceback."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return self.healthzs.healthz_service_get_healthz()

    with warnings.catch_warnings(), api_errors():
        warnings.simplefilter("ignore", FutureWarning)  # which servers kfp's client needs, at each start
        return Client(
            host=host,
            namespace=namespace or "kubeflow",
            existing_token=token,
            credentials=credentials,
            cookies=cookies,
            ssl_ca_cert=str(ssl_ca_cert) if ssl_ca_cert else None,
        )


@contextmanager
def api_errors() -> Iterator[None]:
    """Turn the errors of kfp's client into built-in ones.

    Raises:
        NotFoundError: The server does not know what is asked for.
        ValueError: It refuses the request.
        PermissionError: It refuses who asks.
        ConnectionError: It does not answer, or with an error of its own; the same request may succeed later.
    """
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        reason = _reason(error)
        if error.status in (401, 403):
            raise PermissionError(
                f"the Pipelines server refuses access ({error.status}): {reason}. Check the token and the namespace"
            ) from None
        if error.status == 404:
            raise NotFoundError(reason) from None
        if error.status in (408, 425, 429) or not 400 <= (error.status or 500) < 500:
            raise ConnectionError(f"the Pipelines server fails ({error.status}): {reason}") from None
        raise ValueError(f"the Pipelines server refuses ({error.status}): {reason}") from None
    except (HTTPError, TimeoutError) as error:
        raise ConnectionError(f"the Pipelines server does not answer: {error}") from None


def links_to_stderr() -> AbstractContextManager[Any]:
    """What kfp's client prints where it creates something; stdout is for the id, which scripts read."""
    return redirect_stdout(sys.stderr)


def _reason(error: Any) -> str:
    """What the server says, without the headers that kfp prints with it."""
    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error_message") or body.get("error"))
    except (TypeError, ValueError, AttributeError):
        return " ".join(str(error.body or error.reason).split())[:500]


def named(name: str) -> str:
    """The filter of the API for a display name. Servers differ in whether case counts: compare again."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def all_pages(fetch: Callable[..., Any], field: str, **arguments: Any) -> list[Any]:
    """The entries of all pages of a list of the API. Raises as `api_errors`."""
    found: list[Any] = []
    token = ""
    while True:
        with api_errors():
            page = fetch(page_token=token, page_size=_PAGE_SIZE, **arguments)
        found += getattr(page, field) or []
        token = page.next_page_token
        if not token:
            return found
