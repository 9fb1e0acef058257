"""Whether the steps' account may do what the launcher of a job does.

What it does follows from the kinds of jobs; a test compares that with what manifests/common/role.yaml grants.
"""

from collections.abc import Iterator
from typing import NamedTuple

from osft.doctor.cluster_view import ClusterView
from osft.doctor.finding import Finding, error, ok
from osft.doctor.subject import Subject
from osft.doctor.trial_job import kind_of
from osft.kubernetes.kinds import JobKind


class Right(NamedTuple):
    """A rule of a Role, in RBAC's words; `resource` has its subresource after a slash."""

    group: str
    resource: str
    verbs: tuple[str, ...]


_PODS = (
    Right("", "pods", ("get", "list")),
    Right("", "pods/log", ("get",)),
    Right("", "events", ("list",)),
)


def rights_of(kind: JobKind) -> tuple[Right, ...]:
    """What the step that trains calls, with such a job: what the job needs is made once and never changed."""
    own = Right(kind.resource.group, kind.resource.plural, ("create", "get", "delete"))
    return (own, *(Right(needed.group, needed.plural, ("create", "get")) for needed in kind.needs), *_PODS)


_REMEDY = (
    "kubectl apply -k pipelines/continual_learning/manifests/base, and bind its role osft-pipeline to the account of "
    "the pipeline's steps (manifests/README.md says which that is)"
)


def check_rights(subject: Subject) -> Iterator[Finding]:
    """May the account of the steps create, follow and delete the training job?"""
    configuration, cluster = subject.job_wanted(), subject.cluster
    namespace = configuration.job.namespace or cluster.namespace
    whose = f"account {subject.account}" if subject.account else "this account"
    refused = []
    kind = kind_of(configuration.launcher)
    assert kind is not None, "the parameters were checked"
    for right in rights_of(kind):
        for verb in right.verbs:
            status = _review(cluster, namespace, subject.account, verb, right)
            if not status.get("allowed"):
                refused.append(f"{verb} {right.resource}")
                reason = f" ({status['reason']})" if status.get("reason") else ""
                text = f"{whose} may not {verb} {right.resource} in namespace {namespace}{reason}"
                yield error(f"right to {verb} {right.resource}", text, _REMEDY)
    if not refused:
        mine = not subject.account and not subject.in_pod
        hint = ". These are your own rights; those of the steps: --service-account pipeline-runner" if mine else ""
        yield ok("rights", f"{whose} may do all that the launcher does in namespace {namespace}{hint}")


def _review(cluster: ClusterView, namespace: str, account: str | None, verb: str, right: Right) -> dict[str, str]:
    """The status of an access review: of whoever asks, or of a service account, which takes the right to ask it."""
    resource, _, subresource = right.resource.partition("/")
    attributes = {"namespace": namespace, "verb": verb, "group": right.group, "resource": resource}
    attributes |= {"subresource": subresource} if subresource else {}
    kind = "SubjectAccessReview" if account else "SelfSubjectAccessReview"
    spec: dict[str, object] = {"resourceAttributes": attributes}
    if account:
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{cluster.namespace}", "system:authenticated"]
        spec |= {"user": f"system:serviceaccount:{cluster.namespace}:{account}", "groups": groups}
    question = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
    return cluster.ask(f"/apis/authorization.k8s.io/v1/{kind.lower()}s", question)
