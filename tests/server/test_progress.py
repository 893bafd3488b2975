"""Named steps with their time, where nobody watches and where somebody does."""

import io

import pytest
from rich.console import Console

from server.progress import Steps


def shown(*, terminal: bool, fail: bool = False) -> str:
    output = io.StringIO()
    with (
        Steps(Console(file=output, force_terminal=terminal, width=100)) as steps,
        steps.step("One [step]") as step,
    ):
        step.detail("at work")
        if fail:
            raise ValueError
    return output.getvalue()


def test_elsewhere_a_step_is_two_quiet_lines() -> None:
    begun, ended = shown(terminal=False).splitlines()
    assert begun == "… One [step]"
    assert ended.startswith("✓ One [step] (0.")


def test_a_terminal_shows_the_step_and_its_time() -> None:
    text = shown(terminal=True)
    assert "One [step]" in text
    assert "0:00:00" in text


def test_a_step_that_fails_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    output = io.StringIO()
    with (
        pytest.raises(ValueError, match="no"),
        Steps(Console(file=output, force_terminal=False)) as steps,
        steps.step("Two"),
    ):
        raise ValueError("no")
    assert "✗ Two" in output.getvalue()


def test_a_terminal_shows_a_bar_for_a_step_that_says_how_far_it_is() -> None:
    output = io.StringIO()
    with Steps(Console(file=output, force_terminal=True, width=100)) as steps, steps.step("Three") as step:
        before = output.getvalue()
        step.progress(3, 4)
        steps.refresh()
        assert "━" in output.getvalue()
        assert "━" not in before
