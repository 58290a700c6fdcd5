"""What goes wrong in the processes of Ray that a test starts: by the names of LoRAs."""

import os
import signal
import time
from pathlib import Path


def break_workers():
    """A LoRA "kills" ends each process that gets it; one with "once" in its name the first.

    One with "sleeps" in its name never gets on, and one with "stops" freezes its process.
    """
    from prolora.workflow.fleet import worker

    move_each = worker.PairWorker.move_each

    def move(self, entries):
        for entry in entries:
            mark = Path(entry.lora).with_suffix(f".{self.pair.target}")
            if "once" in entry.lora and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            name = Path(entry.lora).name
            if "kills" in name:
                os.kill(os.getpid(), signal.SIGKILL)
            if "stops" in name:
                os.kill(os.getpid(), signal.SIGSTOP)
            if "sleeps" in name:
                time.sleep(3600)
        return move_each(self, entries)

    worker.PairWorker.move_each = move
