"""What was measured at each token: how a tier's distribution differs from the reference's there.

Columns of one length; a row is one token of one of the reference's answers, in one phase. Knows no statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

_TYPES = {"prompt": np.int32, "position": np.int32, "token": np.int32, "top_p": np.int32, "top_q": np.int32}


@dataclass(frozen=True)
class Scores:
    """One tier in one phase. All arrays are [T]."""

    prompt: NDArray[np.int32]
    """Which of the pack's answers, by its place there; or which of its prompts or passages, after
    `Pack.of_answers` and `Pack.of_corpus`."""
    position: NDArray[np.int32]
    """Which token of the answer, from 0."""
    token: NDArray[np.int32]
    """The reference's token t there."""
    kl: NDArray[np.float64]
    """KL(p ‖ q) in nats: exact, or a lower bound where the engine gives only its likeliest tokens."""
    tv: NDArray[np.float64]
    """Total variation, from 0 to 1; exact or a lower bound, as KL."""
    ln_p: NDArray[np.float64]
    """ln p(t), of the reference."""
    ln_q: NDArray[np.float64]
    """ln q(t), of the tier."""
    top_p: NDArray[np.int32]
    """The reference's likeliest token."""
    top_q: NDArray[np.int32]
    """The tier's likeliest token."""

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, each.name)) for each in fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"the columns of scores have different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.token)

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        """From a column of numbers by each name.

        Raises:
            ValueError: a column is missing, or they are not of one length.
        """
        missing = [each.name for each in fields(cls) if each.name not in columns]
        if missing:
            raise ValueError(f"scores lack {', '.join(missing)}")
        given: dict[str, Any] = {}
        for each in fields(cls):
            given[each.name] = np.asarray(columns[each.name], _TYPES.get(each.name, np.float64))
        return cls(**given)

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """One after another; there must be at least one."""
        return cls(**{each.name: np.concatenate([getattr(p, each.name) for p in parts]) for each in fields(cls)})

    def where(self, mask: NDArray[np.bool_]) -> Self:
        """The rows that the mask [T] keeps."""
        return type(self)(**{each.name: getattr(self, each.name)[mask] for each in fields(self)})

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every column by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
