"""What judges images: models of transformers whose folders are at hand, and functions of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bases.identity import sample_file
from ...core.validation import DeviceLike
from ...errors import InvalidOption, ProLoRAError, UnsupportedFormat
from ...files.hashing import hash_parts
from ...probe.models import check_weights
from ...probe.pipelines.stages import hide_progress_bars

Metric = Callable[
    [Sequence[Any], Sequence[str], Sequence[Sequence[Any]]], Mapping[str, Sequence[float]]
]
"""Images (of Pillow), the prompt of each, and for each the images that it should look like ->
score -> a number for each image.

Without a reference the last is empty, and scores that need one are left out. More is better, unless
a score is among the metric's attribute `lower`."""


_READ = (".json", ".safetensors", ".txt", ".model")
"""Ends of the files that a metric's model is made of."""


@dataclass(frozen=True)
class Judge:
    """A kind of model that judges images.

    Attributes:
        title: what people call it.
        model: its class in transformers.
        text: the score of an image beside its prompt; "" for none.
        image: the score of an image beside the reference; "" for none.
        spread: the distance of all images from all of the reference; "" for none.
        scaled: whether the score beside the prompt is a logit of the model, not a cosine.
    """

    title: str
    model: str
    text: str = ""
    image: str = ""
    spread: str = ""
    scaled: bool = False


JUDGES = {
    "clip": Judge("CLIP", "CLIPModel", text="CLIP-T", image="CLIP-I"),
    "dinov2": Judge("DINOv2", "Dinov2Model", image="DINOv2"),
    "csd": Judge("CSD", "CLIPVisionModelWithProjection", image="CSD", spread="CSD-MMD"),
    "hpsv2": Judge("HPSv2", "CLIPModel", text="HPSv2"),
    "pickscore": Judge("PickScore", "CLIPModel", text="PickScore", scaled=True),
}
"""Name -> what it is. CSD is a CLIP vision model whose projection is the head for style."""


def open_metric(name: str, given: Any, device: DeviceLike) -> Metric:
    """A metric by its name and the folder (or cached Hub id) of its model, or the given function.

    Raises:
        InvalidOption: there is no metric of that name.
        UnsupportedFormat: the model is not there, is another one, or a package is missing.
        NonFiniteWeights: a weight is NaN or Inf.
    """
    if callable(given):
        metric: Metric = given
        return metric
    if name not in JUDGES:
        known = ", ".join(JUDGES)
        raise InvalidOption(f"`metrics` has no {name!r}: take {known}, or give a function")
    return _ModelMetric(JUDGES[name], str(given), device or "cpu")


def identify_metric(given: Any) -> str:
    """What tells a metric from others: a digest of its model's files, or the name of a function.

    Of a function that is given other values the name stays the same, as that of a model that lies
    in the Hub's cache.

    Raises:
        UnsupportedFormat: a file cannot be read.
    """
    if callable(given):
        named = given if hasattr(given, "__qualname__") else type(given)
        return f"{named.__module__}.{named.__qualname__}"
    folder = Path(str(given))
    if not folder.is_dir():
        return str(given)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _READ and file.is_file()]
    return hash_parts([f"{file.name} {sample_file(file)} " for file in files])


def ask_metric(
    name: str,
    metric: Metric,
    images: Sequence[Any],
    prompts: Sequence[str],
    reference: Sequence[Sequence[Any]],
) -> dict[str, list[float]]:
    """What a metric says, checked: finite numbers, one for each image.

    Raises:
        ProLoRAError: it fails, or says something else.
    """
    try:
        said = metric(images, prompts, reference)
        scores = {score: [float(x) for x in values] for score, values in said.items()}
    except ProLoRAError:
        raise
    except Exception as error:  # a metric may raise any type
        raise ProLoRAError(f"the metric {name} fails: {type(error).__name__}: {error}") from error
    for score, values in scores.items():
        if len(values) != len(images) or not torch.tensor(values).isfinite().all():
            raise ProLoRAError(
                f"the metric {name} gives {len(values)} numbers for {len(images)} images as "
                f"{score}, or some that are not finite"
            )
    return scores


class _ModelMetric:
    """A metric by a model of transformers; it looks at each image once."""

    def __init__(self, judge: Judge, folder: str, device: DeviceLike) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UnsupportedFormat(
                'metrics run through transformers: pip install "prolora[evaluate]"'
            ) from error
        library: Any = transformers
        local: dict[str, Any] = {"local_files_only": True}
        loading = local | {"use_safetensors": True, "output_loading_info": True}
        try:
            with hide_progress_bars():
                self._process = library.AutoImageProcessor.from_pretrained(folder, **local)
                if judge.text:
                    self._split = library.AutoTokenizer.from_pretrained(folder, **local)
                model, info = getattr(library, judge.model).from_pretrained(folder, **loading)
        except Exception as error:  # its type depends on what is missing in the folder
            raise UnsupportedFormat(
                f"{folder}: is not read as {judge.title} ({judge.model} of transformers, in "
                f"safetensors; nothing is downloaded): {type(error).__name__}: {error}"
            ) from error
        # transformers would fill them with random numbers.
        missing = sorted(n for n in info["missing_keys"] if not n.endswith("position_ids"))
        if missing:
            raise UnsupportedFormat(
                f"{folder}: is not {judge.title}: {len(missing)} weights of its {judge.model} are "
                f"missing, the first: {missing[0]}"
            )
        check_weights(model, folder)
        self.lower = {judge.spread}
        self._judge, self._model = judge, model.float().eval().to(device)
        self._seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], reference: Sequence[Sequence[Any]]
    ) -> dict[str, list[float]]:
        judge, scores = self._judge, {}
        ours = torch.stack([self._embed(image) for image in images])
        if judge.text:
            asked = torch.stack([self._embed_text(prompt) for prompt in prompts])
            scale = self._model.logit_scale.exp().cpu() if judge.scaled else 1.0
            scores[judge.text] = (scale * (ours * asked).sum(1)).tolist()
        if judge.image and reference:
            wanted = [torch.stack([self._embed(x) for x in images]) for images in reference]
            alike = [float((x @ mine).mean()) for mine, x in zip(ours, wanted, strict=True)]
            scores[judge.image] = alike
            theirs = torch.cat(wanted).unique(dim=0)
            if judge.spread and min(len(ours), len(theirs)) > 2:
                scores[judge.spread] = split_mmd(ours, theirs).tolist()
        return scores

    def _embed(self, image: Any) -> Tensor:
        """The features of an image, of norm 1."""
        key = hash_parts([f"{image.size} ", image.tobytes()])
        if key not in self._seen:
            model = self._model
            pixels = self._process(images=image, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(next(model.parameters()).device)
            if hasattr(model, "vision_model"):
                found = model.visual_projection(model.vision_model(pixels).pooler_output)
            else:
                found = model(pixels).pooler_output
            self._seen[key] = _normalise(found)
        return self._seen[key]

    def _embed_text(self, prompt: str) -> Tensor:
        """The features of a prompt, of norm 1; what is beyond the model's length is cut off."""
        if prompt not in self._seen:
            model = self._model
            most = model.config.text_config.max_position_embeddings
            words = self._split(prompt, truncation=True, max_length=most, return_tensors="pt")
            words = words.to(next(model.parameters()).device)
            found = model.text_model(**words).pooler_output
            self._seen[prompt] = _normalise(model.text_projection(found))
        return self._seen[prompt]


def _normalise(found: Tensor) -> Tensor:
    return torch.nn.functional.normalize(found[0].double().cpu(), dim=0)


def split_mmd(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared maximum mean discrepancy, as a number for each of our features [n, d], n > 2.

    Gaussian kernel, whose width is the median distance within the reference [m, d]; unbiased. The
    numbers are the jackknife's pseudo-values for the given reference: their mean is the
    discrepancy, and they can be resampled like any other score.
    """
    n, m = len(ours), len(theirs)
    width = torch.pdist(theirs).median().clamp_min(1e-12)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(torch.cdist(a, b) / width).square() / 2).exp()

    inside = (kernel(ours, ours).sum(1) - 1) / (n - 1)
    inside = (2 * (n - 1) * inside - n * inside.mean()) / (n - 2)
    return (
        inside
        - 2 * kernel(ours, theirs).mean(1)
        + (kernel(theirs, theirs).sum() - m) / (m * (m - 1))
    )
