"""What is found in a folder: another run, a damaged file, a model that is gone; numbers tell what came of it."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.storage.sealed import DamagedFile
from osft.subspace import decomposition, factor_store, last_round
from osft.training import TrainResult, loop, train
from osft.training.identity import model_contents
from tests.conftest import arithmetic, tiny_llama, write_jsonl
from tests.training.in_process import run_in_process

STEPS = 4


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(monkeypatch)


@pytest.fixture(scope="module")
def settings(chats: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        data_output_dir=str(tmp_path_factory.mktemp("prepared")),
        ckpt_output_dir="replaced",
        unfreeze_rank_ratio=0.25,
        max_seq_len=200,
        effective_batch_size=12,
        max_tokens_per_gpu=300,
        learning_rate=1e-2,
        max_steps=STEPS,
        save_state_steps=2,
        nproc_per_node=1,
    )


@pytest.fixture(scope="module")
def runs(settings: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and the same one, which died in its third step."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        train(settings.replace(ckpt_output_dir=str(root / "finished")))
        original, done = loop.train_step, []

        def dies(*arguments, **options):
            done.append(1)
            if len(done) == 3:
                raise MemoryError("the pod is gone")
            return original(*arguments, **options)

        patch.setattr(loop, "train_step", dies)
        with pytest.raises(MemoryError):
            train(settings.replace(ckpt_output_dir=str(root / "unfinished")))
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def again(settings: TrainConfig, runs: dict[str, Path], tmp_path: Path) -> Callable[..., TrainResult]:
    """The same call once more on a copy of one of the runs, after it was changed."""

    def call(kind: str, change: Callable[[Path], object] = lambda output: None, **others: object) -> TrainResult:
        output = tmp_path / kind
        if not output.exists():
            shutil.copytree(runs[kind], output)
        change(output)
        return train(settings.replace(ckpt_output_dir=str(output), **others))

    return call


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each step that is trained."""
    original, done = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda *args, **options: done.append(1) or original(*args, **options))
    return done


def losses(result: TrainResult) -> list[float]:
    return [line["loss"] for line in result.history]


def finished_losses(runs: dict[str, Path]) -> list[float]:
    return [json.loads(line)["loss"] for line in (runs["finished"] / "metrics.jsonl").read_text().splitlines()]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()


STATE = ("state/step-2/.metadata", "state/step-2/__0_0.distcp")


@pytest.mark.parametrize("damage", [cut, emptied, flipped])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("finished", "training.json"),
        ("finished", "metrics.jsonl"),
        *(("unfinished", name) for name in ("config.json", "metrics.jsonl", "state/step-2/position.json", *STATE)),
    ],
)
def test_damaged_file_is_named_and_nothing_is_trained_or_removed(kind, name, damage, again, steps, tmp_path):
    with pytest.raises(DamagedFile, match=rf"{tmp_path}/{kind}/{name} is damaged.*resume='off'"):
        again(kind, lambda output: damage(output / name))
    assert not steps
    assert (tmp_path / kind / ("hf_format" if kind == "finished" else "state/step-2/position.json")).exists()


@pytest.mark.parametrize("name", STATE)
def test_missing_file_of_a_state_is_named(name, again):
    with pytest.raises(DamagedFile, match=f"{name} is missing"):
        again("unfinished", lambda output: missing(output / name))


def test_undamaged_runs_are_resumed_and_returned(again, runs, steps):
    assert again("finished").reused
    assert not steps
    assert losses(again("unfinished")) == finished_losses(runs)
    assert len(steps) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: shutil.rmtree(model),
        lambda model: shutil.rmtree(model.parent),
        lambda model: missing(model / "model.safetensors"),
        lambda model: missing(model / "tokenizer.json"),
        lambda model: cut(model / "model.safetensors"),
        lambda model: cut(model / "config.json"),
    ],
)
def test_model_that_is_gone_or_cut_is_trained_again(damage, again, runs, steps):
    result = again("finished", lambda output: damage(output / "hf_format" / f"samples_{12 * STEPS}.0"))
    assert not result.reused
    assert len(steps) == STEPS, "the state went when the model was written"
    assert losses(result) == finished_losses(runs)
    original = runs["finished"] / "hf_format" / result.checkpoint.name
    for file in original.glob("*.safetensors"):
        assert (result.checkpoint / file.name).read_bytes() == file.read_bytes()
    assert again("finished").reused


def test_state_goes_when_the_run_is_finished_or_with_the_next_call(again, runs, tmp_path):
    assert not (runs["finished"] / "state").exists()
    again("unfinished")
    assert not (tmp_path / "unfinished" / "state").exists()
    killed_before = lambda output: shutil.copytree(runs["unfinished"] / "state", output / "state")  # noqa: E731
    assert again("finished", killed_before).reused
    assert not (tmp_path / "finished" / "state").exists()


def test_state_stays_where_the_run_writes_no_model(again, tmp_path):
    again("unfinished", save_final_checkpoint=False, save_state_steps=2, resume="off")
    assert (tmp_path / "unfinished" / "state" / "step-2").is_dir()


def test_state_is_of_no_use_without_the_models_that_came_before_it(settings, tmp_path, steps):
    epochs = {"num_epochs": 2, "max_steps": None, "effective_batch_size": 60, "checkpoint_at_epoch": True}
    run = settings.replace(ckpt_output_dir=str(tmp_path / "out"), save_state_steps=3, **epochs)
    first = train(run)
    shutil.rmtree(first.checkpoints[0])
    steps.clear()
    result = train(run)
    assert len(steps) == 4, "from the beginning"
    assert all(path.is_dir() for path in result.checkpoints)


def test_model_from_after_the_state_is_written_again_when_the_run_is_resumed(again, runs):
    """The run had written its last model and died before its summary; what is resumed may come to another one."""

    def change(output: Path) -> None:
        missing(output / "training.json")
        (output / "hf_format" / f"samples_{12 * STEPS}.0" / "generation_config.json").write_text("of the earlier start")

    result = again("finished", change)
    name = "generation_config.json"
    expected = runs["finished"] / "hf_format" / result.checkpoint.name / name
    assert (result.checkpoint / name).read_text() == expected.read_text()


@pytest.fixture
def copied_model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def other_weights(model: Path) -> None:
    tiny_llama(seed=5).save_pretrained(model)


def one_weight_by_a_bit(model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)


def other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


def code(model: Path) -> None:
    (model / "modeling.py").write_text("x = 1")


def in_shards(model: Path) -> None:
    tiny_llama(seed=5).save_pretrained(model, max_shard_size="40KB")
    missing(model / "model.safetensors")


def exact_weights(model: Path) -> None:
    (model / "exact").mkdir()
    (model / "exact" / "residual-0.safetensors").write_text("x")


CHANGES = [
    (other_weights, "weights"),
    (one_weight_by_a_bit, "weights"),
    (in_shards, "weights"),
    (other_config, "model_config"),
    (code, "model_config"),
]


@pytest.mark.parametrize(("change", "what"), CHANGES)
@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_run_of_another_model_at_the_same_path_is_refused_with_both_hashes(kind, change, what, again, copied_model):
    again(kind, model_path=str(copied_model)) if kind == "finished" else None
    before = model_contents(copied_model)[what][:12]
    change(copied_model)
    now = model_contents(copied_model)[what][:12]
    with pytest.raises(
        ValueError, match=f"{kind} run with other settings or contents .*{what}: {before} there, {now} now"
    ):
        again(kind, model_path=str(copied_model))


def test_residual_of_the_weights_is_part_of_what_a_model_is(copied_model):
    before = model_contents(copied_model)
    exact_weights(copied_model)
    now = model_contents(copied_model)
    assert [what for what in now if now[what] != before[what]] == ["weights"]


def test_what_does_not_determine_the_model_does_not_make_another_one(copied_model):
    before = model_contents(copied_model)
    (copied_model / "README.md").write_text("words")
    (copied_model / "consolidated.safetensors").write_text("not read")
    (copied_model / ".cache").mkdir()
    assert model_contents(copied_model) == before


def test_same_model_data_and_factors_at_other_paths_are_the_same_run(again, settings, copied_model, tmp_path):
    data = shutil.copy(settings.data_path, tmp_path / "other-name.jsonl")
    assert again("finished", model_path=str(copied_model), data_path=str(data)).reused


def test_other_data_is_refused(again, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", arithmetic(120, seed=9))
    with pytest.raises(ValueError, match=r"dataset: \w{12} there, \w{12} now; data_path"):
        again("finished", data_path=str(data))


def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions as another machine makes them: the same subspaces, other bases."""
    original = decomposition.decompose

    def decompose(*arguments, **options):
        factors = original(*arguments, **options)
        flipped = {
            name: basis.flip(-1)
            for name, basis in dataclasses.asdict(factors).items()
            if name in ("left", "right") and basis is not None
        }
        return dataclasses.replace(factors, **flipped)

    monkeypatch.setattr(last_round, "decompose", decompose)


def test_resume_on_other_bases_of_the_same_weights_is_refused(again, steps, tmp_path, monkeypatch):
    prepared = str(tmp_path / "elsewhere")
    turned(monkeypatch)
    with pytest.raises(ValueError, match=r"step-2 belongs to another run \(factors: \w{12} there, \w{12} now\)"):
        again("unfinished", data_output_dir=prepared)
    assert not steps
    monkeypatch.undo()


def test_finished_run_is_not_that_of_a_named_factor_set_with_other_bases(again, model_folder, tmp_path, monkeypatch):
    turned(monkeypatch)
    named = factor_store.precompute(model_folder, tmp_path / "factors", SubspaceConfig(unfreeze_rank_ratio=0.25))
    with pytest.raises(ValueError, match=r"finished run with other .*factors: \w{12} there, \w{12} now"):
        again("finished", factors=str(named.path))


def test_run_of_a_release_without_hashes_is_compared_by_what_it_says(again, settings, capsys, copied_model):
    def forget(output: Path) -> None:
        for file in (output / "config.json", output / "state" / "step-2" / "position.json"):
            values = json.loads(file.read_text())
            for name in ("sha256", "made_of", "files", "metrics_sha256"):
                values.pop(name, None)
            file.write_text(json.dumps(values))

    with pytest.raises(ValueError, match="model_path: .* there"):
        again("unfinished", forget, model_path=str(copied_model))
    assert again("unfinished", forget).num_steps == STEPS
    assert "did not write down the hashes of weights, model_config, tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["unfinished", "finished"])
def test_run_of_a_release_without_a_setting_had_it_at_its_default(again, run):
    def forget(output: Path) -> None:
        for file in (output / "config.json", output / "training.json"):
            if file.is_file():
                values = json.loads(file.read_text())
                for settings in (values, values.get("config", {})):
                    settings.pop("fit_step", None)
                values.pop("sha256", None)
                file.write_text(json.dumps(values))

    assert again(run, forget).num_steps == STEPS
    with pytest.raises(ValueError, match="fit_step: False there, True now"):
        again(run, forget, fit_step=True)


@pytest.mark.parametrize("error", ["of the writer", "of torch", "in position.json"])
def test_full_disk_keeps_the_state_before(error, again, runs, monkeypatch, tmp_path):
    from osft.training import state

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*arguments, **options):
        if error == "of torch":
            raise RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed") from full
        raise full

    with monkeypatch.context() as patch:
        if error == "in position.json":
            patch.setattr(state, "write_sealed", fails)
        else:
            patch.setattr(state.dcp, "save", fails)
        with pytest.raises(OSError, match="no space left in .* for the training state of step 3.*is kept") as raised:
            again("unfinished", save_state_steps=3)
    assert raised.value.errno == errno.ENOSPC
    assert [folder.name for folder in (tmp_path / "unfinished" / "state").iterdir()] == ["step-2"]
    assert losses(again("unfinished")) == finished_losses(runs)


def test_state_gets_its_name_when_all_of_it_is_on_disk(again, monkeypatch):
    flushed, renamed = set(), []
    fsync, rename = os.fsync, Path.rename

    def flushes(descriptor):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renames(path, target):
        if path.suffix == ".incomplete":
            renamed.append({file for file in (*path.rglob("*"), path) if file not in flushed})
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(Path, "rename", renames)
    again("unfinished", save_state_steps=3)
    assert renamed == [set()]


def test_run_that_was_taken_over_writes_no_state_model_or_summary(again, monkeypatch, tmp_path):
    from osft.storage.lock import LockLost

    original = loop.train_step

    def paused(*arguments, **options):
        locks = tmp_path / "unfinished" / ".lock"
        (locks / "99").write_text("{}")
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", paused)
    with pytest.raises(LockLost, match="was taken over by another process"):
        again("unfinished", save_state_steps=3)
    assert [folder.name for folder in (tmp_path / "unfinished" / "state").glob("step-?")] == ["step-2"]
    assert not (tmp_path / "unfinished" / "training.json").exists()


def test_weights_are_read_once_in_a_process(copied_model, monkeypatch):
    from osft.storage import hashes

    for file in copied_model.iterdir():
        os.utime(file, (1, 1))
    first = model_contents(copied_model)
    monkeypatch.setattr(hashes.hashlib, "file_digest", None)
    assert hashes.file_sha256(copied_model / "model.safetensors")
    monkeypatch.undo()
    assert model_contents(copied_model) == first


def test_run_says_what_it_is_made_of(again, runs):
    made_of = json.loads((runs["unfinished"] / "config.json").read_text())["made_of"]
    assert set(made_of) == {"weights", "model_config", "tokenizer", "dataset", "factors"}
    summary = again("unfinished").summary
    assert summary.config["made_of"] == made_of
