"""Plants faults in an engine that was started to be broken, and mends it; loaded inside the API server.

Those of the model are the workers' to plant (`tiers.probe.faults`); those of what stands before it, here.
"""

from collections.abc import Callable
from typing import Any

from tiers.conformance.faults import FaultName
from tiers.probe.walk import ask_workers

_LLAMA_2 = "{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"


class Front:
    """What is broken in an engine before its model."""

    def __init__(self, state: Any) -> None:
        """``state`` is that of the API server's app."""
        self._engine = state.assay_engine
        self._renderer = state.online_renderer
        self._mending: list[Callable[[], None]] = []

    async def plant(self, fault: FaultName | None) -> int:
        """Break this and nothing else, or nothing; in how many places, none where there is no such part.

        Raises:
            WalkFailed: a worker could not do it.
        """
        while self._mending:
            self._mending.pop()()
        of_ours: dict[str, Callable[[], None]] = {"template": self._template, "end-mistaken": self._end}
        is_ours = fault in of_ours
        answers = await ask_workers(self._engine, "assay_plant", None if is_ours else fault)
        if fault is not None and is_ours:
            of_ours[fault]()
        places: list[int] = [answer["planted"] for answer in answers]
        return len(self._mending) + sum(places)

    def _put(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            before = vars(owner)[name]
            self._mending.append(lambda: setattr(owner, name, before))
        else:
            self._mending.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def _template(self) -> None:
        self._put(self._renderer, "chat_template", _LLAMA_2)

    def _end(self) -> None:
        processor = self._engine.input_processor
        told = processor.generation_config_fields
        ends = told.get("eos_token_id") or []
        # The tokenizer's own need not be among those: beyond all of them, or it would stand in for one.
        every = [processor.renderer.get_eos_token_id(), *([ends] if isinstance(ends, int) else ends)]
        wrong = max(every) + 1
        self._put(processor.renderer, "get_eos_token_id", lambda: wrong)
        self._put(processor, "generation_config_fields", {**told, "eos_token_id": wrong})
