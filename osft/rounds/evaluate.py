"""Measure what was learned and what was forgotten, and decide."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from osft import storage
from osft.evaluation.record import ContinualMatrix, Decision, Evaluation, SetScore
from osft.models.training_summary import TrainingSummary
from osft.rounds.pipeline_run import EVALUATION_FILE, FACTORS_FILE, REPORT_FILE, TRAINING_FILE, PipelineRun, read_json
from osft.tracking import lineage, runs
from osft.tracking.lineage import Lineage, Row, Scores

logger = logging.getLogger(__name__)

_METRICS = ("loss", "loss_stderr", "accuracy", "accuracy_stderr")
"""Of the scores, what a later round needs."""
SELF_WRITTEN = "self-written text"
"""The name of the evaluation set."""


def evaluate_model(
    run: PipelineRun,
    *,
    model_name: str,
    base_model_path: str,
    model_path: str,
    parent_version: int | None,
    checkpoint_path: str,
    data_path: str,
    task: str,
    anchor_paths: Sequence[str],
    max_anchor_samples: int,
    gate: Mapping[str, Any],
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_folder: str = "",
    max_lm_eval_samples: int = 0,
    accelerators: str = "",
) -> Evaluation:
    """Measure base, champion and candidate on the new task, on every earlier one and on the anchors, and decide.

    With protect="activations" the drift is measured on the text that the base model wrote, too, which the statistics
    name that the factors were computed from.
    Writes `evaluation.json` and `report.html` to the round's folder.
    """
    from osft.evaluation.evaluate import evaluate, load_set
    from osft.evaluation.gate import GateRules, MeasuredVersion, decide
    from osft.evaluation.report import render_report
    from osft.subspace.factor_summary import FactorSummary
    from osft.training.statistics import self_written_text

    rules = GateRules.from_parameters(gate)
    with run.step("evaluate_model") as step:
        step.log_params({"gate": json.dumps(rules.to_parameters()), "max_anchor_samples": max_anchor_samples})
        step.log_params({"lm_eval_tasks": lm_eval_tasks, "accelerators": accelerators})
        sets = [load_set(storage.join(data_path, "validation.jsonl"), "new task", name=task)]
        models, versions, parent = {"base": base_model_path}, list[int](), None
        if parent_version is not None:
            models["champion"] = model_path
            history = lineage.history(step.client, model_name, parent_version)
            versions, parent = list(history), history[parent_version]
            earlier = lineage.earlier_evaluation_sets(step.client, model_name, history, run.folder / "evaluation_sets")
            sets += [load_set(str(file), "earlier task", name=name) for name, file in earlier.items()]
        sets += [load_set(path, "anchor", max_samples=max_anchor_samples) for path in anchor_paths]
        factors = run.read_record(FactorSummary, FACTORS_FILE)
        statistics = factors.statistics and storage.join(run.storage_root, "factors", factors.statistics)
        if statistics and (written := self_written_text(statistics)):
            sets.append(load_set(written, "self-written", name=SELF_WRITTEN, max_samples=max_anchor_samples))
        for one in sets:
            step.log_dataset(
                name=one.name,
                digest=one.digest,
                source=one.source,
                num_records=len(one.records),
                context="evaluation",
                to_parent=True,
            )
        evaluation = evaluate(
            models | {"candidate": checkpoint_path},
            sets,
            benchmarks=lm_eval_tasks,
            benchmark_folder=lm_eval_folder or None,
            max_benchmark_samples=max_lm_eval_samples,
            score_store=storage.join(run.storage_root, "scores"),
        )
        if parent_version is not None:
            champion = evaluation.models["champion"].replace(version=parent_version)
            evaluation = evaluation.replace(models=evaluation.models | {"champion": champion})
        known = zip(versions, parent.rows, strict=True) if parent else ()
        earlier_versions = [MeasuredVersion(version, row.task, row.scores) for version, row in known]
        decision = decide(evaluation, rules, history=earlier_versions)
        evaluation = evaluation.replace(matrix=_matrix(evaluation, parent, versions), decision=decision)
        evaluation_file = run.write_record(EVALUATION_FILE, evaluation)
        logger.info(f"gate: {_outcome(evaluation, decision)}")
        for model, scores in evaluation.results.items():
            for name, score in scores.items():
                numbers = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
                step.log_metrics({f"{model}/{name}/{key}": value for key, value in numbers.items()}, to_parent=True)
        for model, of_sets in evaluation.drift.items():
            moved = {f"drift/{model}/{name}": drift.kl if drift else None for name, drift in of_sets.items()}
            step.log_metrics(moved, to_parent=True)
        if evaluation.exact:  # what rounding costs is the difference to candidate/<task>/loss
            step.log_metrics({f"candidate_exact/{task}/loss": evaluation.exact.loss}, to_parent=True)
        metrics = storage.fetch(run.address("train", "metrics.jsonl")).read_text(encoding="utf-8")
        html = render_report(
            evaluation,
            training=run.read_record(TrainingSummary, *TRAINING_FILE),
            metrics=[json.loads(line) for line in metrics.splitlines()],
            factors=factors,
            dataset=read_json(storage.join(data_path, "dataset.json")),
            cost=runs.step_seconds(step.client, run.mlflow_run_id),
        )
        step.log_artifact(run.write(REPORT_FILE, html), to_parent=True)
        step.log_artifact(evaluation_file, to_parent=True)
    return evaluation


def _outcome(evaluation: Evaluation, decision: Decision) -> str:
    """The decision, and what the new task's loss became."""
    task = evaluation.task
    before, after = (evaluation.results[model][task].loss for model in (evaluation.reference, "candidate"))
    outcome = "passed" if decision.promote else f"refused, {decision.reason}"
    return f"{outcome}; loss on {task} {before:.3f} -> {after:.3f}"


def next_scores(evaluation: Evaluation, parent: Lineage | None) -> tuple[Scores, tuple[Row, ...]]:
    """The base model's scores and the rows of the matrix, as the candidate's lineage has them.

    What the parent's lineage has already stays as it was measured then. The candidate's scores have its drift: as
    `kl_base` and `kl_champion`, KL(base || candidate) and KL(champion || candidate) in nats per token.
    """
    measured = {model: _scores(results) for model, results in evaluation.results.items()}
    for model, of_sets in evaluation.drift.items():
        for name, drift in of_sets.items():
            if drift is not None:
                moved = {f"kl_{model}": drift.kl, f"kl_{model}_stderr": drift.stderr}
                measured["candidate"][name] = measured["candidate"].get(name, {}) | moved
    baseline, parent_scores = measured["base"], measured.get("champion", {})
    if parent is not None:
        baseline = baseline | parent.baseline
        parent_scores = parent_scores | parent.rows[-1].scores
    rows = lineage.next_rows(parent, evaluation.task, parent_scores=parent_scores, scores=measured["candidate"])
    return baseline, rows


def _scores(results: Mapping[str, SetScore]) -> Scores:
    return {name: {metric: getattr(score, metric) for metric in _METRICS} for name, score in results.items()}


def _matrix(evaluation: Evaluation, parent: Lineage | None, versions: Sequence[int]) -> ContinualMatrix:
    """What `osft.evaluation.matrix` says of all rounds up to this one."""
    from osft.evaluation import matrix

    baseline, rows = next_scores(evaluation, parent)
    anchors = [name for name, described in evaluation.sets.items() if described.role == "anchor"]
    rounds = [(row.task, version) for row, version in zip(rows, [*versions, None], strict=True)]
    return matrix.describe(rounds, baseline, [row.scores for row in rows], anchors=anchors)
