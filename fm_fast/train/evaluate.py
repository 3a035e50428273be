"""How good are the samples: do they show the class that was asked for, and are they more than copies of the training images?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast.train.config import Recipe
from fm_fast.train.data import DataOrder, Dataset
from fm_fast.train.sample import sample, starting_noise, to_integers

EPOCHS = 15
BATCH = 100
PER_CLASS = 20


@dataclass(frozen=True)
class Quality:
    """Shares in [0, 1] and a ratio of distances.

    accuracy: of the classifier on held-out real images. guided, unguided: samples that the classifier assigns to the class asked for.
    novelty: median distance from an unguided sample to its nearest training image, divided by the same for held-out real images;
    about 1 for new images, near 0 for copies.
    """

    accuracy: float
    guided: float
    unguided: float
    novelty: float

    def __str__(self) -> str:
        return (
            f"samples of the class asked for: {self.unguided:.1%} without guidance, {self.guided:.1%} with guidance"
            f" (by a classifier that is right on {self.accuracy:.1%} of held-out real images)\n"
            f"distance to the nearest training image, relative to that of held-out real images: {self.novelty:.2f}"
        )


def evaluate(model: nn.Module, recipe: Recipe, train: Dataset, held_out: Dataset, seed: int, guidance: float, steps: int) -> Quality:
    """Judge PER_CLASS samples of each class, drawn with and without guidance."""
    classifier = train_classifier(train)
    labels = torch.arange(train.classes, device=train.images.device).repeat_interleave(PER_CLASS)
    x0 = starting_noise((len(labels), *train.images.shape[1:]), recipe, seed, index=2, device=train.images.device)
    unguided = to_integers(sample(model, x0, labels, recipe, steps), train.levels)
    guided = to_integers(sample(model, x0, labels, recipe, steps, guidance=guidance), train.levels)
    return Quality(
        accuracy=agreement(classifier, held_out.images, held_out.labels),
        guided=agreement(classifier, guided, labels),
        unguided=agreement(classifier, unguided, labels),
        novelty=median_distance(unguided, train.images) / median_distance(held_out.images, train.images),
    )


def train_classifier(data: Dataset) -> nn.Module:
    """A small convolutional classifier of integer images, trained for a few seconds; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _classifier(data).to(data.images.device)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    order, steps = DataOrder(len(data), seed=0), EPOCHS * len(data) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for step in range(steps):
        rows = order.indices(step * BATCH, BATCH).to(data.images.device)
        optimiser.zero_grad()
        F.cross_entropy(model(data.images[rows].float()), data.labels[rows]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _classifier(data: Dataset) -> nn.Module:
    channels, height, width = data.images.shape[1:]
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * ((height + 1) // 2) * ((width + 1) // 2), data.classes),
    )  # fmt: skip


@torch.no_grad()
def agreement(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images uint8 [N, C, H, W] that the classifier assigns to their label."""
    return float((classifier(images.float()).argmax(dim=1) == labels).float().mean())


def median_distance(images: Tensor, references: Tensor) -> float:
    """Median over `images` of the Euclidean distance to the nearest of `references`, in grey levels."""
    distances = torch.cdist(images.flatten(1).float(), references.flatten(1).float())
    return float(distances.min(dim=1).values.median())
