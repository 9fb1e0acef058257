"""What a model writes itself: how much, in which form, and the same again."""

import json

import pytest
import torch

from osft.data.self_written import OPENINGS, as_samples, default_num_tokens, save_texts, write_text
from tests.conftest import byte_tokenizer, tiny_llama
from tests.data.templates import shaped_tokenizer

END, START = 256, 257


def model(**changes):
    return tiny_llama(**changes).eval()


def written(writer=None, tokenizer=None, **settings):
    settings = {"num_tokens": 600, "seed": 0, "sequence_length": 60} | settings
    return write_text(writer or model(), tokenizer or byte_tokenizer(), **settings)


def favouring(token: int, logit: float):
    """A model that says little else."""
    writer = model(tie_word_embeddings=False)
    writer.lm_head = torch.nn.Linear(32, 258)
    with torch.no_grad():
        writer.lm_head.weight.zero_()
        writer.lm_head.bias.zero_()
        writer.lm_head.bias[token] = logit
    return writer


def test_texts_hold_as_many_tokens_as_were_asked_for():
    for num_tokens in (1, 59, 600, 1001):
        texts = written(num_tokens=num_tokens)
        assert sum(map(len, texts)) == num_tokens
        assert max(map(len, texts)) <= 60


def test_text_is_the_same_for_a_seed_and_another_for_another():
    assert written(seed=1) == written(seed=1)
    assert written(seed=1) != written(seed=2)


def test_what_is_drawn_elsewhere_is_left_as_it_was():
    writer = model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(writer)
    assert torch.equal(torch.rand(3), expected)


def test_quarter_of_the_texts_are_chats_of_the_template_and_half_begin_as_other_kinds_do():
    texts = written(num_tokens=2400)
    tokenizer = byte_tokenizer()
    opening = tokenizer("<|im_start|>user\n")["input_ids"]
    turn = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    chats = [text for text in texts if text[: len(opening)] == opening]
    assert 0.2 < len(chats) / len(texts) < 0.3
    openings = [tokenizer(opening)["input_ids"] for opening in OPENINGS]
    opened = [text for text in texts if any(text[1 : 1 + len(opening)] == opening for opening in openings)]
    assert 0.4 < len(opened) / len(texts) < 0.6
    assert all(opening in [text[1 : 1 + len(opening)] for text in opened] for opening in openings[:8])
    long = [text for text in chats if len(text) >= len(opening) + 60 // 4 + len(turn)]
    assert long
    for text in long:
        start = text.index(END)
        assert start - len(opening) <= 60 // 4
        assert text[start : start + len(turn)] == turn
    assert all(text[0] == END for text in texts if text not in chats)


def test_text_ends_where_the_model_ends_it():
    texts = written(favouring(END, 4.0), num_tokens=2000)
    plain = [text[1:] for text in texts[:-1] if text[0] == END]
    assert any(len(text) < 59 for text in plain)
    assert all(END not in text[:-1] for text in plain)


def test_tokenizer_without_template_has_plain_text_only():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert all(text[0] == END for text in written(tokenizer=tokenizer))


def test_temperature_is_that_of_the_softmax():
    writer = favouring(65, 3.0)
    for temperature in (1.0, 2.0):
        texts = written(writer, num_tokens=6000, temperature=temperature)
        tokens = [token for text in texts if text[0] == END for token in text[1:]]
        odds = torch.tensor(3.0 / temperature).exp().item()
        assert tokens.count(65) / len(tokens) == pytest.approx(odds / (odds + 257), rel=0.3)


def test_settings_for_generating_are_as_before():
    writer = model()
    before = writer.generation_config
    written(writer)
    assert writer.generation_config is before


@pytest.mark.parametrize(("token", "named"), [(END, "is over after"), (65, "one token over and over")])
def test_degenerate_text_is_refused_by_the_models_name(token, named):
    writer = favouring(token, 100.0)
    writer.config.name_or_path = "models/broken"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=f"models/broken.*{named}"):
        written(writer, tokenizer)


def test_model_that_computes_nan_is_refused_by_name():
    writer = favouring(65, float("nan"))
    writer.config.name_or_path = "models/broken"
    with pytest.raises(ValueError, match="models/broken computes NaN"):
        written(writer)


def test_tokenizer_without_a_first_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        written(tokenizer=tokenizer)


@pytest.mark.parametrize("template", ["llama3", "mistral", "qwen3"])
def test_turns_are_those_of_other_templates(template):
    tokenizer = shaped_tokenizer(template)
    texts = written(model(vocab_size=len(tokenizer)), tokenizer, sequence_length=200, num_tokens=2000)
    question = [{"role": "user", "content": "?"}]
    rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True).split("?")
    opening, turn = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in rendered)
    chats = [text for text in texts if text[: len(opening)] == opening and len(text) > 150]
    assert chats
    assert all(turn == text[text.index(turn[0], len(opening)) :][: len(turn)] for text in chats)


def test_samples_have_a_loss_on_every_token():
    (sample,) = as_samples([[5, 6, 7]])
    assert sample.input_ids == sample.labels == [5, 6, 7]


def test_saved_texts_read_back_as_the_same_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    text = tokenizer("<|im_start|>user\nWie geht's?<|im_end|>\n")["input_ids"]
    save_texts([text], tokenizer, tmp_path / "texts.jsonl")
    (line,) = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert tokenizer(json.loads(line)["text"])["input_ids"] == text


@pytest.mark.parametrize(("width", "tokens"), [(576, 3072), (2048, 3072), (4096, 6144), (28672, 49152), (99999, 49152)])
def test_wider_models_write_more(width, tokens):
    assert default_num_tokens(width) == tokens
