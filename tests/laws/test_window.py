"""A window has the law's steps inside, the deterministic ones outside, and a density only inside."""

import pytest
import torch

from diffalign.laws import DDIM, DDPM, FlowGRPONoise, FlowODE, FlowSDE, Law, Prediction, Schedule, Window
from tests.laws.problems import diffusion_levels, flow_levels

STEPS = torch.arange(10)


def prediction(schedule: Schedule, kind: str) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(10, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return Prediction(output, x, schedule.level(STEPS), kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("law", "outside", "schedule", "kind"),
    [
        (FlowSDE(FlowGRPONoise(0.7)), FlowODE(), flow_levels(10), "velocity"),
        (DDPM("fixed_large"), DDIM(0.0), diffusion_levels(10), "v_prediction"),
    ],
    ids=["flow", "diffusion"],
)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 5), (9, 10), (0, 10)])
def test_steps_inside_are_the_laws_and_outside_deterministic(
    law: Law, outside: Law, schedule: Schedule, kind: str, start: int, stop: int
) -> None:
    window, given, to = Window(law, schedule, start, stop), prediction(schedule, kind), schedule.target(STEPS)
    step, noisy, silent = window.step(given, to), law.step(given, to), outside.step(given, to)
    inside = (start <= STEPS) & (stop > STEPS)
    assert torch.equal(step.mean[inside], noisy.mean[inside])
    assert torch.equal(step.std[inside], noisy.std[inside])
    assert torch.equal(step.mean[~inside], silent.mean[~inside])
    assert torch.equal(window.stds(schedule), step.std)
    # The last step of DDPM leads to sigma = 0 and is deterministic in any window.
    assert torch.equal(step.std > 0, inside & (noisy.std > 0))
    assert noisy.std[:-1].gt(0).all()


def test_levels_rounded_to_fp32_stay_on_their_side() -> None:
    schedule = diffusion_levels(1000)
    window, steps = Window(DDIM(1.0), schedule, 300, 301), torch.arange(1000)
    level, to = (
        type(at)(at.alpha.float(), at.sigma.float(), at.timestep.float())
        for at in (schedule.level(steps), schedule.target(steps))
    )
    assert (window.std(level, to) > 0).nonzero().flatten().tolist() == [300]


def test_what_a_window_cannot_be_is_refused() -> None:
    for start, stop in ((3, 3), (-1, 2), (4, 11)):
        with pytest.raises(ValueError, match=rf"window of steps {start} to {stop} of 10: use 0 <= start < stop <= 10"):
            Window(FlowSDE(), flow_levels(10), start, stop)
    with pytest.raises(ValueError, match=r"Window\(FlowSDE.*no law of a diffusion schedule, only of flow"):
        Window(FlowSDE(), flow_levels(10), 2, 5).stds(diffusion_levels(10))
    with pytest.raises(ValueError, match=r"FlowSDE\(.*no law of a diffusion schedule"):
        Window(FlowSDE(), diffusion_levels(10), 2, 5)
