"""The tokens of a span are found with any tokenizer, or the span is refused."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from osft.data.chat import IGNORE, tokenize
from osft.data.records import DataError, Record
from osft.data.token_spans import TokenizerMismatchError, encode
from tests.conftest import CHATML, byte_tokenizer

CORPUS = ["user hello what is it? assistant:no USER: hi ASSISTANT: hello there.\n\n :no hiyes hi é 日本 fine ok"] * 20
# As GPT-4's and Llama 3's: one sign before a word, and line breaks after signs, are in their tokens.
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def byte_bpe(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet))
    if normalizer:
        backend.normalizer = normalizer
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: a space before each text, and bytes for what it does not know."""
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    known = [text.replace("日本", "") for text in CORPUS]
    backend.train_from_iterator(known, trainers.BpeTrainer(vocab_size=310, special_tokens=["<unk>", *all_bytes]))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    return backend


def unigram(*normalizing: normalizers.Normalizer) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(list(normalizing))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Tokenizer:
    """As BERT's: lower case, no accents, no white space."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return backend


class ShiftedOffsets(PreTrainedTokenizerFast):
    """Says of each token a wrong place."""

    def __call__(self, *texts, **options):
        encoded = super().__call__(*texts, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [
                [(first + 2, last + 2) for first, last in of_text] for of_text in encoded["offset_mapping"]
            ]
        return encoded


class EmptyOffsets(PreTrainedTokenizerFast):
    """Says of each token that it has no character, as a version of Llama 3's did."""

    def __call__(self, *texts, **options):
        encoded = super().__call__(*texts, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [
                [(first, first) for first, _ in of_text] for of_text in encoded["offset_mapping"]
            ]
        return encoded


def fast(backend: Tokenizer, kind: type = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    unknown = {"unk_token": "<unk>"} if backend.token_to_id("<unk>") is not None else {}
    return kind(tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], **unknown)


MAKERS = {
    "bytes": byte_tokenizer,
    "byte BPE": lambda: fast(byte_bpe()),
    "composing byte BPE": lambda: fast(byte_bpe(normalizers.NFC())),
    "SentencePiece BPE": lambda: fast(sentencepiece_bpe()),
    "unigram": lambda: fast(unigram(normalizers.NFKC())),
    "lower-case unigram": lambda: fast(unigram(normalizers.Lowercase())),
    "unigram without accents": lambda: fast(unigram(normalizers.NFD(), normalizers.StripAccents())),
    "WordPiece": lambda: fast(word_piece()),
    "shifted offsets": lambda: fast(byte_bpe(), ShiftedOffsets),
    "empty offsets": lambda: fast(byte_bpe(), EmptyOffsets),
    "Python bytes": ByT5Tokenizer,
}


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request):
    return MAKERS[request.param]()


VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
COLONS = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {"ChatML": CHATML, "Vicuna": VICUNA, "colons": COLONS}
ANSWERS = ["No.", "日本 e\u0301é no", " no \n", "\n\nhello.\n\n", "hello hello", ":no"]


def bare(text: str) -> str:
    """Without what the tokenizers above change."""
    for accented, plain in (("e\u0301", "e"), ("é", "e")):
        text = text.replace(accented, plain)
    return "".join(text.lower().split())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_assistant_says_is_found_among_any_tokens(any_tokenizer, template, answer):
    any_tokenizer.chat_template = TEMPLATES[template]
    turns = (("user", "hello hi"), ("assistant", answer), ("user", "no"), ("assistant", "ok"))
    record = Record(source="f:1", messages=tuple({"role": role, "content": content} for role, content in turns))
    sample = tokenize(record, any_tokenizer)
    learned = any_tokenizer.decode([label for label in sample.labels if label != IGNORE])
    for token in (any_tokenizer.eos_token, "<|im_end|>", "<unk>"):  # an accent may be unknown
        learned = learned.replace(token, "")
    assert bare(learned) in (bare(answer + "ok"), bare(":" + answer + ":ok"), bare(":" + answer + "ok"))


@pytest.mark.parametrize("name", ["byte BPE", "shifted offsets", "Python bytes"])
def test_tokens_are_those_of_the_whole_text_whatever_the_way(name):
    tokenizer, text = MAKERS[name](), "hello there.\n\nno 日本 fine"
    _, encoded = encode(tokenizer, ["another", text])
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    in_spans = encoded.in_spans([(5, 11), (14, 16)])
    found = [token for token, is_in in zip(encoded.input_ids, in_spans, strict=True) if is_in]
    assert tokenizer.decode(found) == " thereno"


def test_a_token_that_joins_the_answer_with_a_question_is_refused():
    tokenizer = fast(word_piece())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})
    with pytest.raises(DataError, match="f:1: a token joins letters of 'yes' and of the text beside it .'hiyes'"):
        tokenize(Record(source="f:1", messages=messages), tokenizer)


class Forgetful(PreTrainedTokenizerFast):
    """Reads a text without its vowels, and says nothing of places."""

    is_fast = False

    def __call__(self, text, **options):
        return super().__call__(text.translate(str.maketrans("", "", "aeiou")), **options)


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_remedy():
    tokenizer = fast(byte_bpe(), Forgetful)
    (encoded,) = encode(tokenizer, ["say hello now"])
    with pytest.raises(TokenizerMismatchError, match=r"Forgetful\) makes ' hll' of 'hello', .* tokenizer.json"):
        encoded.in_spans([(4, 9)])


def test_what_is_no_text_has_no_token():
    some, none = encode(byte_tokenizer(), ["some text", ""])
    assert not any(some.in_spans([(3, 3)]))
    assert none.input_ids == []
