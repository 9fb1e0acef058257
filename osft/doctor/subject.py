"""What the doctor looks at: a configuration, a cluster, a Pipelines server, this machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from osft.doctor.cluster_view import ClusterView, in_pod
from osft.doctor.configuration import Configuration
from osft.doctor.finding import NotChecked


@dataclass(kw_only=True)
class Subject:
    """Made once, handed to every check; what is behind it is connected to when a check first needs it."""

    configured: Configuration | None = None
    """None: there is no compiled pipeline here, so nothing says what a round would need."""
    why_not_configured: str = ""
    namespace: str | None = None
    """Where the pods run. None: the pod's own, or that of kubectl's context."""
    account: str | None = None
    """Service account whose rights are asked for. None: whoever runs the doctor."""
    host: str | None = None
    """Of the Pipelines server."""
    token_file: Path | None = None
    cookie_file: Path | None = None
    pull_images: bool = False
    """Whether a pod may be started for each image."""

    @property
    def configuration(self) -> Configuration:
        """The pipeline's parameters. Raises NotChecked where there are none."""
        if self.configured is None:
            raise NotChecked(self.why_not_configured or "no parameters are given")
        return self.configured

    @cached_property
    def _connected(self) -> ClusterView | NotChecked:
        try:
            view = ClusterView(self.namespace)
            view.get("/version")
        except NotChecked as reason:
            return reason
        except ConnectionError as failure:
            return Unreachable(str(failure))
        return view

    @property
    def cluster(self) -> ClusterView:
        """Raises NotChecked where there is none, Unreachable where it does not answer."""
        if isinstance(self._connected, NotChecked):
            raise self._connected
        return self._connected

    @property
    def job_cluster(self) -> ClusterView:
        """With the namespace of the training job. Raises as `cluster`, and NotChecked if there is no job."""
        return self.cluster.within(self.job_wanted().job.namespace)

    @property
    def has_cluster(self) -> bool:
        """Whether a cluster answers."""
        return isinstance(self._connected, ClusterView)

    @property
    def in_pod(self) -> bool:
        """Whether this is a pod of the cluster, where its services and volumes are seen as a step sees them."""
        return in_pod()

    def job_wanted(self) -> Configuration:
        """The configuration, if training is a job. Raises NotChecked if not."""
        if self.configuration.launcher == "local":
            raise NotChecked('training runs in its step (launcher "local"): there is no job')
        return self.configuration


class Unreachable(NotChecked):
    """The API server of the configured cluster does not answer; the first check says so, the others need not."""
