"""One open LoRA, read in threads and in other processes."""

from __future__ import annotations

import os
import pickle
import threading

import mini
import torch
from fresh import forks, start_fork
from safetensors.torch import load_file

from prolora import Lora, open_base


def read_wrong(lora, wanted, rounds: int = 20) -> int:
    """Number of tensors that are read otherwise than they are stored."""
    return sum(not torch.equal(lora.read(k), x) for _ in range(rounds) for k, x in wanted.items())


@forks
def test_forked_processes_read_an_open_lora_as_it_is_stored(tmp_path):
    path, *_ = mini.write_case(tmp_path)
    with Lora.open(path) as lora:

        def read():
            assert read_wrong(lora, load_file(path)) == 0

        children = [start_fork(read) for _ in range(4)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_spawned_process_opens_again_what_is_open_here(tmp_path, monkeypatch):
    """Windows forks no process: a DataLoader's workers get a pickle of the LoRA and the base."""
    path, source, _ = mini.write_case(tmp_path)
    monkeypatch.chdir(tmp_path)
    with Lora.open(path.name) as lora:
        sent = pickle.dumps((lora, open_base(source)))
    monkeypatch.chdir(path.anchor)
    received, base = pickle.loads(sent)
    assert read_wrong(received, load_file(path), 1) == 0
    name, weight = next(iter(mini.source_weights().items()))
    assert torch.equal(base.read(name), weight)


def test_threads_read_an_open_lora_though_one_closes_it(tmp_path):
    path, *_ = mini.write_case(tmp_path)
    wanted, wrong = load_file(path), []
    with Lora.open(path) as lora:
        threads = [
            threading.Thread(target=lambda: wrong.append(read_wrong(lora, wanted)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            lora.close()
    assert wrong == [0] * 4
