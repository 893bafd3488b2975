"""Measures what quantizing each unit alone costs; a program of its own, for the gateway holds no PyTorch.

usage: python -m tiers.sensitivity.program REQUEST

REQUEST is a `study.Request` as JSON. Standard output gets a JSON object a line: ``event`` is progress or error,
``text`` says what, and of progress ``done`` and ``of`` how much. The table and the picture are written into the
request's ``out``.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from tiers.calibration import PROMPTS as CALIBRATION_PROMPTS
from tiers.catalog import ModelShape
from tiers.conformance.extent import QUICK_TOKENS, Asked, Extent
from tiers.conformance.pack import PACK_NAME, Answer, Pack
from tiers.conformance.prompts import Prompt
from tiers.conformance.scores import Phase, Scores
from tiers.errors import AssayError, BuildError
from tiers.manifest import SHORT_DIGEST, Manifest
from tiers.sensitivity.findings import Findings, rows_of, steps_of
from tiers.sensitivity.model import ReferenceModel
from tiers.sensitivity.pictures import picture
from tiers.sensitivity.study import KeptAnswers, Request, Study
from tiers.sensitivity.units import Format, Unit, units

_CALIBRATION = 32
"""Questions that static scales are found on; none of them is measured."""


def measure(request: Request) -> Findings:
    """Do it, or what is left of it.

    Raises:
        AssayError: the checkpoint, the prompts or a pack are not what they should be.
    """
    shape = ModelShape.read(request.checkpoint)
    number = Format.of(request.format, shape)
    chosen = units(request.by, shape, number)
    digest = Manifest.read(request.checkpoint).digest
    _say(0, 0, "loading the reference")
    model = ReferenceModel.load(request.checkpoint)
    asked = Asked(quick=True, prompts=request.prompts)
    prompts = Extent.of(asked, request.context_length).prompts
    answers_by, answers = _answers(request, digest, prompts, model)
    computed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    study = Study.of(request.folder, digest, answers, number, f"{computed}, {model.model.device.type}")
    measured = study.complete(chosen, _Measurer(model, number, answers, request.checkpoint).measure)
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


def _answers(
    request: Request, digest: str, prompts: Sequence[Prompt], model: ReferenceModel
) -> tuple[str, list[Answer]]:
    """Those of a reference pack that has all these prompts, or greedy ones, and who gave them."""
    found = sorted(request.packs.glob(f"*-{digest[:SHORT_DIGEST]}-*/{PACK_NAME}"), key=_age)
    for file in found:
        pack = Pack.read(file.parent)
        known = {each.prompt_id: each for each in pack.prompts_asked if len(each.answer) > 1}
        if pack.origin.checkpoint == digest and all(prompt.id in known for prompt in prompts):
            cut = [known[prompt.id] for prompt in prompts]
            cut = [each.model_copy(update={"answer": each.answer[:QUICK_TOKENS]}) for each in cut]
            return f"the reference pack in {pack.folder}", cut
    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint)
    if not tokenizer.chat_template:
        raise BuildError(
            f"{request.checkpoint} has no chat template: it can only be measured along a reference pack."
        )
    kept = KeptAnswers(request.folder, digest, QUICK_TOKENS)
    answers = []
    for done, prompt in enumerate(prompts):
        _say(done, len(prompts), f"answers: {prompt.id}")
        text = tokenizer.apply_chat_template(
            [*prompt.messages], tools=[*prompt.tools] or None, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = kept.read(prompt.id, ids)
        if answer is None:
            answer = Answer(
                prompt_id=prompt.id,
                kind=prompt.kind,
                language=prompt.language,
                source="greedy",
                prompt=ids,
                answer=model.answer(ids, QUICK_TOKENS),
            )
            kept.write(answer)
        if len(answer.answer) > 1:  # one that ends at once has nothing to decode
            answers.append(answer)
    return "Transformers, greedily", answers


def _age(file: Path) -> float:
    return -file.stat().st_mtime


class _Measurer:
    """Measures units along the same answers; what they need of the reference is computed once, and when needed."""

    def __init__(self, model: ReferenceModel, number: Format, answers: Sequence[Answer], checkpoint: Path) -> None:
        self._model = model
        self._number = number
        self._answers = answers
        self._checkpoint = checkpoint
        self._exact: list[Tensor] = []

    def measure(self, unit: Unit, phase: Phase, done: int, of: int) -> Scores:
        """One unit in one phase; so many are done, of so many."""
        count = len(self._answers)
        for place in range(len(self._exact), count):
            _say(done, of, f"the reference: {place} of {count} answers")
            self._exact.append(self._model.final_states(self._answers[place], Unit("reference"), "prefill"))
        if (unit.kv_cache or unit.attention) and not self._model.scales:
            _say(done, of, "scales of queries, keys and values")
            self._model.calibrate(list(_calibration(self._checkpoint)))

        def on_answer(place: int) -> None:
            _say(done + place / count, of, f"{unit.name}, {phase}: {place} of {count} answers")

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


def _say(done: float, of: int, what: str) -> None:
    print(json.dumps({"event": "progress", "done": done, "of": of, "text": what}), flush=True)


def main() -> int:
    """Measure, and write what was found."""
    request = Request.model_validate_json(sys.argv[1])
    try:
        findings = measure(request)
    except AssayError as problem:
        print(json.dumps({"event": "error", "text": str(problem)}), flush=True)
        return 1
    request.out.mkdir(parents=True, exist_ok=True)
    for ending, content in ((".json", findings.model_dump_json(indent=2) + "\n"), (".svg", picture(findings))):
        file = request.result.with_suffix(ending)
        draft = file.with_suffix(f"{ending}.draft")
        draft.write_text(content, encoding="utf-8")
        draft.replace(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
