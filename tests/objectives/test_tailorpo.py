from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.diffusion import Transition, ddim_transition, transition_logp
from mmalign.objectives.d3po import d3po_loss
from mmalign.objectives.tailorpo import guided_latents, tailorpo_logratios

Wave = Callable[..., Tensor]
SHAPE = (2, 4, 2, 2)


def step(output: Tensor, noisy: Tensor, alphas: Tensor) -> Transition:
    """The steps 951 -> 901 and 1 -> alpha-bar of 0 of a grid of 20."""
    return ddim_transition(
        output,
        noisy,
        torch.tensor([951, 1]),
        alphas[[901, 0]],
        alphas_cumprod=alphas,
        prediction_type="epsilon",
        eta=1.0,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_forward_equals_two(reduction: str, wave: Wave, alphas: Tensor) -> None:
    """Per candidate its own forward of each network, as official SPO code does, and no identity."""
    noisy = wave(0, *SHAPE)

    def policy_net(x: Tensor) -> Tensor:
        return torch.sin(1.3 * x) + 0.01 * wave(2, *SHAPE)

    def ref_net(x: Tensor) -> Tensor:
        return torch.sin(1.3 * x)

    reference = step(ref_net(noisy), noisy, alphas)
    chosen, rejected = (reference.draw(wave(phase, *SHAPE)) for phase in (4, 5))
    policy = step(policy_net(noisy), noisy, alphas)
    got = tailorpo_logratios(chosen, rejected, policy, reference, reduction=reduction)
    for side, latents in zip(got, (chosen, rejected), strict=True):
        logps = [
            transition_logp(latents, step(net(noisy), noisy, alphas), reduction=reduction)
            for net in (policy_net, ref_net)
        ]
        assert_close(side, logps[0] - logps[1], atol=1e-12, rtol=1e-10)


def test_margin_is_an_inner_product_in_noise_space(wave: Wave, alphas: Tensor) -> None:
    noisy, noise = wave(0, *SHAPE), wave(1, *SHAPE)
    moved = noise + 0.01 * wave(2, *SHAPE)
    reference, policy = step(noise, noisy, alphas), step(moved, noisy, alphas)
    chosen, rejected = (reference.draw(wave(phase, *SHAPE)) for phase in (4, 5))
    ratios = tailorpo_logratios(chosen, rejected, policy, reference)
    now, prev = alphas[[951, 1]], alphas[[901, 0]]
    variance = reference.std.square()
    k = (1 - prev - variance).sqrt() - (prev * (1 - now) / now).sqrt()
    golden = torch.tensor([-0.549634475592, -0.020714165792], dtype=torch.float64)
    assert_close(k, golden, atol=1e-8, rtol=0)
    product = ((chosen - rejected) * (moved - noise)).flatten(1).mean(1)
    assert_close(ratios.chosen - ratios.rejected, k / variance * product, atol=1e-12, rtol=1e-9)


def test_reference_number(wave: Wave, alphas: Tensor) -> None:
    noisy, noise = wave(0, *SHAPE), wave(1, *SHAPE)
    reference = step(noise, noisy, alphas)
    policy = step(noise + 0.01 * wave(2, *SHAPE), noisy, alphas)
    chosen, rejected = (reference.draw(wave(phase, *SHAPE)) for phase in (4, 5))
    ratios = tailorpo_logratios(chosen, rejected, policy, reference)
    loss, _ = d3po_loss(ratios, beta=10, preference=PreferenceConfig(), clamp="both")
    assert loss.mean().item() == pytest.approx(0.707711754662849, abs=1e-6)


def test_only_the_policy_gets_a_gradient(wave: Wave, alphas: Tensor) -> None:
    noisy = wave(0, *SHAPE)
    outputs = [wave(phase, *SHAPE).requires_grad_() for phase in (1, 1.1)]
    policy, reference = (step(output, noisy, alphas) for output in outputs)
    candidates = [policy.draw(wave(phase, *SHAPE)) for phase in (4, 5)]
    ratios = tailorpo_logratios(*candidates, policy, reference)
    (ratios.chosen - ratios.rejected).sum().backward()
    assert outputs[1].grad is None
    # Through the mean alone: had the draws kept their graph, the terms would cancel.
    variance = reference.std.square().view(-1, 1, 1, 1)
    now, prev = (a.view(-1, 1, 1, 1) for a in (alphas[[951, 1]], alphas[[901, 0]]))
    k = (1 - prev - variance).sqrt() - (prev * (1 - now) / now).sqrt()
    want = k / variance * (candidates[0] - candidates[1]).detach() / 16
    assert_close(outputs[0].grad, want)


def test_guidance_moves_towards_the_target() -> None:
    latents = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]], requires_grad=True)
    rewards = latents.flatten(1).sum(1)
    moved = guided_latents(latents, rewards, 10.0, step_size=0.5)
    # Both elements have the same gradient; the reward grows by the step on each.
    assert_close(moved, latents.detach() + 0.5)
    assert not moved.requires_grad
    down = guided_latents(latents, latents.flatten(1).sum(1), -10.0, step_size=0.5)
    assert_close(down, latents.detach() - 0.5)


def test_guidance_without_a_gradient_changes_nothing() -> None:
    latents = torch.ones(2, 1, 1, 2, requires_grad=True)
    moved = guided_latents(latents, 0.0 * latents.flatten(1).sum(1), 1.0, step_size=0.5)
    assert_close(moved, latents.detach())
