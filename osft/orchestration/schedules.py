"""Recurring runs by name: creating one again changes nothing, or replaces it.

The API has no update and does not keep names unique. What a schedule does is therefore kept as a hash in its
description, and replacing goes in four steps: create the new one disabled, disable the old, enable the new, delete the
old. At no time are two enabled. A process that dies on the way leaves at most one enabled, and two of the name: the
sign for the next call to resume from there. (Two that create the same name at the same moment do not see each other;
the next call leaves one.) A pause is the user's and outlives a replacement: the new one's description then says
"paused", so that a crash does not undo the pause.

A server before 2.16 ends the run that is under way when its recurring run is deleted (kubeflow/pipelines#12573), a
newer one can leave it, and neither says which it is. So what has a run under way is disabled, which ends none, and
stays until a call that finds the run ended.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from osft.orchestration.arguments import refuse_missing
from osft.orchestration.connection import NotFoundError, all_pages, api_errors, links_to_stderr, named
from osft.orchestration.pipelines import UploadedPipeline, content_digest
from osft.orchestration.runs import EXPERIMENT, FINAL_STATES
from osft.orchestration.triggers import Trigger
from osft.settings.base import refuse_unknown

if TYPE_CHECKING:
    import kfp

logger = logging.getLogger(__name__)

_MARK = "osft-schedule "
_PAUSED = ", paused when it was made"
_NEWEST_RUNS = 100
"""In which one that is under way is looked for."""

Outcome = Literal["created", "unchanged", "replaced", "repaired"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A recurring run on the server."""

    name: str
    recurring_run_id: str
    enabled: bool
    trigger: str
    pipeline_version_id: str | None
    """None: each run takes the pipeline's newest version."""
    max_concurrency: int
    no_catchup: bool
    parameters: dict[str, Any] = field(default_factory=dict)
    ours: bool = True
    """False: it was made by other means than this module."""
    outcome: Outcome | None = None
    """What `create_schedule` did."""

    @property
    def state(self) -> str:
        """ "enabled" or "paused"."""
        return "enabled" if self.enabled else "paused"


def create_schedule(
    client: "kfp.Client",
    name: str,
    pipeline: UploadedPipeline,
    trigger: Trigger,
    arguments: Mapping[str, Any] | None = None,
    *,
    experiment: str = EXPERIMENT,
    no_catchup: bool = True,
    max_concurrency: int = 1,
    start_time: str | None = None,
    end_time: str | None = None,
    paused: bool = False,
    service_account: str | None = None,
    pipeline_root: str | None = None,
) -> Schedule:
    """Have the schedule `name` on the server, once, with this content.

    One with the same content stays as it is, also paused. One with another content is replaced; if it was paused, so
    is the new one.

    Args:
        client: From `connect`.
        name: Of the schedule; unique in the namespace, which is what this function takes care of.
        pipeline: From `upload` or `find_pipeline`. With `follows_latest` each run takes the newest version.
        trigger: From `parse_trigger`.
        arguments: Parameters over the pipeline's defaults.
        experiment: Made if it is not there.
        no_catchup: After a pause, start the last missed run only, not all of them.
        max_concurrency: Runs at a time, 1 to 10.
        start_time: RFC 3339; no run before.
        end_time: RFC 3339; no run after.
        paused: Make it disabled; `resume_schedule` starts it.
        service_account: As in `submit`.
        pipeline_root: As in `submit`.

    Raises: ValueError for a parameter or a number that cannot be, before anything is sent, and if the name is taken by
    a recurring run that was made by other means; as `api_errors`.
    """
    arguments = dict(arguments or {})
    refuse_unknown(arguments, pipeline.parameters)
    refuse_missing(pipeline.parameters, arguments)
    if not 1 <= max_concurrency <= 10:
        raise ValueError(f"max_concurrency must be between 1 and 10, got {max_concurrency}")
    existing = _of_name(client, name)
    if not all(_is_ours(one) for one in existing):
        raise ValueError(
            f"there is a recurring run {name!r} that was not made by osft: take another name, or delete it with "
            f"`osft schedule delete {name}`"
        )
    with api_errors(), links_to_stderr():
        group = client.create_experiment(experiment, namespace=client.get_user_namespace() or None)
    body = recurring_run(
        name,
        pipeline,
        trigger,
        arguments,
        experiment_id=group.experiment_id,
        no_catchup=no_catchup,
        max_concurrency=max_concurrency,
        start_time=start_time,
        end_time=end_time,
        service_account=service_account,
        pipeline_root=pipeline_root,
    )
    same = [one for one in existing if one.description.removesuffix(_PAUSED) == body["description"]]
    if same:
        keep = min(same, key=lambda one: (not _enabled(one), one.created_at))
        others = [one for one in existing if one is not keep]
        if not others:
            return _schedule(keep, "unchanged")
        _leave_only(client, keep, others, enabled=_should_run(existing))
        return _schedule(_get(client, keep), "repaired")
    run = _should_run(existing) if existing else True
    run = run and not paused
    if not run:
        body["description"] += _PAUSED
    # The first of its name may start enabled; a second waits until the first is off.
    new = _post(client, body | {"mode": "ENABLE" if run and not existing else "DISABLE"})
    if existing:
        _leave_only(client, new, existing, enabled=run)
    return _schedule(_get(client, new), "replaced" if existing else "created")


def recurring_run(
    name: str,
    pipeline: UploadedPipeline,
    trigger: Trigger,
    arguments: Mapping[str, Any],
    *,
    experiment_id: str,
    no_catchup: bool,
    max_concurrency: int,
    start_time: str | None = None,
    end_time: str | None = None,
    service_account: str | None = None,
    pipeline_root: str | None = None,
) -> dict[str, Any]:
    """The fields of the API's recurring run, without its mode."""
    times = {"start_time": start_time, "end_time": end_time}
    body: dict[str, Any] = {
        "display_name": name,
        "experiment_id": experiment_id,
        "pipeline_version_reference": {
            "pipeline_id": pipeline.pipeline_id,
            "pipeline_version_id": None if pipeline.follows_latest else pipeline.version_id,
        },
        "runtime_config": {"parameters": dict(arguments), "pipeline_root": pipeline_root},
        "trigger": {"cron_schedule": times | {"cron": trigger.cron}}
        if trigger.cron
        else {"periodic_schedule": times | {"interval_second": trigger.interval_seconds}},
        "no_catchup": no_catchup,
        "max_concurrency": max_concurrency,
        "service_account": service_account,
    }
    return body | {"description": f"{_MARK}sha256:{content_digest(body)}"}


def list_schedules(client: "kfp.Client") -> list[Schedule]:
    """All recurring runs, sorted by name. Raises: as `api_errors`."""
    namespace = client.get_user_namespace() or None
    found = all_pages(client.list_recurring_runs, "recurring_runs", namespace=namespace)
    return sorted((_schedule(one) for one in found), key=lambda one: one.name)


def pause_schedule(client: "kfp.Client", name: str) -> Schedule:
    """Start no more runs; the one that runs continues. Raises ValueError if there is none, and as `api_errors`."""
    return _switch(client, name, enabled=False)


def resume_schedule(client: "kfp.Client", name: str) -> Schedule:
    """Start runs again. Raises ValueError if there is none, and as `api_errors`."""
    return _switch(client, name, enabled=True)


def delete_schedule(client: "kfp.Client", name: str) -> int:
    """Delete all recurring runs of this name and return how many there were; their runs stay.

    Raises ValueError if there is none, and if one has a run under way: then it is paused; and as `api_errors`.
    """
    existing = _existing(client, name)
    for one in existing:
        if _enabled(one):
            _call(client.disable_recurring_run, one)
    under_way = [run for one in existing for run in _delete(client, one)]
    if under_way:
        raise ValueError(
            f"{name} is paused, and not deleted: that may end its run that is under way ({', '.join(under_way)}). "
            "Delete it when the run has ended, or cancel the run (`osft cancel`) before"
        )
    return len(existing)


def _switch(client: "kfp.Client", name: str, *, enabled: bool) -> Schedule:
    """Of several, which an interrupted replacement leaves, the one stays that was enabled, or else the newest."""
    existing = _existing(client, name)
    keep = max(existing, key=lambda one: (_enabled(one), one.created_at))
    others = [one for one in existing if one is not keep] if all(map(_is_ours, existing)) else []
    _leave_only(client, keep, others, enabled=enabled)
    return _schedule(_get(client, keep))


def _leave_only(client: "kfp.Client", keep: Any, others: list[Any], *, enabled: bool) -> None:
    """In an order in which never two are enabled, and the last deletion is what ends it."""
    for one in others:
        if _enabled(one):
            _call(client.disable_recurring_run, one)
    if enabled and not _enabled(keep):
        _call(client.enable_recurring_run, keep)
    if not enabled and _enabled(keep):
        _call(client.disable_recurring_run, keep)
    for one in others:
        for run in _delete(client, one):
            logger.warning(
                f"{one.display_name}: what it replaces has a run under way ({run}), which its deletion may end. It is "
                "disabled, and goes with the next change after that"
            )


def _should_run(existing: list[Any]) -> bool:
    """Whether the schedule is meant to run: a single one that is off was paused; of several, a call died on its way."""
    if any(map(_enabled, existing)):
        return True
    newest = max(existing, key=lambda one: one.created_at)
    return len(existing) > 1 and not newest.description.endswith(_PAUSED)


def _existing(client: "kfp.Client", name: str) -> list[Any]:
    existing = _of_name(client, name)
    if not existing:
        names = ", ".join(sorted({one.name for one in list_schedules(client)})) or "none"
        raise NotFoundError(f"there is no schedule {name!r}; there are: {names}")
    return existing


def _of_name(client: "kfp.Client", name: str) -> list[Any]:
    namespace = client.get_user_namespace() or None
    found = all_pages(client.list_recurring_runs, "recurring_runs", filter=named(name), namespace=namespace)
    return [one for one in found if one.display_name == name]


def _post(client: "kfp.Client", body: dict[str, Any]) -> Any:
    """Create what `kfp.Client.create_recurring_run` would, which cannot leave the version open."""
    import kfp_server_api as api

    ((kind, times),) = body["trigger"].items()
    schedule = api.V2beta1CronSchedule if kind == "cron_schedule" else api.V2beta1PeriodicSchedule
    message = api.V2beta1RecurringRun(
        **body
        | {
            "trigger": api.V2beta1Trigger(**{kind: schedule(**times)}),
            "runtime_config": api.V2beta1RuntimeConfig(**body["runtime_config"]),
            "pipeline_version_reference": api.V2beta1PipelineVersionReference(**body["pipeline_version_reference"]),
        }
    )
    with api_errors():
        return client.recurring_runs.recurring_run_service_create_recurring_run(recurring_run=message)


def _get(client: "kfp.Client", one: Any) -> Any:
    with api_errors():
        return client.get_recurring_run(one.recurring_run_id)


def _call(request: Any, one: Any) -> None:
    with api_errors():
        request(one.recurring_run_id)


def _delete(client: "kfp.Client", one: Any) -> list[str]:
    """Delete it, unless it has runs under way, whose ids are returned."""
    with api_errors():
        namespace = client.get_user_namespace() or None
        newest = client.list_runs(page_size=_NEWEST_RUNS, sort_by="created_at desc", namespace=namespace).runs or []
    of_it = [run for run in newest if run.recurring_run_id == one.recurring_run_id]
    under_way = [str(run.run_id) for run in of_it if run.state not in FINAL_STATES]
    if not under_way:
        with suppress(NotFoundError), api_errors():  # someone else was faster
            # One that starts at this moment is left, if the server can.
            client.recurring_runs.recurring_run_service_delete_recurring_run(
                one.recurring_run_id, propagation_policy="ORPHAN"
            )
    return under_way


def _enabled(one: Any) -> bool:
    return bool(one.status == "ENABLED")


def _is_ours(one: Any) -> bool:
    return (one.description or "").startswith(_MARK)


def _schedule(one: Any, outcome: Outcome | None = None) -> Schedule:
    cron, periodic = (getattr(one.trigger, kind, None) for kind in ("cron_schedule", "periodic_schedule"))
    trigger = Trigger(
        cron=cron.cron if cron else None, interval_seconds=int(periodic.interval_second) if periodic else None
    )
    reference = one.pipeline_version_reference
    return Schedule(
        name=one.display_name,
        recurring_run_id=one.recurring_run_id,
        enabled=_enabled(one),
        trigger=str(trigger) if cron or periodic else "never",
        pipeline_version_id=(reference.pipeline_version_id if reference else None) or None,
        max_concurrency=int(one.max_concurrency or 1),
        no_catchup=bool(one.no_catchup),
        parameters=(one.runtime_config.parameters if one.runtime_config else None) or {},
        ours=_is_ours(one),
        outcome=outcome,
    )
