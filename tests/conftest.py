"""Small real things: a random two-layer Llama with a byte-level chat tokenizer, and a few chats."""

import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch is imported, and for all that tests start: tiny models gain nothing from a second thread, and as many
# threads as cores in each of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

# A console of rich that is made while COLUMNS is set keeps that width, whatever a test then asks for.
os.environ.pop("COLUMNS", None)
from osft.data.packing import Feeding
from osft.models import cpu_linear
from osft.process import logs

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the two markers of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def feeding(max_tokens: int = 2048, **how: Any) -> Feeding:
    """Of one process on the CPU, unless `how` says otherwise."""
    return Feeding(max_tokens=max_tokens, device=torch.device("cpu"), **how)


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Two layers with square, tall and wide weights, grouped-query attention and tied embeddings."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 256,
        "initializer_range": 0.2,  # large enough for frozen embeddings to tell tokens apart
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


@pytest.fixture
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own products on a processor of AMD, too: for who compares bits with them, or counts them."""
    monkeypatch.setattr(cpu_linear, "onednn_operation", lambda: None)


@pytest.fixture(scope="session", autouse=True)
def no_power_is_lost() -> Iterator[None]:
    """Flushing to disk takes the time of the tests. Those about it look at the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library says is on the standard output without the time, for `capsys`, and in `caplog`."""
    monkeypatch.setenv(logs.CONTEXT, "")  # and as it was, afterwards
    logs.configure()
    library = logging.getLogger("osft")
    library.handlers[-1].setFormatter(logging.Formatter())
    library.propagate = True


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def arithmetic(count: int, seed: int = 0) -> list[dict]:
    """Chats that say which of two numbers is larger, as a task with choices."""
    numbers = random.Random(seed)
    records = []
    for _ in range(count):
        first, second = numbers.sample(range(100), 2)
        question = {"role": "user", "content": f"{first} or {second}?" + " please" * numbers.randrange(3)}
        answer = {"role": "assistant", "content": "first" if first > second else "second"}
        records.append({"messages": [question, answer], "choices": ["first", "second"]})
    return records


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "larger-number.jsonl", arithmetic(120))


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with nothing in it, to be copied: to make one takes seconds."""
    from osft.tracking import runs

    folder = tmp_path_factory.mktemp("empty-registry")
    runs.client(runs.local_tracking_uri(folder), folder)
    return folder / "mlflow" / "mlflow.db"


@pytest.fixture(scope="session")
def registry_root(tmp_path_factory: pytest.TempPathFactory, empty_registry: Path) -> Path:
    """A storage root whose MLflow database all tests share that give their models names of their own."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "mlflow").mkdir()
    shutil.copyfile(empty_registry, folder / "mlflow" / "mlflow.db")
    return folder


@pytest.fixture(scope="session")
def mlflow(registry_root: Path) -> Any:
    from osft.tracking import runs

    return runs.client(runs.local_tracking_uri(registry_root), registry_root)


@pytest.fixture(scope="session")
def object_store() -> Iterator["ObjectStore"]:
    from tests.object_store import ObjectStore  # moto, which a machine with a GPU need not have

    with ObjectStore() as store:
        yield store


@pytest.fixture
def bucket(object_store: "ObjectStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket; this process and those that it starts reach it from an empty scratch folder."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OSFT_SCRATCH", str(tmp_path / "scratch"))
    return object_store.bucket()
