"""Small PyTorchJobs whose containers are shell scripts."""

from typing import Any


def pytorch_job(
    name: str,
    master: str,
    worker: str = "sleep 60",
    *,
    workers: int = 0,
    restart_policy: str = "ExitCode",
    container: dict[str, Any] | None = None,
    pod: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    owner: dict[str, Any] | None = None,
    nproc_per_node: str | None = None,
    elastic: dict[str, Any] | None = None,
    run_policy: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`master` and `worker`: scripts for `sh -c`. `container` and `pod`: further fields of either's spec."""

    def replica(count: int, script: str) -> dict[str, Any]:
        main = {"name": "pytorch", "image": "stand-in", "command": ["sh", "-c", script], **(container or {})}
        template = {"spec": {"containers": [main], "terminationGracePeriodSeconds": 5, **(pod or {})}}
        return {"replicas": count, "restartPolicy": restart_policy, "template": template}

    replicas = {"Master": replica(1, master)}
    if workers:
        replicas["Worker"] = replica(workers, worker)
    spec: dict[str, Any] = {"runPolicy": run_policy or {}, "pytorchReplicaSpecs": replicas}
    spec |= {"nprocPerNode": nproc_per_node} if nproc_per_node else {}
    spec |= {"elasticPolicy": elastic} if elastic is not None else {}
    metadata: dict[str, Any] = {"name": name, "labels": labels or {}}
    if owner is not None:
        reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "blockOwnerDeletion": True}
        metadata["ownerReferences"] = [reference | {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}]
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec}
