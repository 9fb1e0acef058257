"""Texts to train and measure on: Debian's translated manual pages, web text, Python's own source.

manual pages    of a package such as manpages-de, downloaded once with `apt-get download`; a far domain for a model
                of English
web text        example:web-text, passages of OpenWebText; what models of English are made of
Python source   the standard library of the interpreter that runs this
"""

import gzip
import json
import random
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

from osft.data import examples
from osft.storage.atomic import atomic_path

WEB_TEXT = "example:web-text"


def manual_pages(package: str, cache: Path) -> list[str]:
    """The manual pages of Debian's `package` as plain text, in an order that is always the same.

    Raises RuntimeError if the package cannot be had.
    """
    folder = cache / package
    if not folder.is_dir():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _unpack(package, temporary, folder)
    files = sorted(folder.glob("usr/share/man/*/*/*.gz"))
    random.Random(0).shuffle(files)
    pages = [gzip.decompress(file.read_bytes()).decode("utf-8", "replace") for file in files]
    return [plain(page) for page in pages if not page.startswith(".so")]


def _unpack(package: str, folder: Path, kept: Path) -> None:
    commands = (["apt-get", "download", package], ["sh", "-c", 'dpkg-deb -x "$0"_*.deb .', package])
    for command in commands:
        try:
            finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(
                f"{package}: there is no {command[0]} here. Copy the folder that `dpkg-deb -x` makes of Debian's "
                f"package {package} to {kept}"
            ) from None
        if finished.returncode:
            raise RuntimeError(
                f"{package}: `{' '.join(command[:3])}` failed; try `apt-get update` first:\n{finished.stderr[-2000:]}"
            )


def plain(page: str) -> str:
    """The text of a page's roff source, without its layout."""
    lines = []
    for line in page.splitlines():
        text = re.sub(r"^\.(SH|SS|B|I|BR|IR|RB|RI|BI|IB|SM|SB) *", "", line)
        if text.startswith((".", "'")):
            continue
        text = re.sub(r"\\f(\([A-Z]{2}|[A-Z])", "", text)
        for escape, character in {r"\-": "-", r"\(aq": "'", r"\(Bq": "„", r"\(lq": "“", r"\e": "\\"}.items():
            text = text.replace(escape, character)
        lines.append(re.sub(r"\\(\(..|.)", "", text))
    return "\n".join(line for line in lines if line.strip())


def web_text(cache: Path) -> list[str]:
    """Passages of web text."""
    lines = Path(examples.resolve(WEB_TEXT, cache)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def python_source() -> list[str]:
    """The modules at the top of the standard library, in an order that is always the same."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def blocks_of_tokens(tokenizer: Any, texts: list[str], count: int, size: int) -> torch.Tensor:
    """(count, size) tokens: texts one after the other, cut. Raises ValueError if they are too short."""
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= count * size:
            return torch.tensor(tokens[: count * size]).view(count, size)
    raise ValueError(f"{len(tokens)} tokens of text are too few for {count} samples of {size}")


def scattered_blocks(tokenizer: Any, texts: list[str], count: int, size: int, *, out_of: int) -> torch.Tensor:
    """(count, size) tokens: blocks of `blocks_of_tokens` drawn from so many times as many, so that few share a text."""
    blocks = blocks_of_tokens(tokenizer, texts, count * out_of, size)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return blocks[order[:count]]


_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of so many tokens, trained on Python's source, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special, alphabet = ["<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator(python_source(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[1], additional_special_tokens=special[:1]
    )
    tokenizer.chat_template = _CHATML + _ASKS
    tokenizer.save_pretrained(folder)
