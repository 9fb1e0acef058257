"""What a user may set of a PyTorchJob, and what is refused before anything is created."""

import pytest

from osft.kubernetes.settings import JobSettings, job_parameters


def settings(**given):
    return JobSettings.from_parameters(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_worker": 2}, "Did you mean 'num_workers'"),
        ({"num_workers": 0}, "num_workers must be at least 1|between 1 and"),
        ({"num_workers": "two"}, "num_workers must be int, got 'two'"),
        ({"gpus": -1}, "gpus must be at least 0"),
        ({"memory": "32 GB"}, "memory must be a Kubernetes quantity such as"),
        ({"cpu": "four"}, "cpu must be a Kubernetes quantity"),
        ({"image_pull_policy": "Sometimes"}, "'Always' | 'IfNotPresent' | 'Never'"),
        ({"run_as_user": 0}, "run_as_user must be at least 1"),
        ({"max_queued_minutes": -5}, "max_queued_minutes must be at least 0"),
        ({"env": {"HF_TOKEN": {"secret": "hf"}}}, r"env\['HF_TOKEN'\] has no 'key'"),
        ({"env": {"HF_TOKEN": {"secret": "hf", "config_map": "c", "key": "k"}}}, "must refer to a secret or"),
        ({"env": {"HF_TOKEN": {"secret": "Not A Name", "key": "k"}}}, "does not hold the name of a secret"),
        ({"env_from": [{"secrets": "osft-s3"}]}, r"env_from\[0\] must refer to a secret or a config map"),
        ({"volumes": [{"claim": "data"}]}, r"volumes\[0\] has no 'mount_path'"),
        ({"volumes": [{"claim": "data", "mount_path": "data"}]}, "mount_path must be absolute"),
        ({"volumes": [{"claim": "data", "mountPath": "/data"}]}, "Did you mean 'mount_path'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        settings(**given)


@pytest.mark.parametrize("where", [{"env": {"HF_TOKEN": "hf_secret"}}, {"env_from": [{"value": "hf_secret"}]}])
def test_a_value_in_the_environment_is_refused_and_not_repeated(where):
    with pytest.raises(ValueError, match="Values are refused") as error:
        settings(**where)
    assert "hf_secret" not in str(error.value)


def test_processes_follow_the_gpus_unless_they_are_given():
    assert settings().procs_per_worker == 1
    assert settings(gpus=8).procs_per_worker == 8
    assert settings(gpus=0).procs_per_worker == 1
    assert settings(gpus=8, num_procs_per_worker=4).procs_per_worker == 4


def test_every_field_is_documented_and_has_a_default():
    for name, field in JobSettings.model_fields.items():
        assert not field.is_required(), name
        assert len(field.description) > 15, name


def test_former_name_of_the_parameter_means_the_same_and_both_are_refused():
    for job, pytorchjob in (({"gpus": 2}, {}), ({}, {"gpus": 2}), (None, {"gpus": 2})):
        assert job_parameters(job, pytorchjob) == {"gpus": 2}
    assert job_parameters({}, None) == {}
    with pytest.raises(ValueError, match="job and pytorchjob are the same parameter.*give job alone"):
        job_parameters({"gpus": 2}, {"gpus": 2})


def test_limits_come_from_the_settings():
    limits = settings(max_queued_minutes=30, max_running_minutes=None, heartbeat_minutes=5, max_restarts=2).limits
    assert (limits.queued_minutes, limits.running_minutes) == (30, None)
    assert (limits.heartbeat_minutes, limits.max_restarts) == (5, 2)
