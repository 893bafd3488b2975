"""Asks a server that someone else runs, by the OpenAI API that it offers to anyone. Knows no statistics.

Prefill: a prompt with the reference's answer is one prompt, and the server tells ``prompt_logprobs`` (vLLM's).
Decode: it writes greedily from the prompt, and tells of each token that it writes. As long as these are the
reference's, its next is from a decode step along the reference's answer; where it leaves that, it is asked again
from behind there. The first token of each request comes from a prefill, and does not count.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from server.measuring.measurable import ANSWER_TIMEOUT_S
from server.measuring.measure import AT_ONCE
from tiers.conformance.pack import Answer, Pack
from tiers.conformance.prompts import Prompt
from tiers.conformance.sequence import TOP
from tiers.errors import AssayError, ConfigError

Told = dict[int, float]
"""ln q by token: the likeliest of a position, and the one that stands there."""

_COMPLETIONS, _CHAT = "/completions", "/chat/completions"
_TOKEN = "token_id:"  # noqa: S105  # no password
"""What vLLM puts before a token's number where it stands in the place of its text."""
_SHOWN = 300
"""Characters of a server's own words about what went wrong."""
_PROMPTS = 3
"""In as many languages: of these the server is asked how many tokens they have."""
_NEEDED = (
    f"Bounds take the {TOP} likeliest tokens of each position, of prompts too, as vLLM gives them by default."
)

_BUSY = (429, 502, 503, 504)
_WAITS_S = (1.0, 4.0, 15.0, 60.0)
"""Before each further try at a server that has no time; or as long as it says itself, up to:"""
_LONGEST_WAIT_S = 120.0

_Ln = Annotated[float, Field(allow_inf_nan=False)]
_Form = TypeVar("_Form", bound=BaseModel)


class ServerNotMeasured(AssayError):
    """A server cannot be measured by its public API, or stopped answering."""


class _Refused(ServerNotMeasured):
    """It says that something in the request is not to its liking."""


class _Busy(ServerNotMeasured):
    """It would answer later."""

    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        self.retry_after_s = min(float(retry_after), _LONGEST_WAIT_S) if retry_after.isdecimal() else 0.0


class _Logprob(BaseModel):
    logprob: _Ln


class _Steps(BaseModel):
    tokens: list[str]
    top_logprobs: list[dict[str, _Ln] | None] | None = None


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None
    logprobs: _Steps | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


class _Usage(BaseModel):
    prompt_tokens: int


class _Chat(BaseModel):
    usage: _Usage


def read_url(text: str) -> str:
    """The base of a server's API, without a slash at its end.

    Raises:
        ConfigError: it is none.
    """
    url = text.strip().rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not (url.isascii() and url.isprintable()):
        raise ConfigError("--url is the base of an OpenAI API, such as https://host/v1.")
    if "@" in parts.netloc:
        raise ConfigError(
            "--url has a user or a password in it: put the key into a variable, and name it by --key-env."
        )
    if parts.query or parts.fragment or " " in url:
        raise ConfigError("--url is the base of an OpenAI API, such as https://host/v1, without a query.")
    return url


def read_key(variable: str) -> str:
    """The key that an environment variable holds; it is written nowhere.

    Raises:
        ConfigError: there is none.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"--key-env names {variable}, and no such variable is set.")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The key in {variable} has characters that no key has.")
    return key


class PublicApi:
    """The API of one server, for one of its models; an asynchronous context."""

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        """
        Args:
            url: the base, such as https://host/v1; see `read_url`.
            model: as the server calls it.
            key: if it asks for one.
        """
        self.url = url
        self.model = model
        self._key = key

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {self._key}"} if self._key else None,
            connector=aiohttp.TCPConnector(limit=AT_ONCE),
            timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, sock_connect=10),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def check(self, pack: Pack, prompts: Sequence[Prompt]) -> int:
        """See that it can be measured by this pack; of how many likeliest tokens it tells.

        Args:
            pack: the reference's.
            prompts: those of the pack, of which some are held against the server's tokenizer; with none that is
                not done.

        Raises:
            ServerNotMeasured: it lacks something, or makes other tokens of a prompt.
        """
        await self._check_tokens(pack, prompts)
        answer = min(pack.answers, key=lambda each: len(each.prompt) + len(each.answer))
        try:
            told = [*(await self.prefill(answer)).values()]
            told += [said for _, said in await self._written(answer.prompt, 1)]
        except _Refused as error:
            raise ServerNotMeasured(f"{error} {_NEEDED}") from None
        return min(map(len, told))

    async def _check_tokens(self, pack: Pack, prompts: Sequence[Prompt]) -> None:
        expected = {answer.prompt_id: len(answer.prompt) for answer in pack.prompts_asked}
        # Functions are written into prompts in ways of a server's own.
        plain = sorted((each for each in prompts if not each.tools), key=lambda each: expected[each.id])
        shortest = {prompt.language: prompt for prompt in reversed(plain)}
        for prompt in sorted(shortest.values(), key=lambda each: expected[each.id])[:_PROMPTS]:
            body = {"messages": prompt.messages, "max_tokens": 1}
            count = (await self._ask(_CHAT, f"the prompt {prompt.id}", body, _Chat)).usage.prompt_tokens
            if count != expected[prompt.id]:
                raise ServerNotMeasured(
                    f"{self.url} makes {count} tokens of the prompt {prompt.id}, and the reference "
                    f"{expected[prompt.id]}: {self.model} has another tokenizer or chat template there, and its "
                    "numbers would be about other tokens."
                )

    async def prefill(self, answer: Answer) -> dict[int, Told]:
        """What it tells of each position of the answer, when it reads prompt and answer at once.

        Raises:
            ServerNotMeasured: it does not tell.
        """
        ids = [*answer.prompt, *answer.answer]
        choice = await self._complete(ids, max_tokens=1, prompt_logprobs=TOP)
        rows = choice.prompt_logprobs
        if rows is None:
            raise ServerNotMeasured(
                f"{self.url} gives no prompt_logprobs, which tell how likely the reference's answers are there: "
                "only a server that has them, such as vLLM, can be measured from outside."
            )
        told = rows[len(answer.prompt) :]
        if len(rows) != len(ids) or None in told:
            raise ServerNotMeasured(f"{self.url} gives prompt_logprobs of other tokens than it was sent.")
        return {
            position: {token: said.logprob for token, said in row.items()}
            for position, row in enumerate(told)
            if row
        }

    async def decode(self, answer: Answer, agrees: NDArray[np.bool_]) -> dict[int, Told]:
        """What it tells of the positions of the answer that it comes to by decoding.

        Args:
            answer: the reference's.
            agrees: at each of its tokens, [A], whether prefill held it likeliest. To begin where it does not would
                give nothing: the next token would follow another than the reference's.

        Raises:
            ServerNotMeasured: it does not tell.
        """
        found: dict[int, Told] = {}
        at, length = 0, len(answer.answer)
        while at < length - 1:
            if not agrees[at]:
                at += 1
                continue
            run = int(np.argmin(np.append(agrees[at:], False)))
            written = await self._written([*answer.prompt, *answer.answer[:at]], min(run + 1, length - at))
            for step, (token, told) in enumerate(written):
                if step:
                    found[at] = told
                at += 1
                if token != answer.answer[at - 1]:
                    break
        return found

    async def _written(self, ids: Sequence[int], count: int) -> list[tuple[int, Told]]:
        """What it writes after these tokens, greedily: so many, or fewer if it ends there."""
        choice = await self._complete(
            ids,
            max_tokens=count,
            temperature=0,
            logprobs=TOP,
            ignore_eos=True,  # else the answer may end before the reference's
            return_tokens_as_token_ids=True,
        )
        steps = choice.logprobs
        if steps is None or not steps.tokens or not steps.top_logprobs:
            raise ServerNotMeasured(
                f"{self.url} gives no logprobs of the tokens that it writes: it has to be allowed to."
            )
        try:
            return [
                (_number(token), {_number(each): ln_q for each, ln_q in (row or {}).items()})
                for token, row in zip(steps.tokens, steps.top_logprobs, strict=True)
            ][:count]
        except ValueError:
            raise ServerNotMeasured(
                f"{self.url} gives logprobs by the text of tokens, not by their numbers: it does not know "
                "return_tokens_as_token_ids, as vLLM does, and texts are no names of tokens."
            ) from None

    async def _complete(self, ids: Sequence[int], **fields: Any) -> _Choice:
        body = {"prompt": [*ids], **fields}
        return (await self._ask(_COMPLETIONS, "a prompt of token ids", body, _Completion)).choices[0]

    async def _ask(self, path: str, what: str, body: Mapping[str, Any], form: type[_Form]) -> _Form:
        for wait_s in _WAITS_S:
            try:
                return await self._ask_once(path, what, body, form)
            except _Busy as busy:
                await asyncio.sleep(max(wait_s, busy.retry_after_s))
        return await self._ask_once(path, what, body, form)

    async def _ask_once(self, path: str, what: str, body: Mapping[str, Any], form: type[_Form]) -> _Form:
        try:
            # Not where it says that it moved to: a key goes to nobody else.
            async with self._session.post(
                f"{self.url}{path}", json={"model": self.model, **body}, allow_redirects=False
            ) as answer:
                text = await answer.read()
        except TimeoutError:
            raise ServerNotMeasured(f"{self.url} gave no answer to {what} in {ANSWER_TIMEOUT_S:.0f} s.") from None
        except aiohttp.ClientError as error:
            raise ServerNotMeasured(f"{self.url} gives no answer to {what} ({self._shown(str(error))}).") from None
        if answer.status in (401, 403):
            which = (
                "the key" if self._key else "a request without a key: put one into a variable, named by --key-env"
            )
            raise ServerNotMeasured(f"{self.url} refuses {which} ({answer.status}).")
        if answer.status != 200:
            why = self._shown(text.decode(errors="replace"))
            if answer.status in _BUSY:
                raise _Busy(
                    f"{self.url} has no time for {what} as {self.model} ({answer.status}: {why}).",
                    answer.headers.get("retry-after", ""),
                )
            refused = _Refused if answer.status in (400, 422) else ServerNotMeasured
            hint = " --url ends where /chat/completions begins, mostly with /v1." if answer.status == 404 else ""
            raise refused(f"{self.url} fails at {what} as {self.model} ({answer.status}: {why}).{hint}")
        try:
            return form.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = self._shown(".".join(map(str, first["loc"])))
            raise ServerNotMeasured(
                f"{self.url} answers {what} otherwise than OpenAI's API does ({where}: {first['msg']})."
            ) from None

    def _shown(self, text: str) -> str:
        """A stranger's words: without the key, should they repeat it, and nothing that a terminal would obey."""
        kept = text.replace(self._key, "…") if self._key else text
        return " ".join("".join(each if each.isprintable() else " " for each in kept).split())[:_SHOWN]


def _number(token: str) -> int:
    """Raises ValueError where it is a text."""
    if not token.startswith(_TOKEN):
        raise ValueError(token)
    return int(token.removeprefix(_TOKEN))
