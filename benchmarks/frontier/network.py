"""The model as a run sees it: whole, or only its last blocks, fed with what the frozen ones computed once."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from osft.storage.atomic import atomic_path

TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Text:
    """Samples of equal length."""

    tokens: torch.Tensor
    """(samples, tokens)."""
    counted: torch.Tensor
    """(samples, tokens), bool: whose likelihood counts; never that of the first."""
    answers: torch.Tensor | None = None
    """(samples, 2): the first token of the right answer and of the wrong one, of samples that ask something."""

    @staticmethod
    def of_blocks(tokens: torch.Tensor) -> "Text":
        """Samples in which everything counts."""
        counted = torch.ones_like(tokens, dtype=torch.bool)
        counted[:, 0] = False
        return Text(tokens, counted)

    def pieces(self, length: int) -> "Text":
        """The samples cut into shorter ones; what is left of each is dropped."""
        tokens = self.tokens.shape[1]
        kept = self.tokens[:, : tokens // length * length]
        return Text.of_blocks(kept.reshape(-1, length))

    def rows(self, rows: torch.Tensor) -> "Text":
        """Some of the samples."""
        return Text(self.tokens[rows], self.counted[rows], None if self.answers is None else self.answers[rows])


@dataclass(frozen=True, slots=True)
class Seen:
    """A text as the network takes it."""

    text: Text
    inputs: torch.Tensor
    """What the first block that is there gets, (samples, tokens, hidden size); the tokens for a whole model."""
    targets: torch.Tensor
    """(samples, tokens): each token's place in the vocabulary that the softmax is over, -1 if it has none."""


class Passed(nn.Module):
    """In place of a block whose output is known already."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """What came in."""
        return hidden_states


class Network:
    """A causal model of the Llama kind, of which all blocks are there, or only the last ones.

    With `blocks`, the output of the others is computed once for every text, and kept below `cache`, and the softmax is
    over `vocabulary`. Names of modules are those of the whole model in either case.
    """

    def __init__(
        self, folder: Path, device: str, *, blocks: int | None, vocabulary: torch.Tensor | None, cache: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.device, self._cache, self._folder = device, cache, folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).requires_grad_(False).eval()
        self.vocabulary = None if vocabulary is None else vocabulary.to(device)
        self._first = 0 if blocks is None else len(model.model.layers) - blocks
        self._is_cut = blocks is not None
        self._front = model.model.layers[: self._first]
        for number in range(self._first):
            model.model.layers[number] = Passed()
        self.base = {name: tensor.clone() for name, tensor in self.weights().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """What full fine-tuning trains, by name: blocks, final norm and, of a whole model, the embedding."""
        return {
            name: parameter.detach()
            for name, parameter in self.model.model.named_parameters()
            if not (self._is_cut and name.startswith("embed_tokens"))
        }

    @torch.no_grad()
    def put(self, tuned: dict[str, torch.Tensor], scale: float = 1.0) -> None:
        """Give the model the weights W0 + scale (W - W0), W0 being those that it was loaded with."""
        for name, parameter in self.weights().items():
            parameter.copy_(self.base[name])
            if scale:
                parameter.add_(tuned[name] - self.base[name], alpha=scale)

    def see(self, text: Text) -> Seen:
        """A text as the network takes it."""
        inputs = self._hidden_states(text.tokens) if self._is_cut else text.tokens
        return Seen(text, inputs.to(self.device), self.places(text.tokens))

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where tokens are in the vocabulary that the softmax is over; -1 for one that it lacks."""
        tokens = tokens.to(self.device)
        if self.vocabulary is None:
            return tokens
        places = torch.searchsorted(self.vocabulary, tokens).clamp_(max=len(self.vocabulary) - 1)
        return torch.where(self.vocabulary[places] == tokens, places, -1)

    @torch.no_grad()
    def _hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        identity = f"{self._folder.name} {self._first} {tokens.tolist()}"
        file = self._cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file():
            rows = tokens.to(self.device).split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))
            inner = self.model.model
            kept = inner.layers, inner.norm
            inner.layers, inner.norm = self._front, nn.Identity()
            found = [inner(input_ids=row, use_cache=False).last_hidden_state.cpu() for row in rows]
            inner.layers, inner.norm = kept
            with atomic_path(file) as temporary:
                save_file({"hidden": torch.cat(found)}, temporary)
        return load_file(file)["hidden"]

    def hidden(self, seen: Seen, rows: slice | list[int]) -> torch.Tensor:
        """What the head gets: (samples, tokens, hidden size)."""
        name = "inputs_embeds" if self._is_cut else "input_ids"
        hidden: torch.Tensor = self.model.model(**{name: seen.inputs[rows]}, use_cache=False).last_hidden_state
        return hidden

    def head(self) -> torch.Tensor:
        """The head's weight, (vocabulary, hidden size)."""
        weight: torch.Tensor = self.model.lm_head.weight
        return weight if self.vocabulary is None else weight[self.vocabulary]

    def loss_sum(self, seen: Seen, rows: list[int]) -> torch.Tensor:
        """The sum of the negative log-likelihoods of the tokens that count, in nats."""
        counted = seen.text.counted[rows][:, 1:].to(self.device)
        logits = self.hidden(seen, rows)[:, :-1][counted] @ self.head().T
        return nn.functional.cross_entropy(logits, seen.targets[rows][:, 1:][counted], reduction="sum")

    def divergence(self, seen: Seen, name: str, row: int, other: "Reference") -> torch.Tensor:
        """KL(other || network) of a sample of a text, the mean over all its tokens, in nats."""
        log_p = (other.hidden[name][row] @ other.head.T).log_softmax(-1)
        log_q = (self.hidden(seen, [row])[0] @ self.head().T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def batches(self, seen: Seen) -> Iterator[slice]:
        """All samples, a few at a time."""
        samples, length = seen.text.tokens.shape
        size = max(1, TOKENS_AT_ONCE // length)
        return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


@dataclass(frozen=True, slots=True)
class Reference:
    """A model to measure the distance from: what its head got and gets multiplied with."""

    hidden: dict[str, torch.Tensor]
    """By the text's name, (samples, tokens, hidden size)."""
    head: torch.Tensor


@torch.no_grad()
def reference(network: Network, texts: dict[str, Seen]) -> Reference:
    """The network as it is now, on these texts."""
    hidden = {
        name: torch.cat([network.hidden(seen, rows) for rows in network.batches(seen)]) for name, seen in texts.items()
    }
    return Reference(hidden, network.head().clone())


@torch.no_grad()
def measure(network: Network, seen: Seen, name: str, references: dict[str, Reference]) -> dict[str, list[float]]:
    """What there is to say of each sample of a text, means over the tokens that count.

    loss     negative log-likelihood, nats per token
    right    1 if the right answer is likelier than the wrong one, else 0 (of samples that ask)
    <name>   of each reference: KL(reference || network), nats per token
    """
    measured: dict[str, list[float]] = {"loss": [], **{reference: [] for reference in references}}
    if seen.text.answers is not None:
        measured["right"] = []
    head = network.head()
    for rows in network.batches(seen):
        hidden = network.hidden(seen, rows)
        for place, row in enumerate(range(rows.start, rows.stop)):
            counted = seen.text.counted[row, 1:].to(network.device)
            logits = (hidden[place, :-1][counted] @ head.T).log_softmax(-1)
            targets = seen.targets[row, 1:][counted]
            measured["loss"].append(-logits.gather(-1, targets[:, None]).mean().item())
            for key, other in references.items():
                log_p = (other.hidden[name][row, :-1][counted] @ other.head.T).log_softmax(-1)
                measured[key].append((log_p.exp() * (log_p - logits)).sum(-1).mean().item())
            if seen.text.answers is not None:
                right, wrong = network.places(seen.text.answers[row]).tolist()
                measured["right"].append(float(logits[0, right] > logits[0, wrong]))
    return measured
