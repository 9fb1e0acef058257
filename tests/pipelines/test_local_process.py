"""A pipeline by kfp.local in a process of its own: its log, its failure, and its end when it is interrupted.

The pipeline has one step, which does what it is told; the way it is run is that of `make run`.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from kfp import compiler, dsl
from rich.console import Console

from pipelines import run_local
from pipelines.local_process import new_log

ROOT = Path(__file__).parents[2]


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def resolve_round(pipeline_run_id: str, behaviour: str):
    """A step that prints and then behaves as it is told."""
    import time

    for number in range(30):
        print(f"noise {number}", flush=True)
    print(f"round: nothing to learn: {behaviour}", flush=True)
    if behaviour == "fail":
        raise ValueError("as it was told")
    if behaviour == "wait":
        try:
            time.sleep(120)
        finally:
            print("round: last words", flush=True)


@dsl.pipeline(name="one-step")
def one_step(behaviour: str):
    resolve_round(pipeline_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, behaviour=behaviour)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pipeline") / "one-step.yaml"
    compiler.Compiler().compile(one_step, str(file))
    return file


@pytest.fixture
def printed(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What `run` prints; it runs the pipeline with one step."""
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(run_local, "console", console)
    monkeypatch.setattr(run_local, "YAML", pipeline)
    return console.file.getvalue


def test_run_gives_the_rounds_folder_and_leaves_everything_in_the_log(printed, tmp_path):
    folder = run_local.run({"behaviour": "end"}, tmp_path)
    (log,) = (tmp_path / "logs").iterdir()
    text = log.read_text()
    assert f'"pipeline_run_id": "{folder.name}"' in text
    assert folder.parent == tmp_path / "rounds"
    assert "noise 29" in text
    first, started, done = printed().splitlines()
    assert first == f"log:     {log}"
    assert started == "resolve-round: started"
    assert done.startswith("resolve-round: done in ")
    assert done.endswith(": nothing to learn: end")


def test_failed_step_is_named_with_its_last_lines_and_exit_code_1(printed, tmp_path):
    with pytest.raises(typer.Exit) as end:
        run_local.run({"behaviour": "fail"}, tmp_path)
    assert end.value.exit_code == 1
    (log,) = (tmp_path / "logs").iterdir()
    assert "error: resolve-round has failed" in printed()
    assert "  ValueError: as it was told\n" in printed()
    assert printed().endswith(f"The whole log is {log}\n")
    assert "noise 0\n" not in printed()
    assert "executor_input" not in printed()
    assert "Got executor_input" in log.read_text()


@pytest.fixture
def waiting(pipeline: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, in a process whose step waits."""
    code = (
        "import typer; from pathlib import Path; from pipelines import run_local\n"
        f"run_local.YAML = Path({str(pipeline)!r})\n"
        f"typer.run(lambda: run_local.run({{'behaviour': 'wait'}}, Path({str(tmp_path)!r})))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit SIG_IGN
    )
    wait_for(lambda: "nothing to learn: wait" in log_of(tmp_path), 60)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def log_of(storage: Path) -> str:
    return "".join(file.read_text() for file in storage.glob("logs/*"))


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def processes_of(storage: Path) -> list[int]:
    """Processes that have the storage in their command: those of a step."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(storage).encode() in file.read_bytes() and int(file.parent.name) != os.getpid():
                found.append(int(file.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupt_ends_the_step_keeps_its_last_words_and_says_where_the_log_is(waiting, tmp_path):
    kfp_root = tmp_path / "kfp"
    assert processes_of(kfp_root)
    waiting.send_signal(signal.SIGINT)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    (log,) = (tmp_path / "logs").iterdir()
    assert output.splitlines()[-1] == f"interrupted in resolve-round. The log is {log}"
    assert "    round: last words\n" in log.read_text()
    assert processes_of(kfp_root) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_steps_end_with_the_command_that_started_them(waiting, tmp_path, signum):
    kfp_root = tmp_path / "kfp"
    assert processes_of(kfp_root)
    waiting.send_signal(signum)
    waiting.communicate(timeout=60)
    wait_for(lambda: processes_of(kfp_root) == [], 20)


def test_runs_at_the_same_time_have_logs_and_rounds_of_their_own(printed, tmp_path):
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda behaviour: run_local.run({"behaviour": behaviour}, tmp_path), ("one", "two")))
    logs = [file.read_text() for file in (tmp_path / "logs").iterdir()]
    assert len(logs) == 2
    for folder, behaviour, other in ((folders[0], "one", "two"), (folders[1], "two", "one")):
        (own,) = [text for text in logs if f'"pipeline_run_id": "{folder.name}"' in text]
        assert f"nothing to learn: {behaviour}" in own
        assert f"nothing to learn: {other}" not in own


def test_runs_that_begin_in_one_second_have_logs_of_their_own(tmp_path):
    files = {new_log(tmp_path / "logs") for _ in range(20)}
    assert len(files) == 20
    assert all(file.is_file() for file in files)


def test_steps_of_the_committed_pipeline_in_their_order():
    assert run_local.step_names(run_local.YAML.read_text()) == [
        "resolve-round",
        "prepare-data",
        "precompute-svd",
        "train-osft",
        "evaluate-model",
        "register-model",
        "promote-model",
    ]


def test_run_continues_when_nobody_reads_what_it_prints_any_more(waiting, tmp_path):
    waiting.stdout.close()
    waiting.send_signal(signal.SIGINT)  # has the command print
    assert waiting.wait(timeout=60) == 130
    assert "    round: last words\n" in log_of(tmp_path)
