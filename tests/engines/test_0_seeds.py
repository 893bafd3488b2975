"""A seed's draws in vain are undone on CPUs, where vLLM would end the engine over them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tiers.probe.seeds import mend


class Runner:
    """As far as vLLM's model runner is mended: three seeded requests, the second in the middle of its prompt."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(
            num_reqs=3, generators={row: torch.Generator().manual_seed(7) for row in range(3)}
        )
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, False, True]))

    def _sample(self) -> list[float]:
        draws = [torch.rand(1, generator=each) for each in self.input_batch.generators.values()]
        return [float(each) for each in draws]

    def _bookkeeping_sync(self) -> Any:
        for row in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]:
            if (generator := self.input_batch.generators.get(int(row))) is not None:
                generator.set_offset(generator.get_offset() - 4)
        return "done"


def test_a_draw_in_vain_is_undone_and_the_engine_goes_on() -> None:
    class Mended(Runner):
        """One of its own, for the class is changed."""

        _sample, _bookkeeping_sync = Runner._sample, Runner._bookkeeping_sync

    mend(Mended)
    runner = Mended()
    first, again = runner._sample(), runner._sample()
    assert runner._bookkeeping_sync() == "done"
    assert set(runner.input_batch.generators) == {0, 1, 2}
    assert again[1] == first[1], "as if it had not been drawn"
    assert again[0] == again[2] != first[0]
