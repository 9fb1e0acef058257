"""Which model a round trains, and whether there is something new for it to learn."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from osft import storage
from osft.data import examples
from osft.data.files import check_names, data_files, data_name
from osft.data.records import DataError, report_lines
from osft.rounds.pipeline_run import ROUND_FILE, PipelineRun
from osft.rounds.resolution import ResolvedRound, resolve
from osft.tracking import runs
from osft.tracking.addresses import check_model_name
from osft.tracking.runs import Outcome

logger = logging.getLogger(__name__)


def resolve_round(
    run: PipelineRun,
    *,
    model_name: str,
    base_model: str,
    data_uri: str,
    anchor_uris: Sequence[str],
    gate: Mapping[str, Any],
    min_new_samples: int,
    experiment: str,
    run_name: str,
) -> tuple[ResolvedRound, str]:
    """Find the model to train and the records that are new to it; `round.json`.

    Returns that, and the pipeline's MLflow run.

    What would end the round later is refused here, before anything is fetched, converted or computed.
    """
    from osft.evaluation.gate import GateRules

    check_model_name(model_name)
    for uri in (base_model, data_uri, *anchor_uris):
        storage.is_remote(uri)  # refuses credentials, before anything is written down
    mlflow = run.mlflow()
    parent = runs.pipeline_run(
        mlflow,
        experiment=experiment,
        pipeline_run_id=run.pipeline_run_id,
        name=run_name,
        storage_root=run.storage_root,
    )
    with runs.step_run(mlflow, parent, "resolve_round") as step:
        step.log_params({"model_name": model_name, "base_model": base_model, "data_uri": data_uri})
        step.log_params({"anchor_uris": anchor_uris, "min_new_samples": min_new_samples, "gate": json.dumps(gate)})
        GateRules.from_parameters(gate)
        check_names(anchor_uris)
        for uri in anchor_uris:
            if not uri.startswith(examples.SCHEME):
                data_files(uri)
        found = resolve(
            mlflow,
            model_name=model_name,
            base_model=base_model,
            data_uri=data_uri,
            storage_root=run.storage_root,
            min_new_samples=min_new_samples,
        )
        for uri in anchor_uris:
            if data_name(uri) in (found.task, *found.earlier_tasks):
                raise DataError(
                    f"the anchor {uri} has the name of a task of {model_name}, {data_name(uri)!r}. What was learned is "
                    "evaluated anyway: leave it out of anchor_uris, or rename the file if it is something else"
                )
        step.log_artifact(run.write_record(ROUND_FILE, found))
        step.log_params({"task": found.task, "parent_version": found.parent_version or "none"})
        step.log_metrics({"records": found.data.num_records, "new_records": found.data.num_new})
        for line in (found.nothing_to_learn or _described(found, model_name), *report_lines(found.conversions)):
            logger.info(f"round: {line}")
        if found.nothing_to_learn:
            step.tag_round(model_name=model_name, outcome=Outcome.NOTHING_TO_LEARN)
            mlflow.set_terminated(parent, "FINISHED")
        else:
            step.tag_round(model_name=model_name, task=found.task, parent_version=found.parent_version)
    return found, parent


def _described(found: ResolvedRound, model_name: str) -> str:
    on_top = "the base model" if found.parent_version is None else f"version {found.parent_version} of {model_name}"
    return f"{found.data.num_new} of {found.data.num_records} records are new; {on_top} learns {found.task}"
