"""The reference pack: what the reference answered, and its distributions there; enough to measure a tier by.

A folder: ``pack.json`` says what it is of and the digest of every file, ``answers.parquet`` has the token ids,
``hidden/`` the reference's final hidden states of each answer, from which its distributions are computed exactly.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.conformance.prompts import Kind, Language
from tiers.conformance.scores import Scores
from tiers.conformance.sequence import Reference
from tiers.digests import sha256_of
from tiers.errors import AssayError
from tiers.manifest import Manifest

PACK_NAME = "pack.json"
FORMAT = 1
_ANSWERS = "answers.parquet"
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")
"""Where a checkpoint may hold its head: by itself, or tied to the embedding."""
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""Where a checkpoint may hold its chat template."""


class PackError(AssayError):
    """A reference pack is missing, damaged, or of another model than it is to be used with."""


class Answer(BaseModel):
    """What the reference answered to one prompt, as token ids."""

    model_config = ConfigDict(frozen=True)

    prompt_id: str
    kind: Kind
    language: Language
    greedy: bool
    """Whether each token was the likeliest, or they were sampled."""
    prompt: list[int]
    answer: list[int]

    @property
    def hidden(self) -> str:
        """The file of its hidden states, in the pack."""
        return f"hidden/{self.prompt_id}-{'greedy' if self.greedy else 'sampled'}.safetensors"


class Origin(BaseModel):
    """What a pack is of: a tier with another tokenizer or chat template would be asked something else."""

    model_config = ConfigDict(frozen=True)

    model: str
    checkpoint: str
    """The reference checkpoint's digest."""
    tokenizer: str
    template: str
    """SHA-256 of the files that hold them."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Of a checkpoint.

        Raises:
            PackError: it has no tokenizer, or no chat template.
        """
        template = next((manifest.files[name].sha256 for name in _TEMPLATES if name in manifest.files), None)
        tokenizer = manifest.files.get("tokenizer.json")
        if tokenizer is None or template is None:
            raise PackError(f"The checkpoint of {manifest.model} has no tokenizer.json or no chat template.")
        return cls(model=manifest.model, checkpoint=manifest.digest, tokenizer=tokenizer.sha256, template=template)


class _Contents(BaseModel):
    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    origin: Origin
    engine: str
    """The fingerprint of the engine that answered."""
    prompts: str
    """The digest of the prompts' set."""
    seed: int
    created: datetime
    files: dict[str, str]


class Pack:
    """One pack, read whole but for the hidden states, which engines read themselves."""

    def __init__(self, folder: Path, contents: _Contents, answers: tuple[Answer, ...]) -> None:
        self.folder = folder
        self.origin = contents.origin
        self.prompts = contents.prompts
        self.engine = contents.engine
        self.seed = contents.seed
        self.created = contents.created
        self.answers = answers
        self.digest = hashlib.sha256(
            json.dumps([contents.origin.model_dump(), sorted(contents.files.items())]).encode()
        ).hexdigest()

    @classmethod
    def write(
        cls, folder: Path, origin: Origin, answers: Sequence[Answer], *, engine: str, prompts: str, seed: int
    ) -> Self:
        """Finish a pack whose hidden states are there."""
        import pyarrow as pa  # here and below: who answers requests need not wait for it
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        rows = [answer.model_dump() for answer in answers]
        pq.write_table(pa.Table.from_pylist(rows), folder / _ANSWERS, compression="zstd")
        names = [_ANSWERS, *(answer.hidden for answer in answers)]
        contents = _Contents(
            origin=origin,
            engine=engine,
            prompts=prompts,
            seed=seed,
            created=datetime.now(UTC),
            files={name: sha256_of(folder / name) for name in names},
        )
        (folder / PACK_NAME).write_text(contents.model_dump_json(indent=2) + "\n")  # last: else it is not whole
        return cls(folder, contents, tuple(answers))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            PackError: there is none, or a file of it is missing or not what it was.
        """
        import pyarrow.parquet as pq

        try:
            contents = _Contents.model_validate_json((folder / PACK_NAME).read_bytes())
        except FileNotFoundError:
            raise PackError(f"There is no reference pack in {folder}: `assay certify` makes one.") from None
        except ValidationError as error:
            raise PackError(f"{folder / PACK_NAME} is not understood: {error.errors()[0]['msg']}.") from None
        if contents.format != FORMAT:
            raise PackError(f"The reference pack in {folder} is of format {contents.format}, not {FORMAT}.")
        for name, digest in contents.files.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise PackError(f"{folder / name} is missing or not what it was: make the reference pack again.")
        rows = pq.read_table(folder / _ANSWERS).to_pylist()
        return cls(folder, contents, tuple(Answer.model_validate(row) for row in rows))

    def check(self, manifest: Manifest) -> None:
        """Hold a tier's checkpoint against it.

        Raises:
            PackError: another tokenizer or chat template.
        """
        tier = Origin.of(manifest)
        for what in ("tokenizer", "template"):
            if getattr(tier, what) != getattr(self.origin, what):
                raise PackError(
                    f"The {what} of {manifest.model}'s {manifest.recipe} checkpoint is not that of the reference "
                    f"pack in {self.folder}: they would be asked different things."
                )

    @property
    def prompts_asked(self) -> tuple[Answer, ...]:
        """The first answer to each prompt, which has its id, kind and language."""
        return tuple({answer.prompt_id: answer for answer in reversed(self.answers)}.values())[::-1]

    def by_prompt(self, scores: Scores) -> Scores:
        """The same scores, counted by prompts: the answers to one are not independent of each other."""
        places = {answer.prompt_id: place for place, answer in enumerate(self.prompts_asked)}
        of_answer = np.array([places[answer.prompt_id] for answer in self.answers], np.int32)
        return replace(scores, prompt=of_answer[scores.prompt])

    def reference(self, answer: Answer, checkpoint: Path) -> Reference:
        """Where an engine finds the reference's distributions of one answer.

        Args:
            answer: one of the pack's.
            checkpoint: the reference checkpoint's folder.

        Raises:
            PackError: the checkpoint has no head.
        """
        file, name = head_of(checkpoint)
        return Reference(hidden=str(self.folder / answer.hidden), head=str(file), head_name=name)


def head_of(checkpoint: Path) -> tuple[Path, str]:
    """The file that holds a checkpoint's head, and its name there.

    Raises:
        PackError: there is none.
    """
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            found |= {name: file for name in tensors.keys() if name in _HEADS}  # noqa: SIM118  # no mapping
    for name in _HEADS:
        if name in found:
            return found[name], name
    raise PackError(f"{checkpoint} holds no head: neither {' nor '.join(_HEADS)}.")
