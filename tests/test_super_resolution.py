"""Super-resolution (section 6.3 of the paper): a low-resolution image as a condition of the U-Net, of its loss and of its samples."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from unet_helpers import TINY, inputs, shaken

import fm_fast as fm
from fm_fast.nn import UNet, UNetConfig

CONFIG = replace(TINY, low_resolution_channels=1)


def low_image(batch, size=2):
    return fm.noise((batch, 1, size, size), seed=8, step=0)


@pytest.mark.parametrize("size", [2, 4])
def test_the_low_resolution_image_is_enlarged_and_joined_to_the_channels(size):
    model, plain = shaken(UNet(CONFIG)), UNet(replace(TINY, image_channels=2))
    plain.load_state_dict(model.state_dict() | {name: value for name, value in plain.state_dict().items() if name.startswith("head")})
    plain.head = model.head
    (x, t, y), low = inputs(3), low_image(3, size)
    joined = torch.cat([x, F.interpolate(low, size=(8, 8), mode="bicubic")], dim=1)
    torch.testing.assert_close(model(x, t, y=y, low_resolution=low), plain(joined, t, y=y), rtol=1e-5, atol=1e-5)


def test_an_image_of_full_size_is_joined_as_it_is():
    model, (x, t, y) = shaken(UNet(CONFIG)), inputs(2)
    seen = []
    model.stem.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x, t, y=y, low_resolution=low_image(2, 8))
    torch.testing.assert_close(seen[0], torch.cat([x, low_image(2, 8)], dim=1), rtol=1e-6, atol=1e-6)


def test_it_is_a_condition_of_loss_sample_guidance_and_likelihood():
    model, (x, _, y), low = shaken(UNet(CONFIG), 0.03), inputs(2), low_image(2)
    cond = {"y": y, "low_resolution": low}
    fm.flow_matching_loss(model, x, cond=cond, seed=0, step=0).backward()
    assert model.stem.weight.grad[:, 1].abs().max() > 0
    settings = {"steps": 2, "method": "euler"}
    one, other = (fm.sample(model, x, cond={**cond, "low_resolution": image}, **settings).x for image in (low, -low))
    assert (one - other).abs().max() > 1e-3
    guided = fm.sample(model, x, cond=cond, guidance=fm.Guidance(1.0 + 1e-6, {"y": -1}), **settings).x
    torch.testing.assert_close(guided, one, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(fm.log_likelihood(model, x, cond=cond, steps=2, method="euler", seed=0).logp).all()


@pytest.mark.parametrize(
    ("config", "low", "message"),
    [
        (CONFIG, None, r"low_resolution: expected shape \[2, 1, h, w\], got None"),
        (CONFIG, torch.zeros(2, 3, 4, 4), r"low_resolution: expected shape \[2, 1, h, w\], got \[2, 3, 4, 4\]"),
        (CONFIG, torch.zeros(1, 1, 4, 4), r"low_resolution: expected shape \[2, 1, h, w\], got \[1, 1, 4, 4\]"),
        (TINY, torch.zeros(2, 1, 4, 4), "low_resolution: expected None because the network has no low_resolution_channels"),
    ],
)
def test_wrong_inputs(config, low, message):
    with pytest.raises(ValueError, match=message):
        UNet(config)(*inputs(2)[:2], low_resolution=low)


@pytest.mark.parametrize(
    ("low", "got"), [(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "torch.uint8"), (torch.zeros(2, 1, 4, 4).numpy(), "ndarray")]
)
def test_grey_levels_are_no_image_in_the_scale_of_the_data(low, got):
    with pytest.raises(TypeError, match=f"low_resolution: expected a floating tensor, in the scale of the data, got {got}"):
        UNet(CONFIG)(*inputs(2)[:2], low_resolution=low)


# The toy of Table 2: blobs of 16x16 pixels from their means over 4x4 pixels. One network learns the flow, another the mean.

TOY = UNetConfig(
    16, 1, 0, channels=16, multipliers=(1, 2), blocks=1, attention_sizes=(), head_channels=32, groups=8, low_resolution_channels=1
)


def blobs(batch, step):
    """[B, 1, 16, 16]: three small round blobs at random places, of which the low-resolution image shows the place only roughly."""
    places = 2 + 12 * fm.noise((batch, 3, 2), seed=11, step=step, kind="uniform")
    axis = torch.arange(16.0)
    squares = (axis[None, None, :, None] - places[..., :1, None]) ** 2 + (axis[None, None, None, :] - places[..., 1:, None]) ** 2
    return 2 * torch.exp(-squares / 1.5).amax(1, keepdim=True) - 1


def lowered(images):
    return F.avg_pool2d(images, 4)


def gradient_energy(images):
    """Sharpness: the mean squared difference of neighbouring pixels."""
    return float(images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean())


def trained(loss_of, steps):
    torch.manual_seed(0)
    model = UNet(TOY)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(model, blobs(64, step), step).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def regression_loss(model, images, step):
    return F.mse_loss(regressed(model, lowered(images)), images)


def regressed(model, low):
    return model(torch.zeros(len(low), 1, 16, 16), torch.zeros(len(low)), low_resolution=low)


def flow_loss(model, images, step):
    return fm.flow_matching_loss(model, images, cond={"low_resolution": lowered(images)}, seed=1, step=step)


@pytest.mark.slow
def test_flow_matching_is_sharper_than_regression_and_further_from_the_original():
    steps, images = 700, blobs(128, 100_000)
    flow, regression = trained(flow_loss, steps), trained(regression_loss, steps)
    low = lowered(images)
    with torch.no_grad():
        mean = regressed(regression, low)
    noise = fm.noise(images.shape, seed=2, step=0)
    drawn = fm.sample(flow, noise, cond={"low_resolution": low}, steps=20).x
    sharpness = {name: gradient_energy(found) for name, found in {"original": images, "flow": drawn, "regression": mean}.items()}
    error = {name: float((found - images).square().mean()) for name, found in {"flow": drawn, "regression": mean}.items()}
    print(sharpness, error)
    assert abs(sharpness["flow"] - sharpness["original"]) < 0.5 * abs(sharpness["regression"] - sharpness["original"])
    assert error["regression"] < error["flow"]
    # The samples are of the images that were asked for: their own low-resolution images are the given ones.
    assert float((lowered(drawn) - low).square().mean()) < 0.1 * float(low.var())
