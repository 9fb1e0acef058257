"""What the parameters of the data do."""

import pytest

from osft.data.records import DataError
from osft.training import loop
from tests.conftest import arithmetic, write_jsonl
from tests.parameters.conftest import losses


@pytest.mark.covers("data_path")
def test_a_file_a_glob_and_a_folder_are_the_same_data(call, tmp_path):
    records = arithmetic(60)
    whole = write_jsonl(tmp_path / "whole.jsonl", records)
    parts = tmp_path / "parts"
    parts.mkdir()
    write_jsonl(parts / "a.jsonl", records[:20])
    write_jsonl(parts / "b.jsonl", records[20:])
    expected = losses(call(data_path=str(whole)))
    assert losses(call(data_path=str(parts))) == expected
    assert losses(call(data_path=f"{parts}/*.jsonl")) == expected


@pytest.mark.covers("model_path", "data_path")
def test_missing_model_or_data_says_what_to_give(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="(?s)neither a local folder nor a model.*give the path of its folder"):
        call(model_path="nobody/nothing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        call(data_path=str(tmp_path / "missing.jsonl"))


@pytest.mark.covers("effective_batch_size")
def test_effective_batch_size_counts_samples(call):
    assert [line["samples"] for line in call(effective_batch_size=7).history] == [7, 14, 21, 28]


@pytest.mark.covers("max_tokens_per_gpu")
def test_no_micro_batch_exceeds_max_tokens_per_gpu(call, monkeypatch):
    sizes: list[int] = []
    original = loop.train_step

    def spy(model, optimizer, micro_batches, **options):
        sizes.extend(batch.input_ids.numel() for batch in micro_batches)
        return original(model, optimizer, micro_batches, **options)

    monkeypatch.setattr(loop, "train_step", spy)
    loose = losses(call(max_tokens_per_gpu=2000))
    assert max(sizes) > 100
    sizes.clear()
    assert losses(call(max_tokens_per_gpu=100)) == pytest.approx(loose, rel=1e-4)
    assert max(sizes) <= 100


@pytest.mark.covers("max_tokens_per_gpu")
def test_sample_longer_than_max_tokens_per_gpu_is_named_before_training(call, chats, tmp_path):
    with pytest.raises(ValueError, match=rf"{chats}:\d+: the sample has \d+ tokens, more than max_tokens_per_gpu=40"):
        call(max_tokens_per_gpu=40)
    assert not (tmp_path / "run-1").exists()


@pytest.mark.covers("max_seq_len")
def test_longer_samples_are_dropped_and_reported(call, tmp_path, capsys):
    long = [{"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}]
    data = write_jsonl(tmp_path / "data.jsonl", arithmetic(24) + long)
    call(data_path=str(data), max_steps=1)
    said = capsys.readouterr().out
    assert "1 sample" in said
    assert "longer than 128 tokens" in said
    assert "%" in said


@pytest.mark.covers("data_output_dir", "ckpt_output_dir")
def test_outputs_go_where_they_are_told(call, tmp_path):
    call(ckpt_output_dir=str(tmp_path / "out"), data_output_dir=str(tmp_path / "elsewhere"), save_final_checkpoint=True)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"data", "factors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("hf_format", "config.json", "metrics.jsonl", "training.json", ".lock")
    }
    call(ckpt_output_dir=str(tmp_path / "other"), data_output_dir=None)
    assert (tmp_path / "other" / "_internal_data_processing" / "factors").is_dir()


@pytest.mark.covers("use_processed_dataset")
def test_processed_data_gives_the_losses_of_the_raw_data(call, chats, tmp_path):
    from osft.data.dataset_folder import load_split

    raw = call()
    (folder,) = (tmp_path / "data" / "data").iterdir()
    train = load_split(folder, "train")
    samples = [train[i] for i in range(len(train.lengths))]
    processed = write_jsonl(
        tmp_path / "tokens.jsonl", [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    )
    result = call(data_path=str(processed), use_processed_dataset=True)
    assert result.num_loss_tokens == raw.num_loss_tokens
    assert losses(result) == losses(raw)
    with pytest.raises(DataError, match=r"larger-number.jsonl:1.*input_ids"):
        call(use_processed_dataset=True)


@pytest.mark.covers("unmask_messages")
def test_unmasked_messages_count_in_the_loss(call):
    masked, unmasked = call(), call(unmask_messages=True)
    assert unmasked.num_tokens == masked.num_tokens
    assert unmasked.num_loss_tokens > 1.5 * masked.num_loss_tokens


@pytest.mark.covers("is_pretraining", "block_size", "document_column_name")
def test_pretraining_trains_on_blocks_of_a_columns_text(call, tmp_path):
    documents = write_jsonl(tmp_path / "books.jsonl", [{"body": "once upon a time " * 20} for _ in range(10)])
    result = call(
        data_path=str(documents), is_pretraining=True, block_size=64, document_column_name="body", max_steps=2
    )
    assert [line["tokens"] for line in result.history] == [12 * 64, 24 * 64]
    assert result.num_loss_tokens == 24 * 63
    with pytest.raises(DataError, match=r"books.jsonl:1.*document.*body"):
        call(data_path=str(documents), is_pretraining=True, block_size=64)
    with pytest.raises(ValueError, match="block_size is required"):
        call(data_path=str(documents), is_pretraining=True)
    with pytest.raises(ValueError, match="is_pretraining=True and unmask_messages=True exclude"):
        call(data_path=str(documents), is_pretraining=True, block_size=64, unmask_messages=True)


@pytest.mark.covers("replay_ratio", "replay_data")
def test_replayed_samples_train_beside_the_new_ones(call, chats, tmp_path, capsys):
    earlier = write_jsonl(tmp_path / "earlier.jsonl", arithmetic(200, seed=7))
    alone = call(max_steps=None)
    capsys.readouterr()
    replayed = call(max_steps=None, replay_ratio=0.2, replay_data=[str(earlier)])
    found = replayed.summary.replay
    assert "replay: 30 samples" in capsys.readouterr().out
    assert (found.num_samples, found.sources[0].data_uri) == (30, str(earlier))
    assert (replayed.num_samples, alone.num_samples) == (150, 120)
    assert replayed.num_tokens == alone.num_tokens + found.num_tokens
    assert replayed.num_loss_tokens == alone.num_loss_tokens + found.num_loss_tokens
    planned = call(max_steps=None, replay_ratio=0.2, replay_data=[str(earlier)], dry_run=True)
    assert (planned.data.samples, planned.steps) == (150, replayed.num_steps)
    assert planned.data.tokens == pytest.approx(replayed.num_tokens, rel=0.05)


@pytest.mark.covers("replay_ratio", "replay_data")
def test_replay_from_a_dataset_that_was_prepared_is_replay_from_its_records(call, tmp_path):
    earlier = write_jsonl(tmp_path / "earlier.jsonl", arithmetic(60, seed=7))
    call(data_path=str(earlier), max_steps=1, data_output_dir=str(tmp_path / "before"))
    (prepared,) = (tmp_path / "before" / "data").iterdir()
    raw, tokenized = (
        call(replay_ratio=0.1, replay_data=[str(path)], data_output_dir=str(tmp_path / "new"))
        for path in (earlier, prepared)
    )
    assert losses(tokenized) == losses(raw)


@pytest.mark.covers("replay_ratio", "replay_data")
def test_no_cut_of_the_batch_changes_a_run_with_replay(call, tmp_path):
    earlier = write_jsonl(tmp_path / "earlier.jsonl", arithmetic(60, seed=7))
    settings = {"replay_ratio": 0.3, "replay_data": [str(earlier)]}
    assert losses(call(max_tokens_per_gpu=100, **settings)) == pytest.approx(losses(call(**settings)), rel=1e-4)


@pytest.mark.covers("replay_ratio", "replay_data")
def test_run_with_replay_of_other_content_is_another_run(call, tmp_path):
    earlier = write_jsonl(tmp_path / "earlier.jsonl", arithmetic(60, seed=7))
    moved = write_jsonl(tmp_path / "moved.jsonl", arithmetic(60, seed=7))
    here = {"ckpt_output_dir": str(tmp_path / "one"), "replay_ratio": 0.1, "save_final_checkpoint": True}
    call(replay_data=[str(earlier)], **here)
    assert call(replay_data=[str(moved)], **here).reused
    write_jsonl(earlier, arithmetic(60, seed=8))
    with pytest.raises(ValueError, match="replay: .* there, .* now"):
        call(replay_data=[str(earlier)], **here)


@pytest.mark.covers("replay_ratio", "replay_data")
def test_replay_without_what_it_needs_is_refused(call, chats, tmp_path):
    with pytest.raises(ValueError, match="replay_ratio=0.1 needs replay_data"):
        call(replay_ratio=0.1)
    with pytest.raises(ValueError, match="replay_data needs replay_ratio"):
        call(replay_data=[str(chats)])
    with pytest.raises(ValueError, match=r"replay_data must be list\[str\] \| None, got"):
        call(replay_ratio=0.1, replay_data=str(chats))
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl does not exist"):
        call(replay_ratio=0.1, replay_data=[str(tmp_path / "gone.jsonl")])
