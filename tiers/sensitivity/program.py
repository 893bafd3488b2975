"""Measures what quantizing each unit alone costs; a program of its own, for the gateway holds no PyTorch.

usage: python -m tiers.sensitivity.program REQUEST

REQUEST is a `study.Request` as JSON. Standard output gets a JSON object a line: ``event`` is progress, note or
error, ``text`` says what, and of progress ``done`` and ``of`` how much. Whatever libraries print goes to standard
error. The table and the picture are written into the request's ``out``.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tiers.calibration import PROMPTS as CALIBRATION_PROMPTS
from tiers.catalog import ModelShape
from tiers.conformance.extent import QUICK_TOKENS, Asked, Extent
from tiers.conformance.pack import Answer
from tiers.conformance.scores import Phase, Scores
from tiers.errors import AssayError
from tiers.manifest import Manifest
from tiers.ram import free_ram
from tiers.sensitivity.answers import answered, of_pack, unanswered
from tiers.sensitivity.findings import Findings, rows_of, steps_of
from tiers.sensitivity.model import ReferenceModel
from tiers.sensitivity.pictures import picture
from tiers.sensitivity.room import bytes_needed, check_room
from tiers.sensitivity.study import KeptAnswers, Request, Study, write_whole
from tiers.sensitivity.units import Format, Unit, units

_CALIBRATION = 32
"""Questions that static scales are found on; none of them is measured."""

Tell = Callable[..., None]
"""Writes an event."""


def measure(request: Request, tell: Tell) -> Findings:
    """Do it, or what is left of it; whatever can be refused is refused before the model is loaded.

    Raises:
        AssayError: the checkpoint, the prompts or the memory are not what they should be.
    """

    def say(done: float, of: int, what: str) -> None:
        tell(event="progress", done=done, of=of, text=what)

    shape = ModelShape.read(request.checkpoint)
    number = Format.of(request.format, shape)
    chosen = units(request.by, shape, number)
    digest = Manifest.read(request.checkpoint).digest
    prompts = Extent.of(Asked(quick=True, prompts=request.prompts), request.context_length).prompts
    packed = of_pack(request.packs, digest, prompts, lambda text: tell(event="note", text=text))
    answers_by, asked = packed or ("Transformers, greedily", unanswered(request.checkpoint, prompts))
    longest = max(len(each.prompt) for each in asked) + QUICK_TOKENS
    gpu_free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    needed = bytes_needed(shape, chosen, longest)
    check_room(request.model, shape, needed, free_ram(), gpu_free)

    say(0, 0, "loading the reference")
    model = ReferenceModel.load(request.checkpoint)
    kept = KeptAnswers(request.folder, digest, QUICK_TOKENS)
    answers = asked if packed else answered(asked, kept, model.answer, say)
    computed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    study = Study.of(request.folder, digest, answers, number, f"{computed}, {model.model.device.type}")
    measured = study.complete(chosen, _Measurer(model, number, answers, request.checkpoint, say).measure)
    return Findings(
        model=request.model,
        checkpoint=digest,
        format=request.format,
        format_text=number.text,
        by=request.by,
        answers_by=answers_by,
        prompts=len(answers),
        tokens=sum(len(each.answer) for each in answers),
        rows=rows_of(chosen, measured),
        steps=steps_of(chosen, measured) if request.by == "level" else (),
    )


class _Measurer:
    """Measures units along the same answers; what they need of the reference is computed once, and when needed."""

    def __init__(
        self,
        model: ReferenceModel,
        number: Format,
        answers: Sequence[Answer],
        checkpoint: Path,
        say: Callable[[float, int, str], None],
    ) -> None:
        self._model = model
        self._number = number
        self._answers = answers
        self._checkpoint = checkpoint
        self._say = say
        self._exact: list[Tensor] = []

    def measure(self, unit: Unit, phase: Phase, done: int, of: int) -> Scores:
        """One unit in one phase; so many are done, of so many."""
        count = len(self._answers)
        for place in range(len(self._exact), count):
            self._say(done, of, f"the reference: {place} of {count} answers")
            self._exact.append(self._model.final_states(self._answers[place], Unit("reference"), "prefill"))
        if (unit.kv_cache or unit.attention) and not self._model.scales:
            self._say(done, of, "scales of queries, keys and values")
            self._model.calibrate(list(_calibration(self._checkpoint)))

        def on_answer(place: int) -> None:
            self._say(done + place / count, of, f"{unit.name}, {phase}: {place} of {count} answers")

        return self._model.scores(unit, self._number, phase, self._answers, self._exact, on_answer)


def _calibration(checkpoint: Path) -> Iterator[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt in CALIBRATION_PROMPTS[:_CALIBRATION]:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt
        yield tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def main() -> int:
    """Measure, and write what was found."""
    events, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what libraries print is no event

    def tell(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = Request.model_validate_json(sys.argv[1])
    try:
        findings = measure(request, tell)
    except AssayError as problem:
        tell(event="error", text=str(problem))
        return 1
    request.out.mkdir(parents=True, exist_ok=True)
    write_whole(request.result, findings.model_dump_json(indent=2).encode() + b"\n")
    write_whole(request.result.with_suffix(".svg"), picture(findings).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
