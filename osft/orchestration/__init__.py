"""Runs and schedules of the pipeline on a Kubeflow Pipelines server, from a notebook or from `osft submit` and others.

    client = connect("https://pipelines.example.com", token_file="token")
    pipeline = upload(client, CompiledPipeline.read("continual_learning.yaml"))
    run_id = submit(client, pipeline, {"data_uri": "s3://bucket/week-7.jsonl"})
    follow(client, run_id, print)
    create_schedule(client, "weekly", pipeline, parse_trigger(cron="0 3 * * 1"), {"data_uri": "s3://bucket/inbox/"})

Importing this loads no kfp; the functions do, and need the extra `osft[pipelines]`.
"""

from osft.orchestration.arguments import pipeline_arguments
from osft.orchestration.connection import connect
from osft.orchestration.pipelines import CompiledPipeline, UploadedPipeline, find_pipeline, upload
from osft.orchestration.runs import RunStatus, StepStatus, cancel, follow, newest_runs, status, submit
from osft.orchestration.schedules import (
    Schedule,
    create_schedule,
    delete_schedule,
    list_schedules,
    pause_schedule,
    resume_schedule,
)
from osft.orchestration.triggers import Trigger, parse_trigger

__all__ = [
    "CompiledPipeline",
    "RunStatus",
    "Schedule",
    "StepStatus",
    "Trigger",
    "UploadedPipeline",
    "cancel",
    "connect",
    "create_schedule",
    "delete_schedule",
    "find_pipeline",
    "follow",
    "list_schedules",
    "newest_runs",
    "parse_trigger",
    "pause_schedule",
    "pipeline_arguments",
    "resume_schedule",
    "status",
    "submit",
    "upload",
]
