"""Images without labels → the model's own confident answers as their labels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bshub.errors import InconclusiveError
from bshub.intake.folders import ClassFolder
from bshub.intake.models import LoadedModel

CONFIDENT = 0.9


def label_by_answers(
    folder: ClassFolder,
    source: LoadedModel,
    device: torch.device,
    batch_size: int,
    *,
    progress: Callable[[int], None] = lambda amount: None,
) -> ClassFolder:
    """Keep the images of which the model is sure, each with its answer as its label.

    An image stays where ``max softmax(logits) >= 0.9``. What such labels can show is agreement with the model, not
    accuracy: an answer that a backdoor gave counts as right.

    Args:
        folder: Images; their labels are not looked at.
        source: The model.
        device: Where it computes.
        batch_size: Images per batch.
        progress: Called with the number of images done.

    Returns:
        The images that stay, in their order.

    Raises:
        ImageDataError: Too many of the images cannot be read.
        InconclusiveError: The model is sure of none.
    """
    sure: list[bool] = []
    answers: list[int] = []
    try:
        source.module.to(device)
        with torch.no_grad():
            for images, _ in folder.batches(source.preprocessing, batch_size):
                share, answer = source.module(images.to(device)).float().softmax(1).max(1)  # (n,), (n,)
                sure += (share >= CONFIDENT).tolist()
                answers += answer.tolist()
                progress(len(images))
    finally:
        source.module.cpu()
    readable = [path for path in folder.paths if path not in folder.rejected]
    kept = [(path, answer) for path, answer, is_sure in zip(readable, answers, sure, strict=True) if is_sure]
    if not kept:
        raise InconclusiveError(
            f"the model is not {100 * CONFIDENT:.0f} % sure of any image under {folder.root}",
            hint="give images of the kind it was trained on, or class folders without --unlabelled",
        )
    return ClassFolder(
        folder.root,
        tuple(path for path, _ in kept),
        tuple(answer for _, answer in kept),
        f"the model's own answers, where it is at least {100 * CONFIDENT:.0f} % sure: "
        f"{len(kept)} of {len(readable)} images",
        rejected=dict(folder.rejected),
    )
