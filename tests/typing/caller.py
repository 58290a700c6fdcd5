"""How others call prolora: type checkers take every line but those that are marked as mistakes.

Not run: `python tests/typing/check.py` has mypy and pyright read it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import prolora
from prolora.verbs.options import TransferMethod

up, down = torch.zeros(8, 2), torch.zeros(2, 8)
weight, array = torch.zeros(8, 8), np.zeros((8, 8), dtype=np.float32)
lora, source, target, out = Path("lora.safetensors"), "source", Path("target"), "out.safetensors"

# What people write.
pair: prolora.LowRank = prolora.project((up, down), weight, weight, rank=0.99)
dense: torch.Tensor = prolora.project(weight, weight, weight, method="prolora")
moved, info = prolora.project(weight, weight, weight, return_info=True)
share: torch.Tensor = info.energy
basis: prolora.Basis = prolora.truncated_svd(array, 4)
again: prolora.LowRank = prolora.project(prolora.LowRank(up, down), basis, basis)
like: torch.Tensor = prolora.similarity(weight, array, rank=4).left
angles: torch.Tensor = prolora.principal_angles(weight, array)
done: prolora.Transfer = prolora.transfer(lora, source, target, method="copy", strength=0.8)
options = prolora.TransferOptions(method="copy", strength=0.3, out_rank="50%")
method: TransferMethod = options.method
done = prolora.transfer(lora, source, target, options, text_encoder="skip")
report = prolora.transfer(lora, source, target, options, out=out).report
rows: list[str] = [row.source for row in report.modules if row.status == "mapped"]
outcomes: list[prolora.Outcome] = prolora.transfer_many([lora], source, target, "folder")
planned: prolora.Report = prolora.transfer(
    lora, source, target, match="similarity", dry_run=True
).report
fitted: prolora.Transfer = prolora.fit(lora, source, target, prompts=("a cat",), images=8)
tensors: dict[str, torch.Tensor] = done.state_dict("diffusers")

# What people get wrong; each line is one mistake.
prolora.project((up, down), "source.safetensors", weight)  # mistake
prolora.project([[1.0, 2.0]], weight, weight)  # mistake
prolora.project(weight, weight, weight, method="prolara")  # mistake
prolora.project(weight, weight, weight, ranks=8)  # mistake
prolora.project(weight, weight)  # mistake
prolora.truncated_svd([1.0, 2.0], 4)  # mistake
prolora.similarity(weight, None, rank=4)  # mistake
prolora.truncated_svd(weight, "4")  # mistake
wrong: torch.Tensor = prolora.project((up, down), weight, weight)  # mistake
prolora.transfer(lora, source, target, method="coppy")  # mistake
prolora.transfer(lora, source, target, strenght=0.8)  # mistake
prolora.transfer(lora, source, target, strength="strong")  # mistake
prolora.transfer(lora, source, target, text_encoder=False)  # mistake
prolora.transfer(lora, source)  # mistake
prolora.transfer(lora, source, target, "copy")  # mistake
prolora.transfer(3, source, target)  # mistake
prolora.TransferOptions(metod="copy")  # mistake
prolora.TransferOptions("copy")  # mistake
prolora.transfer(lora, source, target, out=out, format="webui")  # mistake
prolora.transfer_many(lora, source, target, "folder")  # mistake
prolora.transfer(lora, source, target, threshold="0.5", dry_run=True)  # mistake
prolora.migrate([lora], "a", "b", "folder", metod="copy")  # mistake
prolora.migrate([lora], "a", "b", "folder", shard=2)  # mistake
prolora.fit(lora, source, target, prompts="a cat")  # mistake
prolora.fit(lora, source, target, method="copy")  # mistake
prolora.check(lora, base=source, program=3)  # mistake
done.save(out, format="webui")  # mistake
print(report.energy)  # mistake
done.report.modules[0].status = "mapped"  # mistake
prolora.load_moved_lora(lora, source, target, strenght=1)  # mistake
