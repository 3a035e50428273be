"""A small classifier of a data set's own images: the judge of samples where no pretrained network is at hand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast.train.data import DataOrder, Dataset

EPOCHS = 15
BATCH = 100
FEWEST_STEPS, MOST_STEPS = 50, 2000
CHUNK = 1000


class Classifier(nn.Module):
    """Two convolutions and a linear layer. Called with images [N, C, H, W] in grey levels, float; returns logits [N, classes]."""

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64 * ((height + 1) // 2) * ((width + 1) // 2), classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def train_classifier(data: Dataset) -> Classifier:
    """A classifier trained on the data for a few seconds; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels, height, width = data.images.shape[1:]
        model = Classifier(channels, height, width, data.classes).to(data.device)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    order, steps = DataOrder(len(data), seed=0), min(max(EPOCHS * len(data) // BATCH, FEWEST_STEPS), MOST_STEPS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for step in range(steps):
        images, labels = data.batch(order.indices(step * BATCH, BATCH))
        optimiser.zero_grad()
        F.cross_entropy(model(images.float()), labels).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def agreement(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images uint8 [N, C, H, W], on any device, that the classifier assigns to their label, int64 [N]."""
    predicted = torch.cat([classifier(part.to(labels.device, torch.float32)).argmax(dim=1) for part in images.split(CHUNK)])
    return float((predicted == labels).float().mean())


@torch.no_grad()
def features(classifier: Classifier, images: Tensor) -> Tensor:
    """The classifier's last convolution, averaged over positions: float64 [N, 64] for images uint8 [N, C, H, W] on any device."""
    device = classifier.head.weight.device
    return torch.cat([classifier.body(part.to(device, torch.float32)).mean((2, 3)) for part in images.split(CHUNK)]).to(torch.float64)
