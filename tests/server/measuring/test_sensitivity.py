"""`assay sensitivity`: what it refuses before anything runs, what a shell completes, what it shows."""

import asyncio
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import server.measuring.sensitivity
from server.cli import main
from server.commands.console import configured_models
from server.commands.sensitivity import sensitivity_table, steps_table
from server.config_file import load_config
from server.progress import Steps
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_sensitivity import FP8, levels, scores
from tiers.conformance.scores import Phase, Scores
from tiers.sensitivity.findings import Findings, rows_of, steps_of
from tiers.sensitivity.study import Request
from tiers.sensitivity.units import By, units


def refused(*arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["assay", "sensitivity", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not (folder / ".assay").exists(), "nothing was begun"
    return int(str(end.value.code))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Llama-9",), "There is no model 'Llama-9' in this config; the models are SmolLM2-135M-Instruct."),
        (("--by", "level", "--format", "int4"), "leave out --format int4"),
        (("--out", "/proc/1"), "--out /proc/1: nothing can be written there"),
        (("--out", f"{__file__}/x"), "Not a directory): name a folder where it can."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert refused(*arguments, folder=tmp_path, monkeypatch=monkeypatch) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_program_sees_the_references_gpus_and_its_notes_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Program:
        """What `LocalProcess` is, of a program that says one thing."""

        output: asyncio.StreamReader
        environment: dict[str, str]

        @classmethod
        async def start(cls, command: Any, environment: dict[str, str], log: Path, **_: Any) -> "Program":
            cls.environment, cls.output = environment, asyncio.StreamReader()
            cls.output.feed_data(b'{"event": "note", "text": "A pack [is] left out."}\n')
            cls.output.feed_eof()
            return cls()

        async def wait(self) -> int:
            return 0

        async def stop(self) -> None:
            pass

    monkeypatch.setattr(server.measuring.sensitivity, "LocalProcess", Program)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: Mine, source: ./mine, tiers: {Reference: {gpus: [2]}}}]")
    request = Request(
        model="Mine",
        checkpoint=tmp_path,
        packs=tmp_path,
        folder=tmp_path,
        out=tmp_path,
        format="fp8",
        by="part",
        prompts=6,
        context_length=2048,
    )
    reference = load_config(file).tiers[0].reference
    shown = io.StringIO()
    asyncio.run(
        server.measuring.sensitivity._run(request, reference, tmp_path / "log", Steps(Console(file=shown)))
    )
    assert Program.environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert "A pack [is] left out." in shown.getvalue()


def test_a_shell_completes_the_configs_models(tmp_path: Path) -> None:
    class Context:
        params: dict[str, Any]

    context: Any = Context()
    context.params = {"config": None}
    assert configured_models(context, "smol") == ["SmolLM2-135M-Instruct"]
    assert configured_models(context, "llama") == []
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: Mine, source: ./mine}, {name: Yours, source: ./yours}]")
    context.params = {"config": file}
    assert configured_models(context, "") == ["Mine", "Yours"]
    context.params = {"config": tmp_path / "none.yaml"}
    assert configured_models(context, "") == []


def found(by: By) -> Findings:
    if by == "level":
        chosen, measured = levels()
    else:
        chosen = units(by, SMOL, FP8)
        measured: dict[tuple[str, Phase], Scores] = {  # type: ignore[no-redef]
            (unit.name, unit.phases[0]): scores(0.01 * place) for place, unit in enumerate(chosen, 1)
        }
    return Findings(
        model="M",
        checkpoint="a",
        format="fp8",
        format_text="FP8",
        by=by,
        answers_by="nobody",
        prompts=24,
        tokens=192,
        rows=rows_of(chosen, measured),
        steps=steps_of(chosen, measured) if by == "level" else (),
    )


def lines(table: Table) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=200).print(table)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_the_costliest_part_comes_first() -> None:
    _, *rows = lines(sensitivity_table(found("part")))
    assert rows[0].split()[:3] == ["attention", "product", "prefill"]
    assert rows[1].split()[:3] == ["KV", "cache", "decode"]
    assert "11.25 KiB/token" in rows[1]
    assert "nothing" in rows[0]
    assert [row.split()[1] for row in rows[2:]] == ["both"] * 10


def test_levels_stay_in_their_order_and_say_whether_each_rises() -> None:
    findings = found("level")
    assert [line.split()[0] for line in lines(sensitivity_table(findings))[1:]] == [*"11223344"]
    said = {}
    for line in lines(steps_table(findings))[1:]:
        phase = "prefill" if "prefill" in line.split() else "decode"
        said[line.split()[0], phase] = line
    assert said["2", "prefill"].endswith("rises")
    assert said["3", "prefill"].endswith("the same")
    assert said["3", "decode"].endswith("rises")
    assert said["4", "decode"].endswith("not beyond doubt")
