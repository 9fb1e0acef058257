"""The steps of a run, found in logs that were recorded of real runs of a tiny model."""

from pathlib import Path

import pytest

from pipelines.step_log import LAST_LINES, Progress, StepLog, progress_in, replay

RECORDED = Path(__file__).parent / "recorded"
RESULTS = {
    "resolve-round": "120 of 120 records are new; the base model learns larger-number",
    "prepare-data": "64 training samples (2673 tokens, 417 with loss), 10 held out",
    "precompute-svd": "computed 0, reused 14 of 14 weights",
    "train-osft": "8 steps, training loss 5.7637 -> 4.8218",
    "evaluate-model": "gate: passed; loss on larger-number 5.835 -> 4.738",
    "register-model": "tiny version 1 is the candidate",
    "promote-model": "tiny version 1 is the champion, before it was None",
}


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.log").read_text(encoding="utf-8")


def test_every_step_of_a_run_has_its_result():
    steps = replay(recorded("run")).steps
    assert {name: step.result() for name, step in steps.items()} == RESULTS
    assert list(steps) == list(RESULTS), "in the order in which they ran"


def test_what_lines_of_the_log_begin_with_changes_nothing():
    """The recorded run is of a release whose lines had the message only."""
    text = recorded("run")
    for own in ("round", "data", "factors", "train", "gate", "registry", "step 1/8 ", "step 8/8 ", "statistics"):
        text = text.replace(f"    {own}", f"    2026-11-26T10:53:10Z [a-step 0f27b3 rank 0] {own}")
    assert text.count("Z [a-step") > 10
    plain, log = replay(recorded("run")), replay(text)
    assert {name: step.result() for name, step in log.steps.items()} == RESULTS
    assert log.steps == plain.steps


def test_times_are_those_that_kfp_has_written_down():
    steps = replay(recorded("run")).steps
    assert {name: round(step.seconds(0.0)) for name, step in steps.items()} == {
        "resolve-round": 20,
        "prepare-data": 30,
        "precompute-svd": 80,
        "train-osft": 199,
        "evaluate-model": 37,
        "register-model": 15,
        "promote-model": 16,
    }


def test_midnight_is_passed_over():
    begins = "23:59:58.000 - INFO - Executing task 'train-osft'\n"
    log = replay(begins + "00:00:03.500 - INFO - Task 'train-osft' finished with status SUCCESS\n")
    assert log.steps["train-osft"].seconds(0.0) == 5.5


def test_the_pieces_in_which_a_log_is_read_change_nothing():
    log = StepLog()
    text = recorded("run").replace("\n", "\r\n")
    for start in range(0, len(text), 7):
        log.feed(text[start : start + 7], 0.0)
    assert {name: step.result() for name, step in log.steps.items()} == RESULTS


def test_dumps_of_the_executor_and_states_of_a_bar_that_are_past_are_no_last_lines():
    steps = replay(recorded("run")).steps
    assert list(steps["resolve-round"].last_lines)[-1] == "round: " + RESULTS["resolve-round"]
    for step in steps.values():
        assert 0 < len(step.last_lines) <= LAST_LINES
        for line in step.last_lines:
            assert "[KFP Executor" not in line
            assert '"parameterValues"' not in line
    (bar,) = [line for line in steps["prepare-data"].last_lines if line.startswith("tokenize training")]
    assert "100%" in bar


@pytest.mark.parametrize("name", ["refused", "interrupted"])
def test_step_that_failed_is_known_with_what_it_said(name):
    log = replay(recorded(name))
    step = log.unfinished()
    assert step is not None
    assert step.failed
    expected = {
        "refused": ("resolve-round", "error: tiny descends from /given/model, not from /given/model2. "),
        "interrupted": ("train-osft", "KeyboardInterrupt"),
    }[name]
    assert step.name == expected[0]
    assert step.last_lines[-1].startswith(expected[1])
    assert "Inner task failed" in log.outside[-1]


def test_step_that_runs_is_the_unfinished_one():
    text = recorded("run")
    log = replay(text[: text.index("step 8/8")])
    step = log.unfinished()
    assert step is not None
    assert (step.name, step.ended, step.failed) == ("train-osft", None, False)
    assert step.progress == Progress(what="loss 5.7637", done="1", total="8", share=1 / 8, left="4 s")


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (
            "base on other-numbers:  41%|████▏     | 1045/2538 [00:05<00:07, 209.21token/s]",
            Progress(what="base on other-numbers", done="1045", total="2538", share=0.41, left="00:07"),
        ),
        (
            "download: 100%|██████████| 93.1M/93.1M [00:41<00:00, 2.27MB/s]",
            Progress(what="download", done="93.1M", total="93.1M", share=1.0, left="00:00"),
        ),
        (
            "hash:   0%|          | 0.00/1.20G [00:00<?, ?B/s]",
            Progress(what="hash", done="0.00", total="1.20G", share=0.0, left=""),
        ),
        (
            "Saving the dataset (0/1 shards):   0%|          | 0/110 [00:00<?, ? examples/s]",
            Progress(what="Saving the dataset (0/1 shards)", done="0", total="110", share=0.0, left=""),
        ),
        (
            " 50%|█████     | 1/2 [00:01<00:01,  1.00it/s]",
            Progress(what="", done="1", total="2", share=0.5, left="00:01"),
        ),
        (
            "step 7/24  loss 0.5119  validation 0.6002  drift 0.0001  lr 9.05e-04  112 tokens/s  301 s left",
            Progress(what="loss 0.5119", done="7", total="24", share=7 / 24, left="301 s"),
        ),
        ("step 0/0  loss nan", Progress(what="loss nan", done="0", total="0", share=0.0, left="")),
        ("round: 100% of them|are new", None),
        ("12 document [00:01, 9.2document/s]", None),
    ],
)
def test_progress_of_a_line(line, progress):
    assert progress_in(line) == progress


@pytest.mark.parametrize(
    "noise",
    [
        "\x00\x1b[?25l\x1b[2K{}}{%|%|/[<]",
        "    %|/ [<",
        "    a%| | 1/2 [<",
        "    [KFP Executor Got executor_input:",
        "12:00:00.000 - INFO - Task 'unheard-of' finished with status SUCCESS",
        "12:00:00.000 - ERROR - Executing task ''",
        "    step 1/2  loss",
        "    step 99999999999999999999/1  loss 1",
    ],
)
def test_line_that_is_not_known_changes_no_result(noise):
    text = recorded("run").replace("    round: ", f"{noise}\n    round: ")
    assert replay(text).steps["resolve-round"].result() == RESULTS["resolve-round"]


def test_control_characters_of_a_step_are_taken_out():
    line = "    \x1b]0;a title\x07mine: \x1b[1;31mred\x1b[0m\x1b[?25l\x07 and\x08 plain\x1b[2K\n"
    log = replay("10:00:00.000 - INFO - Executing task 'other'\n" + line)
    assert list(log.steps["other"].last_lines) == ["mine: red and plain"]


def test_step_of_another_pipeline_says_its_own_last_line():
    lines = ["    INFO of a library", "    mine: something", "    2026/11/26 10:44:34 INFO mlflow: else"]
    log = replay("\n".join(["10:00:00.000 - INFO - Executing task 'other'", *lines, ""]))
    assert log.steps["other"].result() == "mine: something"
