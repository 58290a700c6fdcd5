"""What goes wrong in the processes of Ray that a test starts: by the names of LoRAs."""

import os
import signal
from pathlib import Path


def break_workers():
    """A LoRA "kills" ends each process that gets it; one with "once" in its name the first."""
    from prolora.workflow.fleet import worker

    move_each = worker.PairWorker.move_each

    def move(self, entries):
        for entry in entries:
            mark = Path(entry.lora).with_suffix(f".{self.pair.target}")
            if "once" in entry.lora and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "kills" in entry.lora:
                os.kill(os.getpid(), signal.SIGKILL)
        return move_each(self, entries)

    worker.PairWorker.move_each = move
