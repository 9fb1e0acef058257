"""What forms, YAML files and JSON make of numbers and truth values is read as what was meant, and nothing else is."""

from decimal import Decimal
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field

from osft.evaluation.gate import GateRules
from osft.kubernetes.settings import JobSettings
from osft.orchestration import CompiledPipeline, pipeline_arguments
from osft.settings.base import Settings
from osft.settings.values import Boolean, Integer, Number, boolean, number


class Example(Settings):
    steps: Annotated[Integer, Field(ge=1)] = 1
    maximum: Integer | None = None
    rate: Annotated[Number, Field(ge=0.0)] = 0.0
    minutes: Number | None = None
    resume: Boolean = False
    packing: Boolean | None = None
    processes: Integer | Literal["auto", "gpu"] = "auto"
    job_id: Annotated[str | Integer | None, Field(union_mode="left_to_right")] = None


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("steps", 3.0, 3),
        ("steps", "3", 3),
        ("steps", "3.0", 3),
        ("steps", " 16 ", 16),
        ("steps", "1e3", 1000),
        ("steps", "12345678901234567891", 12345678901234567891),
        ("steps", np.float64(8), 8),
        ("maximum", 100.0, 100),
        ("maximum", "100", 100),
        ("rate", "1e-5", 1e-5),
        ("rate", "2E-4", 2e-4),
        ("rate", ".5", 0.5),
        ("rate", 1, 1.0),
        ("minutes", "15", 15.0),
        ("resume", "true", True),
        ("resume", "False", False),
        ("packing", "TRUE", True),
        ("processes", 4.0, 4),
        ("processes", "4", 4),
        ("processes", "gpu", "gpu"),
        ("job_id", 105.0, 105),
        ("job_id", "105", "105"),
        ("job_id", "0123", "0123"),
    ],
)
def test_number_or_truth_value_in_another_form_is_read(field, given, read):
    found = getattr(Example(**{field: given}), field)
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("steps", 3.5),
        ("steps", "3.5"),
        ("steps", "three"),
        ("steps", ""),
        ("steps", True),
        ("steps", "true"),
        ("steps", 0.0),
        ("steps", float("inf")),
        ("maximum", 2.5),
        ("maximum", "none"),
        ("rate", "fast"),
        ("rate", "nan"),
        ("rate", "inf"),
        ("rate", False),
        ("resume", 1),
        ("resume", "1"),
        ("resume", "yes"),
        ("resume", None),
        ("processes", 1.5),
        ("processes", "all"),
        ("processes", True),
        ("job_id", 1.5),
    ],
)
def test_what_is_no_number_or_truth_value_is_refused_by_name(field, given):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        Example(**{field: given})


@pytest.mark.parametrize(
    ("value", "whole", "expected"),
    [
        (Decimal("2"), True, None),  # no Real: it would have to be rounded
        (2**70, True, 2**70),
        (float("nan"), False, None),
        ("1_000", True, 1000),
        ("9" * 5000, True, None),
        (10**400, False, None),
        (10**400, True, 10**400),
        ([3], True, None),
        (None, True, None),
    ],
)
def test_numbers_of_every_kind(value, whole, expected):
    assert number(value, whole=whole) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), (" False", False), (0, None), ("off", None), ("", None)]
)
def test_truth_values_of_every_kind(value, expected):
    assert boolean(value) is expected


def test_gate_of_a_form_is_the_gate():
    rules = GateRules.from_parameters(
        {"min_gain": {"bound": "0.1", "standard_errors": 2, "relative": "false"}, "max_drift": "false"}
    )
    assert (rules.min_gain.bound, rules.min_gain.standard_errors, rules.min_gain.relative) == (0.1, 2.0, False)
    assert rules.max_drift is None
    for wrong in ({"bound": "much"}, {"bound": "nan"}, {"bound": True}, {"bound": "-1"}, {"relative": 1}):
        with pytest.raises(ValueError, match=f"min_gain: {next(iter(wrong))} must be "):
            GateRules.from_parameters({"min_gain": wrong})


def test_training_job_of_a_form_has_whole_numbers_all_the_way_down():
    """A form's mapping holds 300.0, which the API server refuses as `tolerationSeconds`."""
    settings = JobSettings.from_parameters(
        {
            "num_workers": 2.0,
            "gpus": "8",
            "max_running_minutes": 90.0,
            "istio_sidecar": "true",
            "tolerations": [{"key": "gpu", "tolerationSeconds": 300.0}],
            "affinity": {"nodeAffinity": {"preferred": [{"weight": 50.0, "preference": {"share": 0.5}}]}},
        }
    )
    assert (settings.num_workers, settings.gpus, settings.istio_sidecar) == (2, 8, True)
    assert repr(settings.tolerations) == "[{'key': 'gpu', 'tolerationSeconds': 300}]"
    assert "'weight': 50," in repr(settings.affinity)
    assert "0.5" in repr(settings.affinity)
    with pytest.raises(ValueError, match="gpus must be int, got 1.5"):
        JobSettings.from_parameters({"gpus": 1.5})


def test_pipeline_argument_of_a_form_is_a_number(tmp_path):
    known = CompiledPipeline.read().parameters
    file = tmp_path / "parameters.yaml"
    file.write_text("num_epochs: 3.0\nmax_seq_len: '512'\nlearning_rate: 1e-5\n")
    given = pipeline_arguments(known, file, ["effective_batch_size=16.0", 'weight_decay="0.1"', "seed=7"])
    expected = {"num_epochs": 3, "max_seq_len": 512, "learning_rate": 1e-5, "effective_batch_size": 16}
    assert {name: given[name] for name in expected} == expected
    assert all(type(given[name]) is type(value) for name, value in expected.items())
    for wrong in ("num_epochs=3.5", "num_epochs=NaN", "learning_rate=Infinity", "seed=true", 'seed="a"'):
        with pytest.raises(ValueError, match=f"^{wrong.split('=')[0]} must be an? (integer|number), got"):
            pipeline_arguments(known, settings=[wrong])
