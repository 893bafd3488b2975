"""What a person or an orchestrator has asked of a command that runs until it is asked to stop."""

import asyncio
import logging
import signal

log = logging.getLogger("assay.stop")


class Stop:
    """Nothing yet, a drained stop, or one at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP; a second one means at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # as nohup sets it
            loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()

    async def unless_asked(self, work: asyncio.Task[object] | asyncio.Task[None]) -> bool:
        """Wait for ``work``; if a stop is asked for first, cancel it and return False."""
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if work.done():
            work.result()
            return True
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return False

    async def unless_at_once(self, work: asyncio.Task[object] | asyncio.Task[None]) -> None:
        """Wait for ``work``, but no longer once all is to end at once; what goes wrong in it keeps nothing up."""
        at_once = asyncio.create_task(self.at_once.wait())
        await asyncio.wait({work, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()):
            log.error("stopping: a mistake of the gateway", exc_info=error)
