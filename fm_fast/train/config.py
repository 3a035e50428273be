"""What a training run is: frozen values, and recipes for the paper's Table 1 and other objectives. Presets are in train/presets.py."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from fm_fast import time_samplers
from fm_fast._checks import MAX_SEED
from fm_fast._fields import check_types, require
from fm_fast.nn import UNetConfig
from fm_fast.nn.precondition import can_precondition
from fm_fast.paths import OT, VE, VP, Cosine, Path
from fm_fast.solvers import METHODS
from fm_fast.train.optimiser.averaging import WIDEST
from fm_fast.train.optimiser.schedule import SCHEDULES, LearningRate
from fm_fast.train.prepare import CHANNELS, Preparation
from fm_fast.train.standardisation import Standardisation


@dataclass(frozen=True)
class Recipe:
    """A row of Table 1 or another: the path, what the network predicts, and two means of training it well that leave the objective alone.

    t_sampler: how t is drawn; "importance" draws it where the objective's weight is large and divides by the density (train/times.py).
    preconditioned: keep the network's input and output at unit size (nn/precondition.py).
    """

    path: Path
    objective: str
    t_sampler: str = "stratified"
    preconditioned: bool = False


# Preconditioned, "score" minimises the very loss of "ddpm": its weight sigma^2 turns the error of the score into that of the noise.
RECIPES = {
    "fm-ot": Recipe(OT(), "velocity"),
    "fm-vp": Recipe(VP(), "velocity"),
    "ddpm": Recipe(VP(), "noise", preconditioned=True),
    "score": Recipe(VP(), "score", preconditioned=True),
    "scoreflow": Recipe(VP(), "scoreflow", t_sampler="importance", preconditioned=True),
    # Not in Table 1:
    "fm-cosine": Recipe(Cosine(), "velocity"),
    # From 20, more than two images of the digits can differ by (64 pixels in [-1, 1]: 16), so that the start hardly tells x1.
    "fm-ve": Recipe(VE(sigma_min=0.01, sigma_max=20.0), "velocity", preconditioned=True),
    "data-ot": Recipe(OT(), "data"),
}


PRECISIONS = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")
CUDA_GRAPH = ("auto", "on", "off")
COUPLINGS = ("independent", "optimal")
TIMES = ("auto", *time_samplers.NAMED)
PRECONDITIONED = ("auto", "on", "off")
PARALLEL_TEXT = "the batch only (ddp), or weights, moments and averages too (fsdp)"


def _option(default: Any, text: str, resumable: bool = False) -> Any:
    """A field with its help text; a resumable one may differ when a run is resumed."""
    return field(default=default, metadata={"help": text, "resumable": resumable})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Raises ValueError for a value out of range, TypeError for one of another type, naming the setting."""

    data: str = _option(
        "digits",
        "'digits' (shipped), 'fashion', or a file or folder: IDX, CIFAR-10, small ImageNet, .npz, or images in a subfolder a class",
    )
    resize: int = _option(0, "cut out the middle square of a folder's images and bring it to this height and width, 0 to leave them")
    grey: bool = _option(False, "read a folder's images in one channel of grey instead of red, green and blue")
    pool: int = _option(1, "replace blocks of this many pixels a side by their mean")
    pad: int = _option(0, "frame of this many pixels of value 0")
    super_resolution: int = _option(1, "learn to enlarge images so many times: the network sees means over blocks; 1: not")
    data_shift: tuple[float, ...] = _option(
        (), "of real-valued data (an .npz of floats, such as latents) the network sees (value - shift) scale: one number, or one a channel"
    )
    data_scale: tuple[float, ...] = _option((), "see data_shift; none: both such that each channel has mean 0 and deviation 1")
    test_share: float = _option(0.0, "share of the images held out of data that come without a test set")
    conditional: bool = _option(True, "tell the network the labels; data without any need --no-conditional")
    memory_limit: float = _option(4.0, "GiB above which images (of a folder, .npz or ImageNet) lie in a mapped file", resumable=True)
    cache: str = _option("~/.cache/fm_fast", "folder for such files", resumable=True)
    out: str = _option("out/digits", "folder for checkpoints, weights.safetensors, samples.png, log.jsonl", resumable=True)
    init_from: str = _option("", "begin with the average of this run, as for fine-tuning: a folder or file", resumable=True)
    objective: str = _option("fm-ot", f"path and prediction, first those of the paper's Table 1: {', '.join(RECIPES)}")
    t_sampler: str = _option("auto", f"how training times are drawn: {', '.join(TIMES)}; auto: as suits the objective")
    sigma_min: float = _option(0.0, "noise that is left at t = 1 on the path of fm-ot and data-ot: the paper's sigma_min")
    preconditioned: str = _option(
        "auto", f"keep the network's input and output at unit size: {', '.join(PRECONDITIONED)}; auto: as suits the objective"
    )
    coupling: str = _option("independent", "how noise and images are paired: independent, or optimal within each process's part of a class")
    steps: int = _option(500, "training steps in all", resumable=True)
    batch_size: int = _option(128, "images a step")
    micro_batch: int = _option(0, "images that pass through the network at once, 0 for all of a step", resumable=True)
    precision: str = _option("float32", f"dtype of the weights, with float32 masters in the optimiser: {', '.join(PRECISIONS)}")
    compile: bool = _option(False, "run the network through torch.compile", resumable=True)
    cuda_graph: str = _option("off", "record a step once and replay it (CUDA, one process): on, off, auto where it can be", resumable=True)
    autotune: bool = _option(
        False, "let cuDNN time its convolutions at first use (CUDA): faster, but last bits may differ from run to run", resumable=True
    )
    learning_rate: float = _option(2e-3, "AdamW's peak learning rate")
    schedule: str = _option("linear", f"course of the learning rate after the warm-up: {', '.join(SCHEDULES)}")
    warmup: int = _option(20, "steps over which the learning rate rises linearly")
    beta1: float = _option(0.9, "AdamW's decay of the mean of gradients")
    beta2: float = _option(0.99, "AdamW's decay of the mean of squared gradients")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    clip: float = _option(1.0, "largest norm of the gradient, 0 for no limit")
    ema_decay: float = _option(0.99, "decay of the averaged weights, after a warm-up of (1 + n) / (10 + n)")
    ema_widths: tuple[float, ...] = _option((), "widths of further averages: power functions as in EDM2, e.g. 0.05,0.1 of the run")
    label_drop: float = _option(0.1, "share of labels replaced by the null class, for guidance")
    flip: float = _option(0.0, "share of images mirrored left to right")
    dequantise: bool = _option(False, "add uniform noise within a grey level")
    seed: int = _option(0, "the run is a function of this number and the settings")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...", resumable=True)
    parallel: str = _option("ddp", f"what several processes (torchrun) share: {PARALLEL_TEXT}", resumable=True)
    guidance: float = _option(
        2.0, "guidance weight w of the sample pictures: v_u + w (v_c - v_u); none: 1, or no label_drop", resumable=True
    )
    sample_method: str = _option("midpoint", f"solver of the sample pictures: {', '.join(METHODS)}", resumable=True)
    sample_steps: int = _option(20, "solver steps of the sample pictures", resumable=True)
    sample_every: int = _option(250, "training steps between two sample pictures, 0 for one at the end", resumable=True)
    quality_every: int = _option(
        0, "training steps between two measurements of sample quality by a small classifier, 0 for none", resumable=True
    )
    samples_per_class: int = _option(10, "columns of the sample picture", resumable=True)
    checkpoint_every: int = _option(250, "training steps between two checkpoints, 0 for one at the end", resumable=True)
    keep_checkpoints: int = _option(2, "newest checkpoints to keep, 0 for all", resumable=True)
    log_every: int = _option(20, "training steps between two lines of the log", resumable=True)
    tensorboard: bool = _option(False, "also write the log for TensorBoard", resumable=True)
    evaluate: bool = _option(True, "judge the samples at the end (shipped digits only)", resumable=True)
    model: UNetConfig = field(default_factory=UNetConfig.digits)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def recipe(self) -> Recipe:
        usual = RECIPES[self.objective]
        return Recipe(
            OT(self.sigma_min) if isinstance(usual.path, OT) else usual.path,
            usual.objective,
            usual.t_sampler if self.t_sampler == "auto" else self.t_sampler,
            usual.preconditioned if self.preconditioned == "auto" else self.preconditioned == "on",
        )

    @property
    def knows_the_null_class(self) -> bool:
        """Whether the network has learnt what it answers without a label, which guidance needs."""
        return self.conditional and self.label_drop > 0.0

    @property
    def picture_guidance(self) -> float:
        """`guidance` where the network has learnt the null class, else 1: none."""
        return self.guidance if self.knows_the_null_class else 1.0

    @property
    def standardisation(self) -> Standardisation | None:
        """Of real-valued data."""
        return Standardisation(self.data_shift or (0.0,), self.data_scale) if self.data_scale else None

    @property
    def rate(self) -> LearningRate:
        """Of every step."""
        return LearningRate(self.schedule, self.learning_rate, self.warmup, self.steps)

    @property
    def preparation(self) -> Preparation:
        """What happens to the images before training."""
        unlabelled = not self.conditional
        return Preparation(
            self.resize, self.pool, self.pad, self.test_share, self.memory_limit, self.cache, unlabelled, grey=self.grey,
            shift=self.data_shift, scale=self.data_scale,
        )  # fmt: skip


NOT_NEGATIVE = (
    "resize", "pad", "memory_limit", "warmup", "micro_batch", "clip", "weight_decay", "seed", "sample_every", "quality_every",
    "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
UNLIMITED = ("memory_limit", "clip")
CHOICES = {
    "schedule": SCHEDULES, "precision": PRECISIONS, "parallel": PARALLEL, "cuda_graph": CUDA_GRAPH, "coupling": COUPLINGS,
    "t_sampler": TIMES, "preconditioned": PRECONDITIONED,
}  # fmt: skip


def _check(config: TrainConfig) -> None:
    check_types(config, UNLIMITED)
    if config.objective not in RECIPES:
        raise ValueError(f"objective: expected one of {', '.join(RECIPES)}, got {config.objective!r}")
    for name in ("steps", "batch_size", "sample_steps", "samples_per_class", "log_every", "pool", "super_resolution"):
        require(name, getattr(config, name) >= 1, "at least 1", getattr(config, name))
    for name, choices in CHOICES.items():
        require(name, getattr(config, name) in choices, f"one of {', '.join(choices)}", getattr(config, name))
    for name in NOT_NEGATIVE:
        require(name, getattr(config, name) >= 0, "0 or more", getattr(config, name))
    for name in ("label_drop", "flip"):
        require(name, 0.0 <= getattr(config, name) <= 1.0, "a share in [0, 1]", getattr(config, name))
    for name in ("beta1", "beta2", "ema_decay", "test_share"):
        require(name, 0.0 <= getattr(config, name) < 1.0, "a number in [0, 1)", getattr(config, name))
    for width in config.ema_widths:
        require("ema_widths", 0.0 < width <= WIDEST, f"shares of the run, at most {WIDEST:.4f}", width)
    _check_recipe(config)
    _check_standardisation(config)
    require("seed", config.seed < MAX_SEED, "less than 2^63", config.seed)
    require("learning_rate", config.learning_rate > 0.0, "a positive number", config.learning_rate)
    paired = config.coupling != "independent"
    require("coupling", not (paired and config.super_resolution > 1), "independent, for super-resolution", config.coupling)
    require("sample_method", config.sample_method in METHODS, f"one of {', '.join(METHODS)}", config.sample_method)


def _check_recipe(config: TrainConfig) -> None:
    usual, name = RECIPES[config.objective], config.objective
    require("sigma_min", 0.0 <= config.sigma_min < 1.0, "a number in [0, 1)", config.sigma_min)
    require("sigma_min", config.sigma_min == 0.0 or isinstance(usual.path, OT), f"0 for {name}, which has another path", config.sigma_min)
    possible = can_precondition(usual.path, usual.objective)
    require("preconditioned", possible or config.preconditioned != "on", f"auto or off for {name}", config.preconditioned)


def _check_standardisation(config: TrainConfig) -> None:
    shift, scale = config.data_shift, config.data_scale
    require("data_scale", 0.0 not in scale, "numbers other than 0", scale)
    require("data_shift", not shift or bool(scale), "none without data_scale, which leaves both to the data", shift)
    expected = "{} for real-valued data (data_scale), which have no grey levels"
    require("dequantise", not (scale and config.dequantise), expected.format("off"), config.dequantise)
    require("super_resolution", not scale or config.super_resolution == 1, expected.format(1), config.super_resolution)


def fit_to_data(
    config: TrainConfig, image_shape: tuple[int, ...], classes: int, standardisation: Standardisation | None = None
) -> TrainConfig:
    """The same run with the network's channels, size and classes taken from the data (image_shape is C, H, W), and of real numbers what it
    sees of them.
    """
    channels, height, width = image_shape
    if height != width:
        hint = f"; are these {channels}x{height} images with their {width} channels last?" if width in CHANNELS else ""
        square = "square images [N, C, H, W] (resize cuts out the middle square of a folder's)"
        raise ValueError(f"data: expected {square}, got {height}x{width}{hint}")
    known, factor = classes if config.conditional else 0, config.super_resolution
    require("super_resolution", height % factor == width % factor == 0, f"a divisor of the images' size, {height}x{width}", factor)
    _check_levels(config.model, height)
    low = channels if factor > 1 else 0
    shape = replace(config.model, image_channels=channels, image_size=height, classes=known, low_resolution_channels=low)
    if standardisation is None:
        return replace(config, model=shape)
    return replace(config, model=shape, data_shift=standardisation.shift, data_scale=standardisation.scale)


def _check_levels(model: UNetConfig, size: int) -> None:
    halvings = (size & -size).bit_length() - 1
    expected = f"at most {halvings + 1} levels, because images of {size}x{size} can be halved {halvings} times"
    require("model.multipliers", size % model.downsampling == 0, expected, model.multipliers)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as stored in a checkpoint."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`, also by way of JSON. Raises ValueError or TypeError for values that no configuration has."""
    return TrainConfig(**{**_tuples(values), "model": UNetConfig(**_tuples(values["model"]))})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def resume_conflicts(stored: TrainConfig, asked: TrainConfig) -> list[str]:
    """The settings in which a resumed run may not differ from the stored one, but does, as "name: stored -> asked".

    The data are another matter (train/data/identity.py): they may have moved.
    """
    fixed = [entry.name for entry in fields(TrainConfig) if entry.name != "data" and not entry.metadata.get("resumable", False)]
    pairs = [pair for name in fixed for pair in _pairs(name, getattr(stored, name), getattr(asked, name))]
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _pairs(name: str, stored: Any, asked: Any) -> list[tuple[str, Any, Any]]:
    """(name, stored, asked) of a setting, or of each of those that it consists of."""
    if not is_dataclass(stored):
        return [(name, stored, asked)]
    return [(f"{name}.{entry.name}", getattr(stored, entry.name), getattr(asked, entry.name)) for entry in fields(stored)]
