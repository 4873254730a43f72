"""Ctrl-C, so that nothing is lost by it."""

import signal
import threading
from types import FrameType, TracebackType


class Stop:
    """Inside the block Ctrl-C lets the step end, so that its work can be saved; a second one stops at once.

    A process that was started to ignore it, a background job of a script, goes on ignoring it.
    """

    def __init__(self) -> None:
        self.asked = False
        main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
        self._ours = main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN

    def __enter__(self) -> "Stop":
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
