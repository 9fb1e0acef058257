"""What is new, and the data that training reads."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osft import examples, storage
from osft.data.files import check_names, data_files, data_name
from osft.data.records import DataError, read_records, report_lines
from osft.rounds.resolve import ResolvedRound
from osft.rounds.resolve import resolve_round as resolve
from osft.steps.round import ROUND_FILE, Round
from osft.tracking import runs
from osft.tracking.addresses import check_model_name
from osft.tracking.runs import Outcome


def resolve_round(
    round: Round,
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
    """Find the model that goes on and what is new for it; `round.json`. Returns that, and the pipeline's MLflow run.

    What would end the round later is refused here, before anything is fetched, converted or computed.
    """
    from osft.evaluation.gate import GateRules

    check_model_name(model_name)
    for uri in (base_model, data_uri, *anchor_uris):
        storage.is_remote(uri)  # refuses credentials, before anything is written down
    mlflow = round.mlflow()
    parent = runs.pipeline_run(
        mlflow,
        experiment=experiment,
        pipeline_run_id=round.pipeline_run_id,
        name=run_name,
        storage_root=round.storage_root,
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
            storage_root=round.storage_root,
            min_new_samples=min_new_samples,
        )
        for uri in anchor_uris:
            if data_name(uri) in (found.task, *found.earlier_tasks):
                raise DataError(
                    f"the anchor {uri} has the name of a task of {model_name}, {data_name(uri)!r}. What was learned is "
                    "evaluated anyway: leave it out of anchor_uris, or rename the file if it is something else"
                )
        step.log_artifact(round.write_record(ROUND_FILE, json.loads(found.to_json())))
        step.log_params({"task": found.task, "parent_version": found.parent_version or "none"})
        step.log_metrics({"records": found.data.num_records, "new_records": found.data.num_new})
        for line in (found.nothing_to_learn or _described(found, model_name), *report_lines(found.conversions)):
            print(f"round: {line}", flush=True)
        if found.nothing_to_learn:
            step.tag_round(model_name=model_name, outcome=Outcome.NOTHING_TO_LEARN)
            mlflow.set_terminated(parent, "FINISHED")
        else:
            step.tag_round(model_name=model_name, task=found.task, parent_version=found.parent_version)
    return found, parent


def _described(found: ResolvedRound, model_name: str) -> str:
    on_top = "the base model" if found.parent_version is None else f"version {found.parent_version} of {model_name}"
    return f"{found.data.num_new} of {found.data.num_records} records are new; {on_top} learns {found.task}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRound:
    """What `prepare_data` hands to the other steps."""

    base_model_path: str
    model_path: str
    """Of the model to train: the champion, or the base model."""
    data_path: str
    anchor_paths: list[str]
    statistics: dict[str, Any]


def prepare_data(
    round: Round,
    *,
    base_model: str,
    model: str,
    records: str,
    anchor_uris: Sequence[str],
    max_seq_len: int,
    validation_fraction: float,
    max_train_samples: int,
    max_validation_samples: int,
) -> PreparedRound:
    """Fetch what is named by URI, check every evaluation set, and prepare the new records for training.

    `base_model` is as the user gave it, `model` and `records` are those of `resolve_round`.
    """
    from osft.data.prepare import prepare
    from osft.models import model_folder, stored_model
    from osft.preflight import check_data, preflight

    root = round.storage_root
    fetched = storage.join(root, "examples")
    with round.step("prepare_data") as step:
        anchors = [examples.resolve(uri, fetched) for uri in anchor_uris]
        for anchor in anchors:
            counts: Counter[str] = Counter()
            for _ in read_records(anchor, allow_text=True, counts=counts):
                pass
            for line in report_lines(counts):
                print(f"{anchor}: {line}", flush=True)
        base = stored_model(examples.resolve(base_model, fetched), storage.join(root, "models"))
        if model == base_model:
            model = base
        folder = model_folder(model)
        print(preflight(folder).line(), flush=True)
        check_chats(anchors, folder)
        prepared = prepare(
            records,
            folder,
            storage.join(root, "data"),
            max_seq_len=max_seq_len,
            validation_fraction=validation_fraction,
            hold_out_a_prompt=True,
            max_train_samples=max_train_samples,
            max_validation_samples=max_validation_samples,
        )
        check_data(prepared.folder, folder)
        resolved = round.resolved()
        step.log_dataset(
            name=resolved.task,
            digest=prepared.key,
            source=resolved.data.uri,
            num_records=prepared.statistics["num_train_samples"],
            context="training",
            to_parent=True,
        )
        step.log_params(prepared.statistics["settings"])
        step.log_metrics({k: v for k, v in prepared.statistics.items() if isinstance(v, int)})
        step.log_artifact(prepared.folder / "dataset.json")
    return PreparedRound(
        base_model_path=base,
        model_path=model,
        data_path=storage.join(root, "data", prepared.key),
        anchor_paths=anchors,
        statistics=prepared.statistics,
    )


def check_chats(uris: Sequence[str], model_path: Path) -> None:
    """Raise DataError for a record that the model's chat template cannot render as evaluation will ask it to."""
    from transformers import AutoTokenizer

    from osft.data.chat import tokenize

    if uris:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for uri in uris:
            for record in read_records(uri, allow_text=True):
                tokenize(record, tokenizer)
