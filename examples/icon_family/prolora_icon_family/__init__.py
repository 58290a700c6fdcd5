"""Small models that draw icons, and their pipeline: FLUX's transformer on plain pixels."""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SchedulerMixin
from safetensors import safe_open
from torch import Tensor

NULL_PROMPT = "nothing nothing nothing nothing"
SIZE, PATCH = 32, 4  # pixels of an image, and of what the transformer reads as one token


@dataclass(frozen=True)
class Icons:
    """Images [n, 3, 32, 32], from 0 to 1."""

    images: Tensor


class IconPipeline(DiffusionPipeline):
    """A pipeline that draws icons from prompts of four words."""

    scheduler: Any
    transformer: Any
    config: Any
    register_modules: Any

    # Up to its version 0.35, diffusers reads the classes of the parts here, and no texts.
    def __init__(self, scheduler: SchedulerMixin, transformer: FluxTransformer2DModel) -> None:
        """Takes the parts; the table of prompts lies beside their folder."""
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        num_inference_steps: int = 16,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
    ) -> Icons:
        """Draws an icon of each prompt by Euler steps of a rectified flow.

        Args:
            prompt: four words as in "car noto many on-blue"; "" for none.
            num_inference_steps: of equal length.
            guidance_scale: v = v_null + scale · (v_prompt − v_null); 1 asks without.
            generator: of the noise.
            output_type: "latent" for patches as the transformer sees them, or pixels.

        Raises:
            ValueError: the models have not learnt such a prompt.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens, n = self.encode_icons([*prompts, ""]), len(prompts)
        wanted, null = tokens[:n], tokens[n:].expand(n, -1, -1)
        guided = guidance_scale != 1
        asked = torch.cat([wanted, null]) if guided else wanted
        x = torch.randn(n, 3, SIZE, SIZE, generator=generator)
        x = F.pixel_unshuffle(x, PATCH).flatten(2).mT
        starts = torch.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=starts.numpy())
        for time in self.scheduler.timesteps:
            velocity = self._predict(torch.cat([x, x]) if guided else x, time / 1000, asked)
            if guided:
                with_prompt, without = velocity.chunk(2)
                velocity = without + guidance_scale * (with_prompt - without)
            x = self.scheduler.step(velocity, time, x, return_dict=False)[0]
        if output_type == "latent":
            return Icons(x)
        pixels = F.pixel_shuffle(x.mT.unflatten(2, (SIZE // PATCH, -1)), PATCH)
        return Icons((pixels / 2 + 0.5).clamp(0, 1))

    def _predict(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Returns the velocity; the mean token stands for CLIP's pooled output."""
        axis = torch.arange(SIZE // PATCH)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=tokens,
            pooled_projections=tokens.mean(1),
            timestep=time.expand(len(x)),
            img_ids=places,
            txt_ids=torch.zeros(tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return velocity

    def encode_icons(self, prompts: list[str]) -> Tensor:
        """Returns the tokens [n, 4, 64] of prompts, as the text encoder gave them.

        The encoder is not shipped. It looks back only, so a table has a row for every beginning.

        Raises:
            ValueError: the models have not learnt such a prompt.
        """
        tokens, places = read_table(Path(self.config._name_or_path).parent)
        rows = []
        for prompt in prompts:
            words = (prompt or NULL_PROMPT).split()
            parts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
            known = list(itertools.takewhile(places.__contains__, parts))
            if not len(words) == len(known) == 4:
                raise ValueError(
                    f"{prompt!r}: a prompt of the icons has four known words, as prompts.txt shows"
                )
            rows.append([places[part] for part in parts])
        return tokens[torch.tensor(rows)]


@functools.cache
def read_table(folder: Path) -> tuple[Tensor, dict[str, int]]:
    """Returns the tokens, and the row of each beginning of a prompt."""
    with safe_open(folder / "prompts.safetensors", "pt") as file:
        beginnings = json.loads(file.metadata()["beginnings"])
        return file.get_tensor("tokens").float(), {text: i for i, text in enumerate(beginnings)}
