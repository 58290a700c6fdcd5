"""How another tool embeds prolora: updates in, updates out, no files.

    python examples/embed.py

A converter or a ComfyUI node has the weights in memory already. It hands over one update and the
two weights it belongs to, or a state dict and two models.
"""

import torch

import prolora

torch.manual_seed(0)
W_source = torch.randn(320, 256) / 16
W_target = W_source + 0.1 * torch.randn(320, 256) / 16  # a fine-tune
up, down = torch.randn(320, 8), torch.randn(8, 256)

# A copy, where these two weights have something in common; and else a refusal.
suited = prolora.project((up, down), W_source, W_target, method="auto")
print(f"auto: rank {suited.rank}, norm {float(suited.norm()):.1f}")

# The published projection: rank at most 16, nothing of size 320 × 256 is formed.
moved, info = prolora.project((up, down), W_source, W_target, return_info=True)
print(f"rank {moved.rank}")
print(f"Φ left {info.similarity.left:.2f}, by chance {info.similarity.chance_left:.2f}")
print(
    f"kept {info.surviving_energy:.0%} of the energy, {info.copy_distance:.2f} norms from the copy"
)

# Many updates, one pair of weights: compute the bases once.
bases = [prolora.truncated_svd(weight, 64) for weight in (W_source, W_target)]
print(f"subspaces exact to sin Θ ≤ {max(float(basis.bound) for basis in bases):.0e}")
for method in ("prolora", "copy"):
    result = prolora.project((up, down), *bases, method=method)
    print(f"{method:>9}: norm {float(result.norm()):.1f}")

# A whole LoRA: any mapping of names to tensors will do as a base.
name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
lora = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
done = prolora.transfer(lora, {name: W_source}, {name: W_target})
print(*done.report.sentences(), sep="\n")
