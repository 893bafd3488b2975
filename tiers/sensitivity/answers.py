"""Along which answers it is measured: those of a reference pack, or the model's own. Holds no PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tiers.conformance.extent import QUICK_TOKENS
from tiers.conformance.pack import PACK_NAME, Answer, Pack
from tiers.conformance.prompts import Prompt
from tiers.errors import AssayError, BuildError
from tiers.manifest import SHORT_DIGEST
from tiers.sensitivity.study import KeptAnswers


def of_pack(
    packs: Path, checkpoint: str, prompts: Sequence[Prompt], note: Callable[[str], None]
) -> tuple[str, list[Answer]] | None:
    """Those of the newest reference pack that can be read and has all these prompts, and which it is.

    Args:
        packs: the folder of packs.
        checkpoint: the reference checkpoint's digest.
        prompts: what is asked.
        note: told of each pack that cannot be read; nothing is lost by that, for others have answers too.
    """
    for file in sorted(packs.glob(f"*-{checkpoint[:SHORT_DIGEST]}-*/{PACK_NAME}"), key=_age):
        try:
            pack = Pack.read(file.parent)
        except (AssayError, OSError, ValueError) as error:  # damaged, not to be read, or of an older format
            note(f"A reference pack is left out: {error}")
            continue
        known = {each.prompt_id: each for each in pack.prompts_asked if len(each.answer) > 1}
        if pack.origin.checkpoint == checkpoint and all(prompt.id in known for prompt in prompts):
            cut = [known[prompt.id] for prompt in prompts]
            cut = [each.model_copy(update={"answer": each.answer[:QUICK_TOKENS]}) for each in cut]
            return f"the reference pack in {pack.folder}", cut
    return None


def _age(file: Path) -> float:
    return -file.stat().st_mtime


def unanswered(checkpoint: Path, prompts: Sequence[Prompt]) -> list[Answer]:
    """What the model would be asked, in tokens, with answers that are still empty.

    Raises:
        BuildError: the checkpoint does not say how a chat is written down.
    """
    from transformers import AutoTokenizer  # here: takes seconds, and with a pack it is not needed

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if not tokenizer.chat_template:
        raise BuildError(f"{checkpoint} has no chat template: it can only be measured along a reference pack.")
    asked = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [*prompt.messages], tools=[*prompt.tools] or None, tokenize=False, add_generation_prompt=True
        )
        asked.append(
            Answer(
                prompt_id=prompt.id,
                kind=prompt.kind,
                language=prompt.language,
                source="greedy",
                prompt=tokenizer(text, add_special_tokens=False)["input_ids"],
                answer=[],
            )
        )
    return asked


def answered(
    asked: Sequence[Answer],
    kept: KeptAnswers,
    answer: Callable[[Sequence[int], int], list[int]],
    say: Callable[[float, int, str], None],
) -> list[Answer]:
    """The same with answers: those that are kept, and others, which are kept at once.

    Args:
        asked: as `unanswered` gives it.
        kept: where.
        answer: gives the likeliest tokens after a prompt, at most so many.
        say: told how many are done, of how many, and which is next.
    """
    answers = []
    for done, each in enumerate(asked):
        say(done, len(asked), f"answers: {each.prompt_id}")
        whole = kept.read(each.prompt_id, each.prompt)
        if whole is None:
            whole = each.model_copy(update={"answer": answer(each.prompt, QUICK_TOKENS)})
            kept.write(whole)
        if len(whole.answer) > 1:  # one that ends at once has nothing to decode
            answers.append(whole)
    return answers
