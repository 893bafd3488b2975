"""The fixed corpus that perplexity is measured on: what people wrote, in the languages that Llama 3.1 names.

A passage is a paragraph of one of the documents in tiers/conformance/prompts/documents, whose last name is its
language. Perplexities of different days, tiers and machines are of the same text; those of other corpora, such as
WikiText, are other numbers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tiers.conformance.prompts import FOLDER, LANGUAGES, Language
from tiers.errors import PromptsError

SHORTEST = 120
"""Bytes: titles say little after themselves."""


@dataclass(frozen=True)
class Passage:
    """One paragraph."""

    id: str
    document: str
    language: Language
    text: str


@cache
def load_corpus(folder: Path = FOLDER / "documents") -> tuple[Passage, ...]:
    """All passages, by documents.

    Raises:
        PromptsError: a document is of no language that is known.
    """
    passages = []
    for path in sorted(folder.glob("*.txt")):
        language = path.stem.rpartition("-")[2]
        if language not in LANGUAGES:
            raise PromptsError(f"{path}: its name ends in no language; the languages are {', '.join(LANGUAGES)}.")
        paragraphs = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
        passages += [
            Passage(f"corpus-{path.stem}-{number:02}", path.stem, language, text)
            for number, text in enumerate(paragraphs, 1)
            if len(text.encode()) >= SHORTEST
        ]
    return tuple(passages)


def digest(passages: Sequence[Passage]) -> str:
    """SHA-256, in hexadecimal, of what the passages say; their order does not count."""
    said = sorted([each.id, each.text] for each in passages)
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
