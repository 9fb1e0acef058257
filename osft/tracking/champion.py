"""The champion moves by compare-and-set: of any number of runs that started from it, one replaces it.

MLflow sets an alias unconditionally, so who may set it is decided on the storage root, which all rounds of a model
share:

    champions/<model>/<n>.json            the n-th claim: parent version, version, run. Created once (a hard link, or
                                          S3's If-None-Match), so one run has it. Never changed
    champions/<model>/<n>.outcome.json    what became of it: promoted, or void and why. Created once

A run that wants to promote first sees to it that the newest claim has an outcome, compares the champion with what it
started from, creates the next claim, sets the alias and writes the outcome.

    what happens                                what follows
    two runs create the same claim              one has it; the other one finds another champion, and is told so
    a run dies before its claim                 nothing: the champion is what it was
    a run dies after its claim                  whoever comes next (a round that begins, a run that promotes, the
                                                retried step) sets the alias for it: the claim is the promotion
    its version was deleted, or was refused     the claim is void, the next one can be made
    a run is slow after its claim               others wait GRACE_SECONDS, then set the alias for it
    it wakes and sets the alias late            it looks at the claims afterwards, and sets the alias of the newest
                                                promoted one again
    somebody moves the alias by hand            that holds: the next claim names the version that the alias names.
                                                To go back to an older version, set the alias, and promote as usual
    … while a claim has no outcome              the claim is void, unless the alias was moved to the claim's parent,
                                                where it was: this cannot be told from a run that died
    a claim is damaged                          DamagedFile names it
    rounds of a model use two storage roots     they do not see each other's claims: give a model one storage root
"""

import json
import time
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from osft import storage
from osft.storage.sealed import DamagedFile, sealed, unsealed
from osft.tracking.registry import CHAMPION, champion
from osft.tracking.runs import DECISION_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

GRACE_SECONDS = 10.0
"""How long the run that has a claim may take to set the alias before others do it."""
_POLL_SECONDS = 0.1
_OUTCOME = ".outcome.json"


class ChampionChanged(RuntimeError):
    """The champion is not the version that this run started from, so what the gate decided no longer holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right of one run to replace a champion."""

    number: int
    model_name: str
    parent_version: int | None
    """The champion when the claim was made."""
    version: int
    run: str
    """The pipeline run, to whoever looks."""
    token: str
    """Random: no two claims are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    promoted: bool
    reason: str


def promote(
    mlflow: "MlflowClient",
    model_name: str,
    version: int,
    *,
    storage_root: str,
    run: str = "",
    expected_champion: int | Literal["any"] | None = "any",
) -> int | None:
    """Point the alias `champion` at a version. Returns the version that it named before, or None.

    `expected_champion` is what the alias named when the run began (None: nothing); "any" asks for no check. A version
    that is the champion already stays it, so that a step can be repeated.

    Raises ChampionChanged if the champion is another version than expected, or another run replaces it first;
    DamagedFile if a claim cannot be read.
    """
    claims = _Claims(mlflow, model_name, storage_root)
    while True:
        newest = claims.settled()
        previous = champion(mlflow, model_name)
        if previous == version:
            return previous
        if expected_champion not in ("any", previous):
            raise ChampionChanged(
                f"{model_name}: {_named(previous)} is the champion; when this run began, it was "
                f"{_named(expected_champion)}. Version {version} was not compared with the present one and is not "
                "promoted. It stays registered: start the round again"
            )
        mine = Claim(
            number=newest + 1,
            model_name=model_name,
            parent_version=previous,
            version=version,
            run=run,
            token=uuid.uuid4().hex,
        )
        if not claims.create(mine):
            continue
        outcome = claims.settle(mine)
        if not outcome.promoted:
            raise ChampionChanged(
                f"{model_name}: version {version} is not promoted: {outcome.reason}. It stays registered: start the "
                "round again"
            )
        return previous


def settled_champion(mlflow: "MlflowClient", model_name: str, *, storage_root: str) -> int | None:
    """The version that `champion` names, or None if there is none yet, when no promotion is half done."""
    _Claims(mlflow, model_name, storage_root).settled()
    return champion(mlflow, model_name)


class _Claims:
    """The claims of one model."""

    def __init__(self, mlflow: "MlflowClient", model_name: str, storage_root: str) -> None:
        self._mlflow, self._model_name = mlflow, model_name
        self._folder = storage.join(storage_root, "champions", quote(model_name, safe=""))

    def create(self, claim: Claim) -> bool:
        """Whether the claim could be made: nobody had its number."""
        return storage.create(self._address(claim.number), _content(asdict(claim)))

    def settled(self) -> int:
        """The number of the newest claim, 0 if there is none, when it has an outcome."""
        number = self._newest()
        if number == 0:
            return 0
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                claim = self._claim(number)
                if self._outcome(claim) is not None:
                    return number
                error = None
            except DamagedFile as damaged:  # or, without hard links, not written to its end yet
                error = damaged
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        if error is not None:
            raise error
        self.settle(claim)
        return number

    def settle(self, claim: Claim) -> _Outcome:
        """Set the alias for a claim if that is still right, and write down what became of the claim."""
        present = champion(self._mlflow, self._model_name)
        reason = ""
        if present != claim.version:
            reason = self._objection(claim, present)
            if not reason:
                self._set(claim)
        outcome = _Outcome(promoted=not reason, reason=reason)
        storage.create(self._address(claim.number, _OUTCOME), _content(asdict(outcome)))
        found = self._outcome(claim)
        assert found is not None, "it was just made, here or elsewhere"
        return found

    def _objection(self, claim: Claim, present: int | None) -> str:
        """Why the alias must not be set for a claim; empty if nothing is against it."""
        if present != claim.parent_version:
            return f"the alias was moved to {_named(present)} meanwhile"
        from mlflow.exceptions import MlflowException

        try:
            tags = self._mlflow.get_model_version(self._model_name, str(claim.version)).tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return f"version {claim.version} is not in the registry"
        return f"the gate refused version {claim.version}" if tags.get(DECISION_TAG) == "refuse" else ""

    def _set(self, claim: Claim) -> None:
        """Set the alias. Where later claims were promoted meanwhile, that was too late: it is set again for them."""
        self._mlflow.set_registered_model_alias(self._model_name, CHAMPION, str(claim.version))
        while later := self._promoted_after(claim):
            claim = later
            self._mlflow.set_registered_model_alias(self._model_name, CHAMPION, str(claim.version))

    def _promoted_after(self, claim: Claim) -> Claim | None:
        for number in range(self._newest(), claim.number, -1):
            later = self._claim(number)
            outcome = self._outcome(later)
            if outcome is not None and outcome.promoted:
                return later
        return None

    def _newest(self) -> int:
        stems = (name.removesuffix(".json") for name in storage.names(self._folder))
        return max((int(stem) for stem in stems if stem.isdigit()), default=0)

    def _claim(self, number: int) -> Claim:
        address = self._address(number)
        remedy = "Set the alias champion to the version that is to have it, and remove the file"
        try:
            return Claim(**unsealed(storage.read(address) or b"", address, remedy))
        except TypeError:
            raise DamagedFile(f"{address} is damaged: it is no claim. {remedy}") from None

    def _outcome(self, claim: Claim) -> _Outcome | None:
        address = self._address(claim.number, _OUTCOME)
        content = storage.read(address)
        remedy = "Remove it; it is written again"
        try:
            return None if content is None else _Outcome(**unsealed(content, address, remedy))
        except TypeError:
            raise DamagedFile(f"{address} is damaged: it is no outcome. {remedy}") from None

    def _address(self, number: int, suffix: str = ".json") -> str:
        return storage.join(self._folder, f"{number}{suffix}")


def _content(value: dict[str, object]) -> bytes:
    return (json.dumps(sealed(value), indent=2) + "\n").encode()


def _named(version: int | str | None) -> str:
    return "no version" if version is None else f"version {version}"
