"""The committed YAML: current, loadable, complete for the UI, and accepted by a Pipelines server."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components import readme
from components.precompute_svd.component import precompute_svd
from components.train_osft.component import train_osft
from osft.evaluation.gate import GateRules
from osft.orchestration import CompiledPipeline, connect, submit, upload
from osft.settings.base import default, read_file, type_text
from osft.settings.training import TrainConfig
from pipelines.continual_learning.parameters import SUBSPACE, TRAINING, PipelineParameters
from pipelines.continual_learning.pipeline import YAML, YAML_S3, main
from tests.pipelines.kfp_server import KfpServer, parse_spec


@pytest.fixture(scope="module")
def spec() -> dict:
    return parse_spec(YAML.read_text())["pipeline_spec"]


def test_yaml_is_what_the_pipeline_compiles_to_and_a_stale_one_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--check"])
    main()
    shutil.copy(YAML, tmp_path)
    (tmp_path / YAML_S3.name).write_text(YAML_S3.read_text().replace("defaultValue: 0.25", "defaultValue: 0.3"))
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--check", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"{YAML_S3.name} is stale: run `make compile`"):
        main()


def test_every_parameter_has_a_description_and_all_but_two_a_default(spec):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert [name for name, one in parameters.items() if not one.get("isOptional")] == ["base_model", "data_uri"]
    for name, parameter in parameters.items():
        assert len(parameter.get("description", "")) > 15, f"{name} has no description"


def test_form_is_made_of_the_parameters_definition(spec):
    """Types, defaults and texts come from one class; what it leaves to training has training's text."""
    form = spec["root"]["inputDefinitions"]["parameters"]
    words = {"int": "NUMBER_INTEGER", "float": "NUMBER_DOUBLE", "bool": "BOOLEAN"}
    words |= {
        "list[str]": "LIST",
        "list[dict[str, Any]]": "LIST",
        "dict[str, Any]": "STRUCT",
        "dict[str, str]": "STRUCT",
    }
    for name, field in PipelineParameters.model_fields.items():
        assert form[name]["parameterType"] == words.get(type_text(field), "STRING")
        assert form[name].get("defaultValue") == (None if field.is_required() else default(field))
    text = " ".join(TrainConfig.model_fields["learning_rate"].description.split())
    assert form["learning_rate"]["description"] == text


@pytest.mark.parametrize("component", [train_osft, precompute_svd], ids=lambda component: component.name)
def test_settings_of_training_have_their_types_in_the_components(component):
    """A component's source has to spell its inputs out; they are the definition's all the same."""
    known = TRAINING if component is train_osft else SUBSPACE
    inputs = component.component_spec.inputs
    words = {"int": "Integer", "float": "Float", "list[str]": "List", "dict[str, Any]": "Dict"}
    types = {name: words.get(type_text(PipelineParameters.model_fields[name]), "String") for name in known}
    assert {name: inputs[name].type for name in known} == types


def test_production_has_nothing_of_the_demonstration(spec):
    demonstration = read_file(YAML.parents[2] / "examples" / "demonstration.yaml", "parameter")
    form = spec["root"]["inputDefinitions"]["parameters"]
    assert set(demonstration) <= set(form)
    assert all(value != form[name].get("defaultValue") for name, value in demonstration.items())


def platform_of(file: Path) -> dict:
    """What kfp-kubernetes adds to each step."""
    return parse_spec(file.read_text())["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_every_step_mounts_the_claim_that_the_parameter_names():
    platform = platform_of(YAML)
    assert len(platform) == 7
    for executor in platform.values():
        (mount,) = executor["pvcMount"]
        assert mount["mountPath"] == "/mnt/osft"
        assert mount["pvcNameParameter"]["componentInputParameter"].endswith("storage_claim")


def test_without_a_claim_nothing_is_mounted_and_parameters_are_the_same(spec):
    without = parse_spec(YAML_S3.read_text())["pipeline_spec"]
    assert without["root"]["inputDefinitions"] == spec["root"]["inputDefinitions"]
    assert without["deploymentSpec"] == spec["deploymentSpec"]
    assert not any("pvcMount" in executor for executor in platform_of(YAML_S3).values())


def test_credentials_come_from_secrets_that_need_not_exist():
    for executor in platform_of(YAML).values():
        variables = {entry["envVar"] for secret in executor["secretAsEnv"] for entry in secret["keyToEnv"]}
        assert {"HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= variables
        assert all(secret["optional"] for secret in executor["secretAsEnv"])


def test_every_step_asks_for_what_the_parameters_say(spec):
    executors = spec["deploymentSpec"]["executors"]
    heavy = {"precompute-svd": "svd", "train-osft": "training", "evaluate-model": "evaluation"}
    assert len(executors) == 7
    for name, executor in executors.items():
        step = name.removeprefix("exec-")
        asked = executor["container"]["resources"]
        needs = {"precompute-svd": "model", "evaluate-model": "model", "train-osft": "training"}.get(step, "step")
        wanted = {"resourceCpuRequest": f"{needs}_cpu", "resourceMemoryRequest": f"{needs}_memory"}
        found = {field: asked[field] for field in wanted}
        assert found == {field: handed_on(spec, step, parameter) for field, parameter in wanted.items()}
        if step in heavy:
            assert asked["accelerator"] == {
                "resourceCount": handed_on(spec, step, f"{heavy[step]}_gpus"),
                "resourceType": handed_on(spec, step, "gpu_resource"),
            }
    for executor in platform_of(YAML).values():
        (toleration,) = executor["tolerations"]
        assert toleration["tolerationJson"]["componentInputParameter"].endswith("tolerations")
        assert executor["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith("node_selector")


def handed_on(spec: dict, step: str, parameter: str) -> str:
    """The placeholder of a pipeline's parameter in a step, which has to be among the step's inputs."""
    dags = [spec["root"]["dag"], *(part["dag"] for part in spec["components"].values() if "dag" in part)]
    (inputs,) = [dag["tasks"][step]["inputs"]["parameters"] for dag in dags if step in dag["tasks"]]
    assert inputs[f"pipelinechannel--{parameter}"]["componentInputParameter"].endswith(parameter)
    return f"{{{{$.inputs.parameters['pipelinechannel--{parameter}']}}}}"


def test_every_step_is_retried_and_none_is_cached(spec):
    tasks = [*spec["root"]["dag"]["tasks"].values()]
    tasks += [task for part in spec["components"].values() for task in part.get("dag", {}).get("tasks", {}).values()]
    steps = [task for task in tasks if "dag" not in spec["components"][task["componentRef"]["name"]]]
    assert len(steps) == 7
    for step in steps:
        assert step["retryPolicy"]["maxRetryCount"] >= 2
        assert not step.get("cachingOptions")


def condition(dag: dict) -> tuple[str, dict]:
    """What the one condition of a dag asks for, and the component behind it."""
    (task,) = [task for name, task in dag["tasks"].items() if name.startswith("condition")]
    return task["triggerPolicy"]["condition"], task["componentRef"]["name"]


def test_only_the_first_step_runs_without_news_and_promotion_is_behind_the_gate(spec):
    news, learning = condition(spec["root"]["dag"])
    assert [name for name in spec["root"]["dag"]["tasks"] if not name.startswith("condition")] == ["resolve-round"]
    assert "resolve-round-Output" in news
    assert "== true" in news
    inner = spec["components"][learning]["dag"]
    gate, behind = condition(inner)
    assert "evaluate-model-Output" in gate
    assert "== true" in gate
    assert set(spec["components"][behind]["dag"]["tasks"]) == {"promote-model"}
    assert "promote-model" not in inner["tasks"]


def test_gate_in_the_form_is_the_one_of_the_library(spec):
    form = spec["root"]["inputDefinitions"]["parameters"]
    assert GateRules.from_parameters({}).to_parameters() == form["gate"]["defaultValue"]


def compiled_with(folder: Path, environment: dict[str, str]) -> dict:
    """The pipeline as `make compile` makes it in that environment."""
    code = (
        "import sys; from kfp import compiler; from pipelines.continual_learning.pipeline import continual_learning; "
    )
    code += "compiler.Compiler().compile(continual_learning, sys.argv[1])"
    file = folder / "p.yaml"
    subprocess.run(
        [sys.executable, "-c", code, str(file)],
        check=True,
        env={**environment, "PATH": "/usr/bin:/bin"},
        cwd=YAML.parents[2],
    )
    return parse_spec(file.read_text())["pipeline_spec"]


@pytest.mark.parametrize("limits", ["memory", "cpu,memory"])
def test_requests_are_limits_too_where_a_quota_asks_for_them(tmp_path, spec, limits):
    fields = {name: f"resource{name.capitalize()}" for name in ("cpu", "memory")}
    wanted = {f"{fields[name]}Limit" for name in limits.split(",")}
    for name, executor in compiled_with(tmp_path, {"OSFT_STEP_LIMITS": limits})["deploymentSpec"]["executors"].items():
        asked = executor["container"]["resources"]
        assert {field for field in asked if field.endswith("Limit")} == wanted
        for limit in wanted:
            assert asked[limit] == asked[limit.replace("Limit", "Request")]
        default = spec["deploymentSpec"]["executors"][name]["container"]["resources"]
        assert not any(field.endswith("Limit") for field in default)


def test_limit_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        compiled_with(tmp_path, {"OSFT_STEP_LIMITS": "gpu"})


def test_images_of_all_steps_are_set_in_one_place(tmp_path):
    images = {"OSFT_IMAGE": "registry.example/steps:1", "OSFT_TRAINING_IMAGE": "registry.example/training:1"}
    compiled = compiled_with(tmp_path, images)
    executors = compiled["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == set(images.values())
    assert executors["exec-precompute-svd"]["container"]["image"] == images["OSFT_TRAINING_IMAGE"]
    _, learning = condition(compiled["root"]["dag"])
    pods = compiled["components"][learning]["dag"]["tasks"]["train-osft"]["inputs"]["parameters"]["training_image"]
    assert pods["runtimeValue"]["constant"] == images["OSFT_TRAINING_IMAGE"]


def test_server_takes_the_yaml_and_a_run_of_it():
    with KfpServer() as server:
        client = connect(server.address)
        given = {"base_model": "org/model", "data_uri": "org/data", "num_epochs": 2}
        submit(client, upload(client, CompiledPipeline.read(YAML)), given)
        (version,) = server.versions.values()
        assert version["pipeline_spec"] == parse_spec(YAML.read_text())
        (run,) = server.runs.values()
        assert run["runtime_config"]["parameters"] == given


def test_every_component_is_described_and_its_readme_is_current():
    found = readme.components()
    assert len(found) == 7
    for file, component in found.items():
        assert file.read_text() == readme.render(component)
        spec = component.component_spec
        for name, value in {**spec.inputs, **(spec.outputs or {})}.items():
            assert value.description or name in TRAINING, f"{file.parent.name}: {name} has no description"
        metadata = yaml.safe_load((file.parent / "metadata.yaml").read_text())
        assert metadata["name"] == file.parent.name
