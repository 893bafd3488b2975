"""The reference pack: what the reference answered, and its distributions there; enough to measure a tier by.

A folder: ``pack.json`` says what it is of and the digest of every file, ``answers.parquet`` has the token ids,
``likeliest.parquet`` the likeliest tokens at each of them with the remaining mass, and ``hidden/`` the reference's
final hidden states, from which its distributions are computed exactly. Without ``hidden/`` a pack is a few
megabytes, and still enough for bounds.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.conformance.prompts import Kind, Language
from tiers.conformance.scores import Scores
from tiers.conformance.sequence import Head, Reference
from tiers.digests import sha256_of
from tiers.errors import AssayError
from tiers.manifest import Manifest

PACK_NAME = "pack.json"
FORMAT = 2
_ANSWERS = "answers.parquet"
_LIKELIEST = "likeliest.parquet"
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")
"""Where a checkpoint may hold its head: by itself, or tied to the embedding."""
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""Where a checkpoint may hold its chat template."""


class PackError(AssayError):
    """A reference pack is missing, damaged, or of another model than it is to be used with."""


class Answer(BaseModel):
    """What the reference answered to one prompt, as token ids; or a passage of the corpus and its first token."""

    model_config = ConfigDict(frozen=True)

    prompt_id: str
    kind: Kind | Literal["corpus"]
    language: Language
    source: Literal["greedy", "sampled", "written"]
    """How its tokens came about: each was the reference's likeliest, they were sampled, or people wrote them."""
    prompt: list[int]
    answer: list[int]

    @property
    def is_written(self) -> bool:
        """Whether it is a passage of the corpus, and no answer."""
        return self.source == "written"

    @property
    def hidden(self) -> str:
        """The file of its hidden states, in the pack."""
        return f"hidden/{self.prompt_id}-{self.source}.safetensors"


@dataclass(frozen=True)
class Likeliest:
    """The reference's likeliest tokens at each token of an answer, [A, k], and what is left."""

    tokens: NDArray[np.int32]
    ln_p: NDArray[np.float32]
    ln_rest: NDArray[np.float32]
    """ln of the probability of all others together, [A]."""
    ln_given: NDArray[np.float32]
    """ln of the answer's own tokens', [A]."""


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
    corpus: str
    """Of the corpus's passages."""
    seed: int
    created: datetime
    files: dict[str, str]
    hidden: dict[str, str]
    """Of the hidden states, which a pack may be without."""


class Pack:
    """One pack, read whole but for the hidden states, which engines read themselves."""

    def __init__(self, folder: Path, contents: _Contents, answers: tuple[Answer, ...]) -> None:
        self.folder = folder
        self.origin = contents.origin
        self.prompts = contents.prompts
        self.corpus = contents.corpus
        self.engine = contents.engine
        self.seed = contents.seed
        self.created = contents.created
        self.answers = answers
        self.has_hidden = all((folder / name).is_file() for name in contents.hidden)
        files = sorted((contents.files | contents.hidden).items())
        self.digest = hashlib.sha256(json.dumps([contents.origin.model_dump(), files]).encode()).hexdigest()

    @classmethod
    def write(
        cls,
        folder: Path,
        origin: Origin,
        answers: Sequence[Answer],
        *,
        engine: str,
        prompts: str,
        corpus: str,
        seed: int,
    ) -> Self:
        """Finish a pack whose hidden states are there, as `sequence.Keep` has them written."""
        import pyarrow as pa  # here and below: who answers requests need not wait for it
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        rows = [answer.model_dump() for answer in answers]
        pq.write_table(pa.Table.from_pylist(rows), folder / _ANSWERS, compression="zstd")
        columns = [_kept(folder / answer.hidden) for answer in answers]
        pq.write_table(pa.table(_joined(columns)), folder / _LIKELIEST, compression="zstd")
        contents = _Contents(
            origin=origin,
            engine=engine,
            prompts=prompts,
            corpus=corpus,
            seed=seed,
            created=datetime.now(UTC),
            files={name: sha256_of(folder / name) for name in (_ANSWERS, _LIKELIEST)},
            hidden={answer.hidden: sha256_of(folder / answer.hidden) for answer in answers},
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
        # Hidden states are all there or none is.
        expected = contents.files | (contents.hidden if (folder / "hidden").is_dir() else {})
        for name, digest in expected.items():
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
        answers = {answer.prompt_id: answer for answer in reversed(self.answers) if not answer.is_written}
        return tuple(answers.values())[::-1]

    @property
    def passages(self) -> tuple[Answer, ...]:
        """Of the corpus."""
        return tuple(answer for answer in self.answers if answer.is_written)

    def of_answers(self, scores: Scores) -> Scores:
        """Those of answers, counted by `prompts_asked`: the answers to one prompt are not independent."""
        return self._counted(scores, self.prompts_asked, is_written=False)

    def of_corpus(self, scores: Scores) -> Scores:
        """Those of the corpus, counted by `passages`."""
        return self._counted(scores, self.passages, is_written=True)

    def _counted(self, scores: Scores, asked: Sequence[Answer], *, is_written: bool) -> Scores:
        places = {answer.prompt_id: place for place, answer in enumerate(asked)}
        wanted = np.array([answer.is_written == is_written for answer in self.answers])
        place = np.array([places.get(answer.prompt_id, -1) for answer in self.answers], np.int32)
        kept = scores.where(wanted[scores.prompt])
        return replace(kept, prompt=place[kept.prompt])

    def share(self, folder: Path) -> list[Answer]:
        """Have the hidden states in another folder too, for a pack that begins with these answers."""
        for answer in self.answers:
            file = folder / answer.hidden
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            try:
                os.link(self.folder / answer.hidden, file)
            except OSError:  # a file system without links
                shutil.copyfile(self.folder / answer.hidden, file)
        return [*self.answers]

    def reference(self, answer: Answer, head: Head) -> Reference:
        """Where an engine finds the reference's distributions of one answer.

        Args:
            answer: one of the pack's.
            head: the reference's; see `head_of`.

        Raises:
            PackError: the pack is one without hidden states.
        """
        if not self.has_hidden:
            raise PackError(f"The reference pack in {self.folder} has no hidden states, and is for bounds only.")
        return Reference(hidden=str(self.folder / answer.hidden), head=head)

    def likeliest(self, number: int) -> Likeliest:
        """The reference's likeliest tokens along the answer of this place in `answers`."""
        rows = slice(*np.cumsum([0, *(len(answer.answer) for answer in self.answers)])[number : number + 2])
        return Likeliest(*(column[rows] for column in self._likeliest))

    @cached_property
    def _likeliest(self) -> tuple[NDArray[Any], ...]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / _LIKELIEST)
        ranks = sorted((name for name in table.column_names if name.startswith("token_")), key=_rank)
        tokens = np.stack([table[name].to_numpy() for name in ranks], axis=1)
        ln_p = np.stack([table[name.replace("token", "ln_p")].to_numpy() for name in ranks], axis=1)
        return tokens, ln_p, table["ln_rest"].to_numpy(), table["ln_given"].to_numpy()


def _kept(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in ("top", "ln_top", "ln_rest", "ln_given")}


def _joined(answers: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """A column a rank: token_1, ln_p_1, token_2, …, and the remaining mass; a row a token of all answers."""
    whole = {name: np.concatenate([each[name] for each in answers]) for name in answers[0]}
    columns: dict[str, NDArray[Any]] = {}
    for rank, (tokens, ln_p) in enumerate(zip(whole["top"].T, whole["ln_top"].T, strict=True), 1):
        columns |= {f"token_{rank}": tokens, f"ln_p_{rank}": ln_p}
    return columns | {"ln_rest": whole["ln_rest"], "ln_given": whole["ln_given"]}


def _rank(name: str) -> int:
    return int(name.rpartition("_")[2])


def head_of(checkpoint: Path) -> Head:
    """Where a checkpoint has its head.

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
            return Head(file=str(found[name]), name=name)
    raise PackError(f"{checkpoint} holds no head: neither {' nor '.join(_HEADS)}.")
