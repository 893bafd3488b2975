"""Has the reference measured with each of its parts quantized alone: in a process of its own, with PyTorch."""

import json
import sys
import tempfile
from pathlib import Path

from rich.markup import escape

from server.alone import alone
from server.checkpoints import Checkpoints
from server.config import Config
from server.launch.process import LocalProcess
from server.progress import Steps
from tiers.catalog import ModelShape
from tiers.engine import gpu_environment
from tiers.errors import BuildError, ConfigError
from tiers.sensitivity.findings import Findings
from tiers.sensitivity.study import Request
from tiers.sensitivity.units import By, FormatName, check
from tiers.tier import Tier

OCCUPIED = BuildError("Another assay measures sensitivity in this home: wait for it.")


async def measure_sensitivity(
    config: Config, model: str | None, number: FormatName, by: By, prompts: int, out: Path | None, steps: Steps
) -> tuple[Findings, Path]:
    """What was found, and the file that holds it; a picture lies beside.

    Args:
        config: names the model and says where things lie.
        model: one of its models; the first by default.
        number: what linear layers are quantized to.
        by: layers, parts or levels.
        prompts: how many.
        out: a folder for table and picture, instead of the one where scores are kept.
        steps: shown while it runs.

    Raises:
        ConfigError: there is no such model, the levels of another format than FP8 are asked for, or nothing can be
            written to ``out``.
        AssayError: its reference cannot be had, or measured.
    """
    check(by, number)
    reference = config.reference_of(model)
    if out is not None:
        _make_writable(out)
    await Checkpoints(config, steps).prepare([reference])
    folder = (config.home / "sensitivity" / reference.model.replace("/", "--")).absolute()
    request = Request(
        model=reference.model,
        checkpoint=reference.checkpoint,
        packs=config.packs.absolute(),
        folder=folder,
        out=(out or folder).absolute(),
        format=number,
        by=by,
        prompts=prompts,
        context_length=reference.context_length or ModelShape.read(reference.checkpoint).max_position_embeddings,
    )
    with alone(folder, OCCUPIED, BuildError):
        await _run(request, reference, config.logs / f"sensitivity-{reference.slug}.log", steps)
    return Findings.model_validate_json(request.result.read_bytes()), request.result


def _make_writable(out: Path) -> None:
    """See to it that what takes minutes can be written in the end.

    Raises:
        ConfigError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out}: nothing can be written there ({error.strerror}): name a folder where it can."
        ) from error


async def _run(request: Request, reference: Tier, log: Path, steps: Steps) -> None:
    """Run the program, on the reference's GPUs where there are any, and pass on what it says.

    Raises:
        BuildError: it ended without having measured.
    """
    with steps.step(f"Sensitivity of {request.model}") as step:
        process = await LocalProcess.start(
            [sys.executable, "-P", "-m", "tiers.sensitivity.program", request.model_dump_json()],
            {"TOKENIZERS_PARALLELISM": "false"} | gpu_environment(reference),
            log,
            pipe_output=True,
        )
        problem = None
        try:
            async for line in process.output:
                event = json.loads(line)
                if event["event"] == "error":
                    problem = event["text"]
                elif event["event"] == "note":
                    steps.console.print(f"[yellow]{escape(event['text'])}[/]", soft_wrap=True)
                else:
                    step.progress(event["done"], event["of"])
                    step.detail(event["text"])
            code = await process.wait()
        finally:
            await process.stop()
        if problem:
            raise BuildError(problem)
        if code:
            raise BuildError(
                f"Measuring failed ({process.last_line()[:200]}); the whole output is in {process.log}, and what "
                "was measured is kept: run it again."
            )
