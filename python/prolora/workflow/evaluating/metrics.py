"""What judges images: models of transformers whose folders are at hand, and functions of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def open_metric(name: str, given: Any, device: str | None) -> Metric:
    """A metric by its name, or the function that was given.

    Args:
        name: of `JUDGES`, or any for a function.
        given: the folder of the model, or its id where it is in the cache of the Hub; or a metric.
        device: where it runs.

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


def check_metric(name: str, given: Any) -> None:
    """Opens a metric and lets it judge a grey image, before anything is drawn.

    Raises:
        ProLoRAError: it cannot, and why.
    """
    from PIL import Image

    grey = [Image.new("RGB", (64, 64), (127, 127, 127))] * 3
    ask_metric(name, open_metric(name, given, None), grey, ["a prompt"] * 3, [grey] * 3)


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
    """A metric by a model of transformers; it looks at each image once.

    Attributes:
        lower: the scores of which less is better.
    """

    def __init__(self, judge: Judge, folder: str, device: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UnsupportedFormat(
                'metrics run through transformers: pip install "prolora[evaluate]"'
            ) from error
        local: dict[str, Any] = {"local_files_only": True}
        try:
            library: Any = transformers
            with hide_progress_bars():
                self._processor = library.AutoImageProcessor.from_pretrained(folder, **local)
                if judge.text:
                    self._words = library.AutoTokenizer.from_pretrained(folder, **local)
                model, info = getattr(library, judge.model).from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, **local
                )
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
        self._judge, self._device = judge, device
        self._model = model.float().eval().to(device)
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
            paired = all(len(images) == 1 for images in reference)
            theirs = torch.cat(wanted) if paired else wanted[0]
            if judge.spread and min(len(ours), len(theirs)) > 2:
                scores[judge.spread] = split_mmd(ours, theirs, paired).tolist()
        return scores

    def _embed(self, image: Any) -> Tensor:
        """The features of an image, of norm 1, in float64."""
        key = hash_parts([f"{image.size} ", image.tobytes()])
        if key not in self._seen:
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
            model, pixels = self._model, pixels.to(self._device)
            if hasattr(model, "vision_model"):
                found = model.visual_projection(model.vision_model(pixels).pooler_output)
            else:
                found = model(pixels).pooler_output
            self._seen[key] = _normalise(found)
        return self._seen[key]

    def _embed_text(self, prompt: str) -> Tensor:
        """The features of a prompt, of norm 1; what is beyond the model's length is cut off."""
        if prompt not in self._seen:
            most = self._model.config.text_config.max_position_embeddings
            asked = {"truncation": True, "max_length": most, "return_tensors": "pt"}
            words = self._words(prompt, **asked).to(self._device)
            found = self._model.text_model(**words).pooler_output
            self._seen[prompt] = _normalise(self._model.text_projection(found))
        return self._seen[prompt]


def _normalise(found: Tensor) -> Tensor:
    return torch.nn.functional.normalize(found[0].double().cpu(), dim=0)


def split_mmd(ours: Tensor, theirs: Tensor, paired: bool) -> Tensor:
    """Squared maximum mean discrepancy, as a number for each of our features.

    Gaussian kernel, whose width is the median distance within the reference; unbiased. The numbers
    are the jackknife's pseudo-values, so that their mean is the discrepancy without its bias of
    first order, and they can be resampled like any other score.

    Args:
        ours: features [n, d], n > 2.
        theirs: those of the reference [m, d], m > 2.
        paired: whether each of them belongs to ours of its place, and is left out with it.
    """
    n = len(ours)
    width = torch.pdist(theirs).median().clamp_min(1e-12)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(torch.cdist(a, b) / width).square() / 2).exp()

    def measure(keep: Tensor, kept: Tensor) -> Tensor:
        a, b = int(keep.sum()), int(kept.sum())
        inside = ((keep @ within @ keep) - a) / (a * (a - 1))
        beside = ((kept @ among @ kept) - b) / (b * (b - 1))
        return inside + beside - 2 * (keep @ across @ kept) / (a * b)

    within, among, across = kernel(ours, ours), kernel(theirs, theirs), kernel(ours, theirs)
    all_ours, all_theirs = ours.new_ones(n), ours.new_ones(len(theirs))
    whole, values = measure(all_ours, all_theirs), []
    for i in range(n):
        keep, kept = all_ours.clone(), all_theirs.clone()
        keep[i] = 0
        if paired:
            kept[i] = 0
        values.append(n * whole - (n - 1) * measure(keep, kept))
    return torch.stack(values)


def name_missing(given: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that nothing was given for, by title, and why they are skipped."""
    reason = "its model was not given, and nothing is downloaded"
    return {judge.title: reason for name, judge in JUDGES.items() if name not in given}


def find_lower(metric: Metric) -> set[str]:
    """The scores of a metric of which less is better."""
    with suppress(TypeError):
        return set(getattr(metric, "lower", ()))
    return set()
