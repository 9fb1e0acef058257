"""A model's scores, answers, benchmarks and drift, measured only where the store does not have them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from osft.data.packing import FAST_TOKENS, Batching
from osft.data.records import Record
from osft.evaluation.drift import RecordDrift, compare
from osft.evaluation.generation import MAX_NEW_TOKENS, generate
from osft.evaluation.record import BenchmarkScore
from osft.evaluation.score_store import ScoreStore, measurement_key, model_hash
from osft.evaluation.scoring import MAX_TEXT_TOKENS, RecordScores, score_records
from osft.models.conversion import fill_exact_
from osft.models.cpu_linear import fast_linear_layers
from osft.models.loading import load_model
from osft.subspace.preflight import Preflight, preflight

if TYPE_CHECKING:
    from osft.evaluation.benchmarks import Benchmarks

logger = logging.getLogger(__name__)


def served_dtype() -> torch.dtype:
    """In which models are scored and answer here: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


class MeasuredModel:
    """A model folder to be measured. The model is loaded when the first number is missing, and lives as long as this.

    It is computed in `served_dtype()` or in `dtype`. `exact`: with the exact weights that its folder
    keeps, in float32, instead of those that are served.
    """

    def __init__(
        self,
        folder: Path,
        store: ScoreStore,
        *,
        max_tokens: int | None,
        trust_remote_code: bool,
        exact: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._folder = folder
        self._store = store
        self._trust_remote_code = trust_remote_code
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._max_tokens = max_tokens or FAST_TOKENS[self._device]
        self._exact = exact
        self._dtype = dtype or (torch.float32 if exact else served_dtype())

    def scores(self, records: Sequence[Record], description: str) -> RecordScores:
        """Of each record; `description` is what the progress bar shows."""

        def measure() -> dict[str, Any]:
            model, tokenizer = self._loaded
            scores = score_records(
                model,
                tokenizer,
                records,
                max_tokens=self._max_tokens,
                batching=self._preflight.shared_batching,
                description=description,
            )
            return asdict(scores)

        return RecordScores(**self._store.measured(self._scores_key(records), measure))

    def _scores_key(self, records: Sequence[Record]) -> str:
        determined_by: dict[str, Any] = {"max_tokens": self._max_tokens, "max_text_tokens": MAX_TEXT_TOKENS}
        if self._batching is not Batching.PACKED:  # scores of samples that saw each other may be in the store
            determined_by["batching"] = self._batching
        return self._key("scores", records=[record.content_hash for record in records], **determined_by)

    def drift(
        self, references: Sequence["MeasuredModel"], records: Sequence[Record], description: str
    ) -> list[RecordDrift | None]:
        """How far this model is from each reference on each record: see `compare`, also for None.

        All models are in memory. One that is the same file for file is not loaded twice, and has moved by exactly 0.
        The scores that the same logits give are kept, too.
        """
        known = {self._model_hash: self}
        references = [known.setdefault(each._model_hash, each) for each in references]
        keys = [self._drift_key(reference, records) for reference in references]
        missing = {k: each for k, each in zip(keys, references, strict=True) if self._store.get(k) is None}
        for batching in sorted({self._batching_beside(each) for each in missing.values()}):
            compared = {key: each for key, each in missing.items() if self._batching_beside(each) is batching}
            models = [*compared.values(), self]
            # As `scores` would compute them.
            scored = [each if each._preflight.shared_batching is batching else None for each in models]
            found = compare(
                [model._loaded[0] for model in models],
                [model._loaded[1] for model in models],
                records,
                max_tokens=self._max_tokens,
                batching=batching,
                description=description,
                with_scores=any(each and self._store.get(each._scores_key(records)) is None for each in scored),
            )
            for key, drift in zip(compared, found.drift, strict=True):
                self._store.put(key, asdict(drift) if drift else {})
            for each, scores in zip(scored, found.scores, strict=True):
                if each and scores:
                    self._store.measured(each._scores_key(records), partial(asdict, scores))
        kept = [self._store.get(key) for key in keys]
        return [RecordDrift(**drift) if drift else None for drift in kept]

    def _batching_beside(self, reference: "MeasuredModel") -> Batching:
        batching = self._preflight.shared_batching
        return batching if reference._preflight.shared_batching is batching else Batching.PADDED

    def _drift_key(self, reference: "MeasuredModel", records: Sequence[Record]) -> str:
        return self._key(
            "drift",
            reference=reference._model_hash,
            records=[record.content_hash for record in records],
            max_tokens=self._max_tokens,
            max_text_tokens=MAX_TEXT_TOKENS,
            batching=self._batching_beside(reference),
        )

    def answers(self, records: Sequence[Record]) -> list[str]:
        """What the model itself answers to each record's prompt."""

        def measure() -> list[str]:
            model, tokenizer = self._loaded
            return generate(model, tokenizer, records, together=self._batching is Batching.PACKED)

        hashes = [record.content_hash for record in records]
        answers: list[str] = self._store.measured(
            self._key("answers", records=hashes, max_new_tokens=MAX_NEW_TOKENS), measure
        )
        return answers

    def benchmarks(self, benchmarks: "Benchmarks", description: str) -> dict[str, BenchmarkScore]:
        """The results of each benchmark; `description` is what the log shows."""

        def measure() -> dict[str, Any]:
            logger.info(f"{description}: {', '.join(benchmarks.names)}")
            model, tokenizer = self._loaded
            with fast_linear_layers(model):
                return {name: score.to_dict() for name, score in benchmarks.run(model, tokenizer).items()}

        found = self._store.measured(self._key("benchmarks", tasks=benchmarks.content_hash), measure)
        return {name: BenchmarkScore(**score) for name, score in found.items()}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model, in evaluation mode on its devices, and its tokenizer."""
        trust = self._trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=trust)
        model: Any = load_model(
            self._folder,
            dtype=self._dtype,
            device=self._device,
            attention=self._preflight.attention,
            trust_remote_code=trust,
        )
        if self._exact and any(parameter.is_meta for parameter in model.parameters()):  # what the GPUs cannot hold
            model = load_model(self._folder, dtype=self._dtype, trust_remote_code=trust)
        if self._exact:
            fill_exact_(model, self._folder)
        return model, tokenizer

    @cached_property
    def _preflight(self) -> Preflight:
        return preflight(self._folder, trust_remote_code=self._trust_remote_code)

    @property
    def _batching(self) -> Batching:
        return self._preflight.batching

    @cached_property
    def _model_hash(self) -> str:
        return model_hash(self._folder)

    def _key(self, kind: str, **determined_by: Any) -> str:
        if self._exact:
            determined_by |= {"weights": "exact"}
        return measurement_key(
            kind, model=self._model_hash, dtype=str(self._dtype), device=self._device, **determined_by
        )
