"""Sends every open request of a session, `teacher.concurrency` at a time, and saves the replies.

After a failure, a budget stop or the first Ctrl-C no new request is sent; replies to requests in flight are saved.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ares import cli, files
from teacher.interface import Stopped, Unanswered
from teacher.session import Session

WRITERS = 4  # threads that save replies: their flushes to disk overlap


def ask_live(session: Session) -> None:
    """Answer the session's open requests. Raises UserError for what ends the run; replies so far are kept."""
    if session.open:
        asyncio.run(_Live(session).run())


class _Live:
    def __init__(self, session: Session):
        self.session = session
        self.teacher = session.teacher
        self.failure: cli.UserError | None = None
        self.writers = ThreadPoolExecutor(WRITERS)

    async def run(self) -> None:
        report = self.session.report
        todo = iter(list(self.session.open))  # keys: texts and images are read when a request is sent
        total = len(self.session.open)
        with cli.progress(desc=self.teacher.name, total=total, unit="request") as bar:
            async with self.teacher:
                self.catch_signals()
                workers = min(self.teacher.concurrency, total)
                ends = await asyncio.gather(*(self.work(todo, bar) for _ in range(workers)), return_exceptions=True)
        self.writers.shutdown()
        bug = next((end for end in ends if isinstance(end, BaseException)), None)
        if bug or self.failure:
            cli.print0(f"stopped; {report.summary()}")
            raise bug or self.failure

    def catch_signals(self) -> None:
        """The first Ctrl-C, or a scheduler's SIGTERM, lets requests in flight finish; the second does not."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()

        def end(name: str) -> None:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cli.print0(f"{name}: waiting for the requests in flight; Ctrl-C again to drop them")
            self.stop(cli.Stop(f"ended by {name}; run the same command again to go on", status=130))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number.name)

    def stop(self, failure: cli.UserError) -> None:
        self.failure = self.failure or failure
        self.teacher.stop()

    async def work(self, todo: Iterator[str], bar: Any) -> None:
        for key in todo:
            if self.failure:
                return
            try:
                await self.ask(key)
            except cli.UserError as error:
                self.stop(error)
                return
            except Stopped:
                return
            except OSError as error:
                what = f"cannot write a reply below {self.session.root} ({error.strerror or error})"
                self.stop(cli.UserError(f"{what}; make room, then run the same command again to go on"))
                return
            except BaseException:
                self.teacher.stop()  # after a bug of ours nothing new is paid for
                raise
            bar.update()
            bar.set_postfix_str(self.state(), refresh=False)

    def state(self) -> str:
        """Failures, tokens, dollars, and the number of requests in flight where the API limits it."""
        report = self.session.report
        tokens = report.usage.total()
        words = [f"{len(report.unusable)} failed", f"{tokens / 1e6:.2f}M tokens" if tokens else ""]
        if report.cost_usd:
            words.append(f"${report.cost_usd:.3f}")
        pace = getattr(self.teacher, "pace", None)
        if pace is not None and pace.limit < pace.most:
            words.append(f"{int(pace.limit)} at a time")
        return ", ".join(filter(None, words))

    async def ask(self, key: str) -> None:
        """Send a request, at most `attempts` times until its reply is usable, and save the reply for all its items."""
        session = self.session
        request, sidecar = session.prepare(key)
        for attempt in range(1, session.attempts + 1):
            try:
                reply = await self.teacher.answer(request)
            except Unanswered as failure:
                return session.give_up(key, failure.reason, failure.message)
            session.report.add(reply)
            refused = await asyncio.get_running_loop().run_in_executor(
                self.writers, session.save_reply, key, request, reply, sidecar | {"attempt": attempt}
            )
            if full := files.out_of_room():
                self.stop(full)
            if refused is None:
                return session.finish(key, f"{reply.teacher} {reply.model}")
            request = session.ask_again(request, refused)
        return session.give_up(key, refused.reason, str(refused).partition(": ")[2])
