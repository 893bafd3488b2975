"""What of a measurement is kept, so that one that was interrupted goes on: answers, and the scores of each unit.

Every file is written whole or not at all, and lies in a folder that is named by all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.conformance.pack import Answer
from tiers.conformance.scores import Phase, Scores
from tiers.files import write_whole
from tiers.sensitivity.units import By, Format, FormatName, Unit

VERSION = 1
"""Of how things are measured: what another one measured is not taken up."""
_FACTS = "study.json"

Measured = Mapping[tuple[str, Phase], Scores]
"""By the unit's name."""


class Request(BaseModel):
    """What is to be measured, of which checkpoint, and where it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    checkpoint: Path
    """The reference's."""
    packs: Path
    """Where a reference pack may be, whose answers are taken."""
    folder: Path
    """Where answers and scores are kept, and what was found."""
    out: Path
    """Where the table as JSON and the picture are written."""
    format: FormatName
    by: By
    prompts: int
    context_length: int

    @property
    def result(self) -> Path:
        """The table as JSON; the picture lies beside it."""
        return self.out / f"sensitivity-{self.by}-{self.format}.json"


@dataclass(frozen=True)
class Study:
    """The scores of one model along the same answers, in one format."""

    folder: Path
    facts: dict[str, Any]
    """All that scores depend on, but the unit and the phase."""

    @classmethod
    def of(
        cls, folder: Path, checkpoint: str, answers: Sequence[Answer], number: Format, computed: str
    ) -> "Study":
        """Opened, or begun.

        Args:
            folder: with all studies of the model.
            checkpoint: the reference checkpoint's digest.
            answers: along which everything is measured.
            number: of linear layers.
            computed: what computes: library versions, and the tensors' device.
        """
        asked = json.dumps([[each.prompt_id, each.prompt, each.answer] for each in answers])
        facts = {
            "version": VERSION,
            "checkpoint": checkpoint,
            "answers": hashlib.sha256(asked.encode()).hexdigest(),
            "format": number.text,
            "computed": computed,
        }
        study = cls(folder / _mark(facts), facts)
        study.folder.mkdir(parents=True, exist_ok=True)
        write_whole(study.folder / _FACTS, json.dumps(facts, indent=2).encode() + b"\n")
        return study

    def complete(self, units: Sequence[Unit], measure: Callable[[Unit, Phase, int, int], Scores]) -> Measured:
        """Every unit's scores in each of its phases: those that are kept, and the others.

        Args:
            units: all that are wanted.
            measure: gives what is not kept, which is kept at once; told how many are done, and of how many.
        """
        works = [(unit, phase) for unit in units for phase in unit.phases]
        kept = {(unit.name, phase): self.read(unit, phase) for unit, phase in works}
        found = {key: scores for key, scores in kept.items() if scores is not None}
        for unit, phase in works:
            if (unit.name, phase) not in found:
                found[unit.name, phase] = scores = measure(unit, phase, len(found), len(works))
                self.write(unit, phase, scores)
        return found

    def read(self, unit: Unit, phase: Phase) -> Scores | None:
        """What was measured of a unit; None if it was not, or the file is none."""
        try:
            with np.load(self._file(unit, phase), allow_pickle=False) as columns:
                return Scores.of(columns)
        except (OSError, EOFError, ValueError, BadZipFile):  # EOFError: it is empty
            return None

    def write(self, unit: Unit, phase: Phase, scores: Scores) -> None:
        """Keep it."""
        content = BytesIO()
        np.savez(content, **scores.columns())  # type: ignore[arg-type]  # none is named allow_pickle
        write_whole(self._file(unit, phase), content.getvalue())

    def _file(self, unit: Unit, phase: Phase) -> Path:
        # A unit of this name may be of other layers some day.
        of = _mark([unit.name, unit.linears, unit.kv_cache, unit.attention, phase])
        return self.folder / f"{unit.slug}-{phase}-{of}.npz"


class KeptAnswers:
    """Greedy answers that Transformers gave, a file each: more prompts later take up those of fewer."""

    def __init__(self, folder: Path, checkpoint: str, tokens: int) -> None:
        self._folder = folder / f"answers-{_mark([VERSION, checkpoint, tokens])}"

    def read(self, prompt_id: str, prompt: Sequence[int]) -> Answer | None:
        """The answer to this prompt, if it is still the same; None if there is none."""
        try:
            kept = Answer.model_validate_json(self._file(prompt_id).read_bytes())
        except (OSError, ValidationError):
            return None
        return kept if kept.prompt == list(prompt) else None

    def write(self, answer: Answer) -> None:
        """Keep it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(answer.prompt_id), answer.model_dump_json().encode())

    def _file(self, prompt_id: str) -> Path:
        return self._folder / f"{prompt_id}.json"


def _mark(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
