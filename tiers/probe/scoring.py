"""Scores a serving engine's own distributions against the reference's; loaded inside the engine's workers.

While a sequence is being scored, two methods of vLLM's model runner are wrapped: after each step the final hidden
states of its rows are kept (prefill), or the logits that its next token is sampled from (decode), and in decode
the reference's token takes the sampled one's place. Other requests in the same steps are not touched. Without a
sequence to score the engine runs vLLM's own code and nothing else. Written against vLLM 0.32.0, whose two model
runners differ in names only where `_Batch` says so.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from kernels.divergence import compare
from kernels.head import Projected, likeliest
from tiers.conformance.sequence import TOP

MARK = "assay"
"""The name in a request's extra arguments under which it carries its job's token. Callers cannot set any."""
_NUMBERS = ("kl", "tv", "ln_p", "ln_q", "top_p", "top_q")
"""Of a comparison, what `tiers.conformance.scores.Scores` has."""
_LARGEST_FP32_HEAD = 1 << 28
"""Weights: 1 GiB in FP32, while something is scored."""


class ScoringRefused(Exception):
    """This engine cannot be scored, or not with this reference; one sentence of why."""


class Interrupted(ScoringRefused):
    """The engine dropped a sequence for want of memory, and computed it again another way."""


@dataclass
class Job:
    """One sequence in one phase: a prompt of ``prompt`` tokens, and the reference's answer to it, [A]."""

    prompt: int
    answer: Tensor
    decodes: bool
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """By the first token of the answer that they are about: final hidden states, [n, H]."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """By the token of the answer: what it was sampled from, [V]."""
    reference: Tensor | None = None
    """The reference's final hidden states, [A, H]."""
    head: Tensor | None = None
    """The reference's, [V, H]."""
    computed: int = 0
    """Tokens of prompt and answer that the engine has been through."""
    scored: int = 0
    """Tokens of the answer that are done."""
    compared: list[Tensor] | None = None
    """The logits that were compared, [n, V] each, where somebody wants them."""
    problem: ScoringRefused | None = None

    def keep_hidden(self, first: int, rows: Tensor) -> None:
        """Of a step whose first row is about this token of the answer; below 0 it is the prompt's."""
        skipped = max(0, -first)
        rows = rows[skipped : len(self.answer) - first]
        if len(rows):
            self.hidden.setdefault(first + skipped, rows.clone())  # vLLM's own buffer is the next step's

    def all_hidden(self) -> Tensor:
        """[A, H]. Raises ScoringRefused if a part is missing."""
        parts = [self.hidden[first] for first in sorted(self.hidden)]
        whole = torch.cat(parts) if parts else torch.empty(0)
        if len(whole) != len(self.answer):
            raise ScoringRefused(f"{len(whole)} of {len(self.answer)} hidden states came; the sequence was cut")
        return whole


@dataclass(frozen=True)
class _Batch:
    """One step as its runner laid it out: whose rows are where."""

    requests: list[str]
    first_rows: Any
    hidden: Tensor

    @classmethod
    def of(cls, runner: Any, *, is_v2: bool) -> "_Batch | None":
        """None on an earlier stage of a pipeline, and of a step without tokens."""
        state = runner.execute_model_state
        if state is None or state.hidden_states is None:
            return None
        if is_v2:
            return cls(state.input_batch.req_ids, state.input_batch.query_start_loc_np, state.hidden_states)
        return cls(runner.input_batch.req_ids, runner.query_start_loc.np, state.hidden_states)


class Scorer:
    """All sequences that one worker is scoring."""

    def __init__(self, runner: Any, config: Any, *, is_v2: bool) -> None:
        """
        Raises:
            ScoringRefused: the engine does something between hidden states and tokens that is not known here.
        """
        self._runner = runner
        self._is_v2 = is_v2
        self._jobs: dict[str, Job] = {}
        self._of: dict[str, Job] = {}
        self._rows: list[tuple[int, int, Job]] = []
        self._heads: dict[tuple[str, str], Tensor] = {}
        self._refuse_unknown(config)

    def _refuse_unknown(self, config: Any) -> None:
        parallel = config.parallel_config
        processor = getattr(self._runner.model, "logits_processor", None)
        reasons = {
            "it decodes speculatively": config.speculative_config is not None,
            "it shares one sequence between GPUs (context parallelism)": any(
                getattr(parallel, name, 1) > 1
                for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
            ),
            "its runner has no state between model and sampler": not hasattr(self._runner, "execute_model_state"),
            "its logits are scaled or capped": processor is None
            or getattr(processor, "scale", 1.0) != 1.0
            or getattr(processor, "soft_cap", None) is not None,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ScoringRefused(f"this engine cannot be scored: {'; '.join(found)}")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being scored."""
        return not self._jobs

    @property
    def answers(self) -> bool:
        """Whether this worker is the one that says what came of it: each has all logits, one is enough."""
        return bool(get_pp_group().is_last_rank) and get_tensor_model_parallel_rank() == 0

    def begin(
        self,
        token: str,
        prompt: int,
        answer: list[int],
        decodes: bool,
        saves_logits: bool,
        reference: dict[str, Any] | None,
    ) -> None:
        """Watch for the request that carries ``token``.

        Raises:
            ScoringRefused: the reference cannot be read, or is of another shape.
        """
        device = self._runner.device
        job = Job(prompt, torch.tensor(answer, dtype=torch.int64, device=device), decodes)
        job.compared = [] if saves_logits else None
        if reference is not None and self.answers:
            job.reference = _tensor(reference["hidden"], "hidden").to(device)
            job.head = self._head(**reference["head"])
            if job.reference.shape != (len(answer), job.head.shape[1]):
                raise ScoringRefused(
                    f"the reference's hidden states are {tuple(job.reference.shape)} and not "
                    f"{(len(answer), job.head.shape[1])}"
                )
        if not self._jobs:
            self._install()
        self._jobs[token] = job

    def _head(self, file: str, name: str) -> Tensor:
        if (file, name) not in self._heads:
            head = _tensor(file, name).to(self._runner.device)
            if not head.is_cuda and head.numel() <= _LARGEST_FP32_HEAD:
                head = head.float()  # else each call converts it anew, which takes as long as the product
            self._heads = {(file, name): head}
        return self._heads[file, name]

    def end(self, token: str) -> None:
        """Forget it; with the last one the engine is as it was."""
        self._jobs.pop(token, None)
        if not self._jobs and "execute_model" in vars(self._runner):
            del self._runner.execute_model
            del self._runner.sampler.sample
            self._of, self._rows, self._heads = {}, [], {}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what scoring took beside vLLM's own share

    @torch.inference_mode()
    def score(self, token: str, most: int) -> dict[str, Any]:
        """The numbers of further tokens, as many as are there and no more than ``most``; plain lists.

        To be called on every worker of a tensor-parallel engine, for computing logits is a joint work.

        Raises:
            ScoringRefused: the sequence went another way than was asked for.
            Interrupted: the engine began it anew.
        """
        job = self._jobs[token]
        if job.problem is not None:
            raise job.problem
        q_logits = self._decoded(job, most) if job.decodes else self._prefilled(job, most)
        at = slice(job.scored, job.scored + len(q_logits))
        job.scored = at.stop
        if not self.answers or not len(q_logits):
            return {"left": len(job.answer) - job.scored}
        assert job.reference is not None
        assert job.head is not None
        if len(job.head) != q_logits.shape[1]:
            raise ScoringRefused(f"the tier has {q_logits.shape[1]} tokens and the reference {len(job.head)}")
        if job.compared is not None:
            job.compared.append(q_logits.cpu())
        numbers = compare(Projected(job.reference[at], job.head), q_logits, job.answer[at])
        columns = {name: getattr(numbers, name).tolist() for name in _NUMBERS}
        return {
            "left": len(job.answer) - job.scored,
            "columns": columns | {"position": [*range(at.start, at.stop)], "token": job.answer[at].tolist()},
        }

    def _prefilled(self, job: Job, most: int) -> Tensor:
        hidden = job.all_hidden()[job.scored : job.scored + most]
        if not len(hidden):
            return hidden
        logits: Tensor = self._runner.model.compute_logits(hidden)
        return logits

    def _decoded(self, job: Job, most: int) -> Tensor:
        ready = range(job.scored, min(job.scored + most, len(job.answer)))
        rows = [at for at in ready if at in job.logits]  # without gaps, for they come one after another
        return torch.stack([job.logits.pop(at) for at in rows]) if rows else torch.empty(0)

    @torch.inference_mode()
    def keep(self, token: str, file: str, head: dict[str, str] | None) -> None:
        """Write the final hidden states of its answer and what else `tiers.conformance.sequence.Keep` names.

        Raises:
            ScoringRefused: they did not all come, or the head cannot be read.
        """
        job = self._jobs[token]
        hidden = job.all_hidden()
        if not self.answers:
            return
        tensors = {"hidden": hidden.contiguous().cpu()}
        if job.compared:
            tensors["logits"] = torch.cat(job.compared)
        if head is not None:
            tensors |= likeliest(hidden, self._head(**head), job.answer, TOP)._asdict()
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)

    def _install(self) -> None:
        execute_model, sample = self._runner.execute_model, self._runner.sampler.sample

        def noting(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            output = execute_model(scheduled, *args, **kwargs)
            self._rows = []
            if not kwargs.get("dummy_run"):
                self._guard(self._note, scheduled)
            return output

        def forcing(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            due = [(row, at, job) for row, at, job in self._rows if job.decodes and 0 <= at < len(job.answer)]
            self._guard(self._keep_logits, due, logits)  # before vLLM's own, which works in place
            sampled = sample(logits, *args, **kwargs)
            for row, at, job in due:
                sampled[0][row] = job.answer[at].to(sampled[0].dtype)
            return sampled

        self._runner.execute_model = noting
        self._runner.sampler.sample = forcing

    def _keep_logits(self, due: list[tuple[int, int, Job]], logits: Tensor) -> None:
        for row, at, job in due:
            job.logits.setdefault(at, logits[row].clone())

    def _guard(self, work: Any, *args: Any) -> None:
        """An exception here would end the engine, and all its callers' requests with it."""
        try:
            work(*args)
        except Exception as error:
            for job in self._jobs.values():
                job.problem = ScoringRefused(f"the step could not be read: {error!r}")

    def _note(self, scheduled: Any) -> None:
        """Find the rows of this step that are of a sequence being scored."""
        self._of = {name: job for name, job in self._of.items() if name not in scheduled.finished_req_ids}
        computed: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            extra = (new.sampling_params and new.sampling_params.extra_args) or {}
            if (job := self._jobs.get(str(extra.get(MARK)))) is not None:
                self._of[new.req_id] = job
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        batch = _Batch.of(self._runner, is_v2=self._is_v2)
        if batch is None or not self._of:
            return
        for row, name in enumerate(batch.requests):
            if (found := self._of.get(name)) is not None:
                count = scheduled.num_scheduled_tokens[name]
                self._note_rows(found, row, computed[name], count, batch)

    def _note_rows(self, job: Job, row: int, computed: int, count: int, batch: _Batch) -> None:
        if computed < job.computed:
            job.problem = Interrupted("the engine had no room for the whole sequence and began it anew")
        job.computed = computed + count
        first = computed - (job.prompt - 1)
        begin = int(batch.first_rows[row])
        job.keep_hidden(first, batch.hidden[begin : begin + count])
        self._rows.append((row, first + count - 1, job))


def _tensor(path: str, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except Exception as error:
        raise ScoringRefused(f"{name} cannot be read from {path} ({error})") from error
