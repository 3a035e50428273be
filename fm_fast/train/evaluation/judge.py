"""Sample quality while a network is trained: part of what `fm-fast evaluate` measures, by the pictures' solver."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, load_dataset
from fm_fast.train.evaluation.classifier import Classifier, train_classifier
from fm_fast.train.evaluation.evaluate import draw_samples, sample_quality
from fm_fast.train.evaluation.likelihood import require_fitting

JUDGED = 500  # held-out images at most, and as many samples
BATCH = 100
# Fields of SampleQuality: an average of few samples tells no more. The real_ ones are those of training images.
MEASURED = ("agreement", "real_agreement", "frechet", "real_frechet", "nearest_neighbour", "real_nearest_neighbour", "novelty")


@dataclass(frozen=True)
class Judge:
    """What all measurements of a run share."""

    classifier: Classifier
    train: Dataset
    held_out: Dataset

    def measure(self, average: nn.Module, config: TrainConfig) -> dict[str, Any]:
        """MEASURED by name, of samples without guidance from noise that is always the same."""
        solver = {"method": config.sample_method, "steps": config.sample_steps}
        samples = draw_samples(average, config, self.held_out, config.seed, BATCH, **solver)
        quality = sample_quality(samples, self.classifier, self.train, self.held_out)
        return {name: getattr(quality, name) for name in MEASURED}


def judge_of(config: TrainConfig, train: Dataset) -> Judge:
    """Trains the classifier. Raises ValueError for data of fewer than two images a part."""
    held_out = load_dataset(config.data, "test", config.preparation)
    held_out = replace(held_out, images=held_out.images[:JUDGED], labels=held_out.labels[:JUDGED]).to(train.device)
    require_fitting(config, held_out)
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"quality_every: expected at least 2 training and 2 held-out images, got {len(train)} and {len(held_out)}")
    return Judge(train_classifier(train), train, held_out)
