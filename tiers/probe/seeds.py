"""Seeds on CPUs: what a sampler has drawn in vain is given back. Loaded inside the engine's workers.

A prompt that is read in pieces is sampled from after each, and all but the last draw are thrown away. vLLM
0.32.0 then sets the request's generator back by an offset, which generators on CPUs do not have: the engine
ends, and every caller's request with it. Here the state from before is put back instead.
"""

from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform


def keep_seeds() -> None:
    """From now on, in a worker on CPUs, draw in vain without an end of the engine."""
    if not current_platform.is_cpu() or "Worker" not in current_process().name:
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # seconds, which no other process need pay

    mend(CPUModelRunner)


def mend(runner: Any) -> None:
    """Of a class of model runners: sample so that draws in vain are undone, and have nothing set back later."""
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _in_vain(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def bookkept(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators, hidden = self.input_batch.generators, _in_vain(self)
        for row in hidden:
            del generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = sampled, bookkept


def _in_vain(runner: Any) -> dict[int, torch.Generator]:
    """By row, the generators of requests of which this step's token is thrown away."""
    batch = runner.input_batch
    rows = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
    return {row: batch.generators[row] for row in rows if row in batch.generators}
