"""Where operators are run: one shape, its inputs, and models of one block at each precision, broken if asked."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tiers.operators.inputs import Inputs, Shape
from tiers.operators.judgement import Absent, Case
from tiers.operators.one_layer import OneLayer
from tiers.operators.storing import Storage, stored

TOKEN_COUNTS = (1, 7, 256)

Planting = Callable[[Any], None]
"""Breaks what an operator runs: a model of one block, or a sampler."""


class Bench:
    """One shape on this machine; builds models when they are first asked for."""

    def __init__(self, inputs: Inputs, plant: Planting | None = None) -> None:
        self.inputs = inputs
        self._plant = plant
        self._built: dict[Storage, OneLayer] = {}

    @property
    def shape(self) -> Shape:
        """Whose widths."""
        return self.inputs.shape

    def layer(self, storage: Storage) -> OneLayer:
        """The model at this precision; one at a time, for one is several GB of a large model."""
        if storage not in self._built:
            self._built.clear()
            gc.collect()  # or models stay until Python collects, which does not count what tensors hold
            self._built[storage] = self.broken(OneLayer(stored(self.inputs, storage)))
        return self._built[storage]

    def broken(self, part: Any) -> Any:
        """The same part after planting, if there is something to plant."""
        if self._plant is not None:
            self._plant(part)
        return part

    def rows(self, name: str) -> Iterator[Tensor]:
        """An activation in each number of tokens."""
        for count in TOKEN_COUNTS:
            yield self.inputs.activations[name][:count]


def says(what: str, tokens: int) -> str:
    """A case's shape, for people."""
    return f"{what}, {tokens} token{'s' * (tokens != 1)}"


Check = Callable[[Bench], Iterator[Case | Absent]]
