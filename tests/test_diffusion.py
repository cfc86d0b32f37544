from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor
from torch.testing import assert_close

from mmalign import diffusion

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def wave(phase: float, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(0.1 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


@pytest.fixture(scope="module")
def ddim() -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)


LATENTS = wave(0, 3, 4, 2, 2)
NOISE = wave(1, 3, 4, 2, 2)
TIMESTEPS = torch.tensor([0, 321, 999])


def test_schedule_of_sd15(alphas: Tensor) -> None:
    golden = [0.99915, 0.9982960278384514, 0.2763326838229746, 0.0081550045674304]
    assert_close(alphas[[0, 1, 500, 951]], torch.tensor(golden, dtype=torch.float64))
    assert alphas[999].item() == pytest.approx(0.004660098513077238, abs=1e-9)


def test_add_noise_and_velocity_equal_the_schedulers(ddim: DDIMScheduler) -> None:
    latents, noise = LATENTS.float(), NOISE.float()
    got = diffusion.add_noise(latents, noise, TIMESTEPS, ddim.alphas_cumprod)
    assert_close(got, ddim.add_noise(latents, noise, TIMESTEPS), rtol=0, atol=0)
    got = diffusion.velocity(latents, noise, TIMESTEPS, ddim.alphas_cumprod)
    assert_close(got, ddim.get_velocity(latents, noise, TIMESTEPS), rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_conversions_invert_noising(prediction_type: str, alphas: Tensor) -> None:
    noisy = diffusion.add_noise(LATENTS, NOISE, TIMESTEPS, alphas)
    target = diffusion.training_target(LATENTS, NOISE, TIMESTEPS, alphas, prediction_type)
    state = (noisy, TIMESTEPS, alphas, prediction_type)
    assert_close(diffusion.pred_x0(target, *state), LATENTS, atol=1e-10, rtol=0)
    assert_close(diffusion.noise_pred(target, *state), NOISE, atol=1e-10, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pred_x0_equals_the_scheduler(prediction_type: str) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    got = diffusion.pred_x0(
        LATENTS, NOISE, torch.full((3,), 451), scheduler.alphas_cumprod, prediction_type
    )
    want = scheduler.step(LATENTS, 451, NOISE).pred_original_sample
    assert_close(got, want, atol=1e-6, rtol=0)


def test_unknown_prediction_type_is_refused(alphas: Tensor) -> None:
    with pytest.raises(ValueError, match="sample"):
        diffusion.pred_x0(LATENTS, NOISE, TIMESTEPS, alphas, "sample")
    with pytest.raises(ValueError, match="sample"):
        diffusion.training_target(LATENTS, NOISE, TIMESTEPS, alphas, "sample")


def test_half_precision_is_computed_in_float32(alphas: Tensor) -> None:
    latents, noise = LATENTS.bfloat16(), NOISE.bfloat16()
    got = diffusion.add_noise(latents, noise, TIMESTEPS, alphas.float())
    want = diffusion.add_noise(latents.float(), noise.float(), TIMESTEPS, alphas.float())
    assert got.dtype == torch.float32
    assert_close(got, want, rtol=0, atol=0)


def test_denoising_error_is_a_mean_per_sample() -> None:
    output = torch.stack([torch.full((4, 2, 2), 3.0), torch.zeros(4, 2, 2)])
    output[1, 0, 0, 0] = 4.0
    error = diffusion.denoising_error(output.bfloat16(), torch.ones(2, 4, 2, 2).bfloat16())
    assert error.dtype == torch.float32
    assert_close(error, torch.tensor([4.0, (15 + 9) / 16]))


def test_boundary_scalings(alphas: Tensor) -> None:
    timesteps = torch.tensor([19, 499, 999])
    c_skip, c_out = diffusion.boundary_scalings(timesteps)
    golden = torch.tensor([6.92515979806234e-06, 1.004012021999791e-08, 2.5050075037374525e-09])
    assert_close(c_skip, golden, rtol=1e-6, atol=0)
    assert_close(c_out, torch.tensor([0.9999965374141062, 0.99999999497994, 0.9999999987474963]))
    scheduler = LCMScheduler(**BETAS)
    want = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    assert_close(torch.stack([c_skip, c_out], 1), torch.tensor(want), rtol=1e-6, atol=0)
    start = diffusion.boundary_scalings(torch.tensor([0]))
    assert [c.item() for c in start] == [1, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_function_equals_the_lcm_scheduler(prediction_type: str) -> None:
    scheduler = LCMScheduler(**BETAS, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    timestep = int(scheduler.timesteps[1])
    want = scheduler.step(NOISE, timestep, LATENTS, generator=torch.Generator()).denoised
    got = diffusion.consistency_function(
        NOISE,
        LATENTS,
        torch.full((3,), timestep),
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=prediction_type,
    )
    assert_close(got, want, atol=1e-6, rtol=0)


def test_ddim_grid(alphas: Tensor) -> None:
    grid = diffusion.ddim_grid(alphas, 50)
    assert len(grid.timesteps) == 50
    assert grid.timesteps[[0, 1, -1]].tolist() == [19, 39, 999]
    assert grid.prev_timesteps[[0, 1, -1]].tolist() == [0, 19, 979]
    golden = torch.tensor([0.99915, 0.9822439910955454, 0.005912769761263195])
    assert_close(grid.alphas_prev[[0, 1, -1]], golden.double(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        diffusion.ddim_grid(alphas, 1001)


def test_grid_positions(alphas: Tensor) -> None:
    grid = diffusion.ddim_grid(alphas, 50)
    assert grid.positions(torch.tensor([999, 19, 519])).tolist() == [49, 0, 25]
    for outside in (20, 0, 1000):
        with pytest.raises(ValueError, match="DDIM grid"):
            grid.positions(torch.tensor([19, outside]))


def test_grid_step_reference_number(alphas: Tensor) -> None:
    step = diffusion.ddim_grid_step(
        wave(0, 1, 4, 2, 2),
        wave(1, 1, 4, 2, 2),
        torch.tensor([24]),
        diffusion.ddim_grid(alphas, 50),
    )
    assert step.sum().item() == pytest.approx(17.177305446949948, abs=1e-6)


@pytest.mark.parametrize("position", [0, 1, 30, 49])
def test_grid_step_equals_the_ddim_scheduler(position: int, ddim: DDIMScheduler) -> None:
    ddim.set_timesteps(50)
    grid = diffusion.ddim_grid(ddim.alphas_cumprod, 50)
    timesteps = grid.timesteps[position].repeat(3)
    state = (NOISE, timesteps, ddim.alphas_cumprod, "epsilon")
    got = diffusion.ddim_grid_step(
        diffusion.pred_x0(LATENTS, *state),
        diffusion.noise_pred(LATENTS, *state),
        grid.positions(timesteps),
        grid,
    )
    want = ddim.step(LATENTS, int(timesteps[0]), NOISE, eta=0.0).prev_sample
    assert_close(got, want, atol=1e-6, rtol=0)


def test_guidance_scale_embedding() -> None:
    embedding = diffusion.guidance_scale_embedding(torch.tensor([7.0, 0.0]), 256)
    golden = [0.5068854299491697, 0.8043868547938211, 0.8620134342951074, 0.5941058725807247]
    assert embedding.shape == (2, 256)
    assert_close(embedding[0, [0, 1, 128, 129]], torch.tensor(golden), atol=1e-6, rtol=0)
    assert embedding[1].tolist() == [0.0] * 128 + [1.0] * 128


@pytest.mark.parametrize("dim", [32, 256, 33])
def test_guidance_scale_embedding_equals_diffusers(dim: int) -> None:
    omega = torch.tensor([0.0, 4.0, 7.5, 14.0])
    official = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    want = official(None, omega, embedding_dim=dim, dtype=torch.float64)
    got = diffusion.guidance_scale_embedding(omega, dim)
    # diffusers rounds log(10000) to float32, which moves angles of 14000 radians by 2e-4.
    assert_close(got, want.float(), atol=5e-4, rtol=0)
