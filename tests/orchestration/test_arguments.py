"""Parameters and triggers: what is understood, and what is refused with the reason."""

import re

import pytest

from osft.orchestration import CompiledPipeline, parse_trigger, pipeline_arguments


@pytest.fixture(scope="module")
def known(yaml_file):
    return CompiledPipeline.read(yaml_file).parameters


def test_settings_go_over_the_file(known, tmp_path):
    file = tmp_path / "parameters.yaml"
    file.write_text(
        "data_uri: s3://a\nlearning_rate: 1e-5\nepochs: 3\nshuffle: false\nanchors: [a, b]\njob: {gpus: 8}\n"
    )
    settings = ["epochs=4", "data_uri=12", "shuffle=True", 'anchors=["c"]', "learning_rate=2"]
    assert pipeline_arguments(known, file, settings) == {
        "data_uri": "12",
        "learning_rate": 2,
        "epochs": 4,
        "shuffle": True,
        "anchors": ["c"],
        "job": {"gpus": 8},
    }
    assert pipeline_arguments(known, file)["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("epochs=2.5", "epochs must be an integer, got 2.5"),
        ("epochs=true", "epochs must be an integer, got True"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("shuffle=1", "shuffle must be true or false, got 1"),
        ("anchors=a,b", r"anchors must be a list \(JSON\), got 'a,b'"),
        ("job=[]", r"job must be a mapping \(JSON\), got \[\]"),
        ("epoch=2", "unknown parameter 'epoch'. Did you mean 'epochs'"),
        ("epochs", "expected NAME=VALUE"),
    ],
)
def test_bad_setting_is_refused(known, setting, problem):
    with pytest.raises(ValueError, match=problem):
        pipeline_arguments(known, settings=[setting])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("launcher=slurm", "launcher must be one of local, pytorchjob, trainjob, got 'slurm'"),
        ('job={"gpu":8}', "job: unknown parameter 'gpu'. Did you mean 'gpus'?"),
        ('pytorchjob={"gpu":8}', "job: unknown parameter 'gpu'. Did you mean 'gpus'?"),
        ('launcher=trainjob job={"gang_queue":"q"}', "job: gang_queue cannot be had with launcher=trainjob"),
        ('job={"gpus":8} pytorchjob={"gpus":8}', "job and pytorchjob are the same parameter"),
        ('job={"env":{"HF_TOKEN":"hf_x"}}', "must refer to a secret or a config map"),
    ],
)
def test_training_job_that_cannot_be_is_refused_before_the_run_is_sent(settings, problem):
    known = CompiledPipeline.read().parameters
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        pipeline_arguments(known, None, settings.split())
    assert "hf_x" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs: two", "epochs must be an integer, got 'two'"),
        ("data_uri: 7", "data_uri must be a text, got 7"),
        ("epoch: 2", "Did you mean 'epochs'"),
        ("- a", "must hold parameters"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_bad_file_is_refused(known, tmp_path, text, problem):
    file = tmp_path / "parameters.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=problem):
        pipeline_arguments(known, file)


def test_file_that_is_no_pipeline_is_refused(tmp_path):
    file = tmp_path / "values.yaml"
    file.write_text("replicas: 3\n")
    with pytest.raises(ValueError, match="not a pipeline"):
        CompiledPipeline.read(file)


def test_pipeline_of_the_checkout_is_the_default():
    assert CompiledPipeline.read().name == "osft-continual-learning"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("30 0 3 * * 1", "30 0 3 * * 1"),
        ("*/15 9-17 1,15 JAN-mar ?", "0 */15 9-17 1,15 JAN-mar ?"),
        ("0 0 * * Mon-FRI/2", "0 0 0 * * Mon-FRI/2"),
        ("0 0 29 2 *", "0 0 0 29 2 *"),
        ("0 0 31 2 Mon", "0 0 0 31 2 Mon"),
        ("0 0 31 4-6 *", "0 0 0 31 4-6 *"),
    ],
)
def test_cron_has_six_fields(given, sent):
    assert parse_trigger(cron=given).cron == sent


@pytest.mark.parametrize(
    ("cron", "problem"),
    [
        ("", "has 0 fields"),
        ("daily", "has 1 fields"),
        ("0 24 * * *", "hour '24': must be between 0 and 23"),
        ("0 0 0 * *", "day of the month '0': must be between 1 and 31"),
        ("0 0 * * 7", "must be between 0 and 6 .Sunday is 0"),
        ("0 0 * * funday", "'funday' is not a number or a name"),
        ("*/0 * * * *", "the step '0'"),
        ("5-1 * * * *", "runs backwards"),
        ("1-2-3 * * * *", "not a range"),
        ("1, * * * *", "'' is not a number"),
        ("0 0 L * *", "'L' is not a number"),
        ("0 0 * * 1#2", "'1#2' is not a number"),
        ("0 0 3 * * 1 2030", "has 7 fields"),
        ("0 0 30 2 *", "no month of '2' has a day '30'"),
        ("0 0 31 feb,4/7 ?", "no month of 'feb,4/7' has a day '31'"),
    ],
)
def test_cron_that_is_none_is_refused_with_the_reason(cron, problem):
    with pytest.raises(ValueError, match=problem):
        parse_trigger(cron=cron)


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("6h", 21600), ("1d12h", 129600), ("90s", 90)])
def test_interval_in_seconds(text, seconds):
    assert parse_trigger(every=text).interval_seconds == seconds


@pytest.mark.parametrize("text", ["", "6", "0h", "30s", "h", "-1h", "1.5h", "6 hours"])
def test_interval_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="expected an interval"):
        parse_trigger(every=text)


@pytest.mark.parametrize("both", [{}, {"cron": "0 3 * * 1", "every": "6h"}])
def test_one_trigger_is_needed(both):
    with pytest.raises(ValueError, match="either a cron expression"):
        parse_trigger(**both)
