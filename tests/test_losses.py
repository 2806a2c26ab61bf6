"""The losses against numbers worked out by hand, with their signs, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from course_lib.errors import CourseError
from course_lib.losses import (
    LOSS_INPUTS,
    LOSSES,
    check_settings,
    cross_entropy,
    dro,
    importance_sampling,
    ppo,
)

LN2 = math.log(2)


def loss_and_gradient(name, target_logprobs, config=None, **inputs):
    """Per-token loss and d(sum of losses) / d(target_logprobs), as lists."""
    lp = torch.tensor(target_logprobs, dtype=torch.float64, requires_grad=True)
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in inputs.items()}
    loss = LOSSES[name](lp, tensors, config or {})
    loss.sum().backward()
    return loss.tolist(), lp.grad.tolist()


def test_cross_entropy_is_minus_weight_times_logprob():
    loss, gradient = loss_and_gradient("cross_entropy", [-1.0, -2.0, -3.0], weights=[1, 0, 0.5])
    assert loss == [1.0, 0.0, 1.5]
    assert gradient == [-1.0, 0.0, -0.5]


def test_cross_entropy_takes_several_targets_for_a_position():
    lp = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = torch.tensor([[0.25, 1.5], [3.0, 0.0]])
    assert torch.equal(cross_entropy(lp, {"weights": weights}, {}), expected)


def test_importance_sampling_is_minus_ratio_times_advantage():
    loss, gradient = loss_and_gradient(
        "importance_sampling", [-1.0, -1.0 - LN2], logprobs=[-1.0, -1.0], advantages=[3.0, -2.0]
    )
    assert loss == pytest.approx([-3.0, 1.0])  # ratios 1 and 1/2
    assert gradient == pytest.approx([-3.0, 1.0])  # d(-r A)/d lp = -r A


def test_a_good_token_becomes_likelier_under_every_policy_loss():
    for name in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        _, gradient = loss_and_gradient(
            name, [-1.0, -1.0], logprobs=[-1.0, -1.0], advantages=[2.0, -2.0],
            sequence_ratio_mask=[1.0, 1.0],
        )  # fmt: skip
        assert gradient == pytest.approx([-2.0, 2.0]), name  # descent raises lp of the first


def test_ppo_equals_importance_sampling_inside_the_clip():
    inputs = {"logprobs": [-1.0, -1.1, -0.9], "advantages": [1.0, -2.0, 3.0]}
    inside = [-1.05, -1.0, -1.0]
    assert loss_and_gradient("ppo", inside, **inputs) == loss_and_gradient(
        "importance_sampling", inside, **inputs
    )


def test_ppo_stops_only_the_gradients_that_would_go_further_out():
    # ratio 2 (above 1.2) and 1/2 (below 0.8), each with a good and a bad advantage
    lp = [-1 + LN2, -1 + LN2, -1 - LN2, -1 - LN2]
    loss, gradient = loss_and_gradient("ppo", lp, logprobs=[-1.0] * 4, advantages=[1, -1, 1, -1])
    assert loss == pytest.approx([-1.2, 2.0, -0.5, 0.8])
    assert gradient == pytest.approx([0.0, 2.0, -0.5, 0.0])


def test_ppo_thresholds_come_from_the_config():
    config = {"clip_low_threshold": 0.6, "clip_high_threshold": 1.5}
    lp = [-1 + LN2, -1 - LN2]
    loss, _ = loss_and_gradient("ppo", lp, config, logprobs=[-1, -1], advantages=[1, -1])
    assert loss == pytest.approx([-1.5, 0.6])


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    lp = [-1 + math.log(8), -1 - LN2]  # ratios 8 and 1/2; the default range is 0 to 4
    loss, gradient = loss_and_gradient("cispo", lp, logprobs=[-1, -1], advantages=[2, -1])
    assert loss == pytest.approx([-4 * 2 * lp[0], 0.5 * lp[1]])
    assert gradient == pytest.approx([-8.0, 0.5])  # -clip(r) A: nothing flows through r


def test_cispo_gradient_is_that_of_importance_sampling_where_nothing_is_clipped():
    inputs = {"logprobs": [-1.0, -2.0], "advantages": [1.0, -2.0]}
    _, cispo_gradient = loss_and_gradient("cispo", [-1.3, -1.2], **inputs)
    _, ratio_gradient = loss_and_gradient("importance_sampling", [-1.3, -1.2], **inputs)
    assert cispo_gradient == pytest.approx(ratio_gradient)


def test_dro_pulls_back_to_the_sampler():
    loss, gradient = loss_and_gradient(
        "dro", [-1.0, -3.0], {"beta": 0.5}, logprobs=[-1.0, -1.0], advantages=[2.0, 0.0]
    )
    assert loss == pytest.approx([2.0, 0.25 * 4.0])  # -(A lp - beta/2 (lp - q)^2)
    assert gradient == pytest.approx([-2.0, 0.5 * -2.0])  # descent raises lp towards q


def test_dro_has_the_documented_beta():
    loss, _ = loss_and_gradient("dro", [-3.0], logprobs=[-1.0], advantages=[0.0])
    assert loss == pytest.approx([0.05 / 2 * 4.0])


def test_gspo_uses_one_ratio_for_the_sequence_and_each_tokens_own_gradient():
    lp, q = [-1.0, -2.0, -5.0], [-1.2, -2.0, -1.0]  # the last token is outside the mask
    loss, gradient = loss_and_gradient(
        "gspo", lp, logprobs=q, advantages=[1.0, -3.0, 0.0], sequence_ratio_mask=[1.0, 1.0, 0.0]
    )
    ratio = math.exp((0.2 + 0.0) / 2)
    assert loss == pytest.approx([-ratio, 3 * ratio, 0.0])
    assert gradient == pytest.approx([-ratio, 3 * ratio, 0.0])


def test_gspo_clips_the_whole_sequence():
    lp, q = [-1.0, -1.0], [-1.0 - LN2, -1.0 - LN2]  # s = 2 for both tokens
    loss, gradient = loss_and_gradient(
        "gspo", lp, logprobs=q, advantages=[1.0, 1.0], sequence_ratio_mask=[1.0, 1.0]
    )
    assert loss == pytest.approx([-1.2, -1.2])
    assert gradient == [0.0, 0.0]


@pytest.mark.parametrize(("ratio", "expected", "slope"), [(0.5, 0.8, 0.0), (2.0, 2.0, 2.0)])
def test_gspo_holds_a_bad_sequence_from_below_and_lets_it_come_back_from_above(
    ratio, expected, slope
):
    lp = [-1.0 + math.log(ratio)]
    loss, gradient = loss_and_gradient(
        "gspo", lp, logprobs=[-1.0], advantages=[-1.0], sequence_ratio_mask=[1.0]
    )
    assert loss == pytest.approx([expected])
    assert gradient == pytest.approx([slope])


def test_gspo_without_any_masked_token_is_not_divided_by_zero():
    loss, _ = loss_and_gradient(
        "gspo", [-1.0], logprobs=[-3.0], advantages=[1.0], sequence_ratio_mask=[0.0]
    )
    assert loss == [-1.0]


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_ratio_beyond_every_number_leaves_a_token_without_advantage_at_zero(name):
    """0 times infinity was NaN, and the whole request was refused."""
    loss, gradient = loss_and_gradient(
        name, [-1.0], {"clip_high_threshold": math.inf} if name == "cispo" else {},
        logprobs=[-1000.0], advantages=[0.0], sequence_ratio_mask=[1.0],
    )  # fmt: skip
    assert (loss, gradient) == ([0.0], [0.0])


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_the_clip_cuts_off_a_ratio_beyond_every_number(name):
    """Its loss was clipped, but its gradient NaN."""
    loss, gradient = loss_and_gradient(
        name, [-1.0], logprobs=[-1000.0], advantages=[2.0], sequence_ratio_mask=[1.0]
    )
    assert (loss, gradient) == ([-2.4], [0.0])
    loss, _ = loss_and_gradient(
        name, [-1.0], logprobs=[-1000.0], advantages=[-2.0], sequence_ratio_mask=[1.0]
    )
    assert loss == [math.inf]  # nothing holds a bad token from above: it is refused


def test_a_ratio_beyond_every_number_is_not_made_smaller_where_it_counts():
    loss, _ = loss_and_gradient(
        "importance_sampling", [-1.0, -1.0], logprobs=[-101.0, -1000.0], advantages=[1.0, 1.0]
    )
    assert loss == pytest.approx([-math.exp(100), -math.inf])


@pytest.mark.parametrize("name", LOSSES)
def test_padding_with_zeros_moves_no_other_token(name):
    inputs = {key: torch.tensor([0.5, -1.0]) for key in LOSS_INPUTS[name]}
    alone = LOSSES[name](torch.tensor([-1.0, -0.7]), inputs, {})
    rows = {key: torch.stack([torch.cat([v, torch.zeros(1)])] * 2) for key, v in inputs.items()}
    padded = LOSSES[name](torch.tensor([[-1.0, -0.7, -9.0]] * 2), rows, {})
    assert torch.allclose(padded[:, :2], torch.stack([alone] * 2))


@pytest.mark.parametrize("loss", [importance_sampling, ppo, dro])
def test_losses_without_a_detached_weight_agree_with_numerical_gradients(loss):
    generator = torch.Generator().manual_seed(0)
    lp = -torch.rand(5, generator=generator, dtype=torch.float64) - 0.5
    inputs = {
        "logprobs": lp + 0.1 * torch.randn(5, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(5, generator=generator, dtype=torch.float64),
        "sequence_ratio_mask": torch.ones(5, dtype=torch.float64),
    }
    assert torch.autograd.gradcheck(lambda x: loss(x, inputs, {}), lp.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_setting_is_refused_with_the_known_ones(name):
    inputs = {key: torch.ones(1) for key in LOSS_INPUTS[name]}
    with pytest.raises(CourseError, match="'clip_epsilon' is unknown; this loss takes"):
        LOSSES[name](torch.zeros(1), inputs, {"clip_epsilon": 0.2})


@pytest.mark.parametrize("value", ["0.2", None, math.nan, True])
def test_a_setting_that_is_no_number_is_refused(value):
    inputs = {"logprobs": torch.ones(1), "advantages": torch.ones(1)}
    with pytest.raises(CourseError, match="beta is"):
        dro(torch.zeros(1), inputs, {"beta": value})


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_crossed_clip_thresholds_are_refused(name: str):
    check_settings(name, {"clip_low_threshold": 1.0, "clip_high_threshold": 1.0})
    crossed = {"clip_low_threshold": 1.2, "clip_high_threshold": 0.8}
    with pytest.raises(CourseError, match=r"clip_low_threshold, 1\.2, lies above .* 0\.8"):
        check_settings(name, crossed)
    with pytest.raises(CourseError, match="lies above"):  # one of them against the loss's default
        check_settings(name, {"clip_low_threshold": 9.0})


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_checked_without_a_batch(name: str):
    check_settings(name, {})
    with pytest.raises(CourseError, match="'margin' is unknown"):
        check_settings(name, {"margin": 1.0})
