"""Named steps with their time: live on a terminal, a quiet line each elsewhere, or lines of a JSON log."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from server.logs import writes_json

log = logging.getLogger("assay.steps")


@dataclass(frozen=True)
class Step:
    """A step under way; `detail` says what it is at now."""

    _display: "Progress | None"
    _task: TaskID | None

    def detail(self, text: str) -> None:
        """Show what the step is doing; only a terminal does."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, detail=escape(text))

    def progress(self, done: float, of: float) -> None:
        """Show how much of the step is done, as a bar; only a terminal does."""
        if self._display is not None and self._task is not None and of > 0:
            self._display.update(self._task, share=done / of)


class _Bar(BarColumn):
    """A bar for a step that says how far it is, and nothing for others."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]  # a text is as wide as it must be
        share = task.fields["share"]
        return Text() if share is None else ProgressBar(total=1, completed=share, width=24)


class Steps(AbstractContextManager["Steps"]):
    """The steps of one command. Several may be under way at once."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._logs = writes_json()
        self._display = (
            Progress(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                _Bar(),
                TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn(
                    "[dim]{task.fields[detail]}[/]",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self.console,
                expand=True,
            )
            if self.console.is_terminal and not self._logs
            else None
        )

    def __enter__(self) -> "Steps":
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """Show at once what is new, and not only several times a second."""
        if self._display is not None:
            self._display.refresh()

    def close(self) -> None:
        """Let go of the terminal, leaving the finished steps on it."""
        if self._display is not None:
            self._display.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time the block under ``name``; a block that raises is shown as failed."""
        started = time.monotonic()
        task = self._display.add_task(escape(name), total=1, detail="", share=None) if self._display else None
        if self._logs:
            log.info("%s", name, extra={"step": "begun"})
        elif self._display is None:
            self.console.print(f"[dim]…[/] {escape(name)}")
        try:
            yield Step(self._display, task)
        except BaseException:
            self._finish(task, name, started, mark="[red]✗[/]")
            raise
        self._finish(task, name, started, mark="[green]✓[/]")

    def _finish(self, task: TaskID | None, name: str, started: float, mark: str) -> None:
        seconds = time.monotonic() - started
        if self._logs:
            level, how = (logging.ERROR, "failed") if "red" in mark else (logging.INFO, "done")
            log.log(level, "%s", name, extra={"step": how, "seconds": round(seconds, 1)})
        elif self._display is None or task is None:
            self.console.print(f"{mark} {escape(name)} ({seconds:.1f} s)")
        elif "red" in mark:
            self._display.update(task, description=f"{mark} {escape(name)}", detail="failed")
            self._display.stop_task(task)
        else:
            self._display.update(task, completed=1, detail="", share=None)
