"""The sampling path: whoever walks it may stop, steer and predict in another way, and nobody else walks one."""

import ast
from pathlib import Path

import pytest
import torch

import memtrain
from memtrain.audit.sampling import SamplingPath, generate
from memtrain.models.samplers import Predictions
from tests.audit.conftest import PROMPTS

SEEDS, STEPS = [1, 2, 3], 4


def path_of(denoiser, **options) -> SamplingPath:
    guidance_scale = options.pop("guidance_scale", 3.0)
    return SamplingPath(denoiser, denoiser.noise(SEEDS), denoiser.encode(PROMPTS), guidance_scale, STEPS, **options)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def whole(denoiser):
    path = path_of(denoiser)
    return list(path), path.latents


def test_steps_follow_the_schedule_and_end_at_the_pictures(denoiser, whole):
    steps, end = whole
    assert [step.index for step in steps] == list(range(STEPS))
    assert [step.t for step in steps] == denoiser.model.sampler.timesteps(STEPS)
    assert torch.equal(steps[0].latents, denoiser.noise(SEEDS))
    assert torch.equal(end, generate(denoiser, denoiser.encode(PROMPTS), SEEDS, STEPS, 3.0))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_path_that_stops_is_the_beginning_of_the_whole_one(denoiser, whole, stop):
    path = path_of(denoiser, stop=stop)
    for step, expected in zip(path, whole[0], strict=False):
        for mine, whole_ones in zip(vars(step.predicted).values(), vars(expected.predicted).values(), strict=True):
            assert torch.equal(mine, whole_ones)
    assert step.index == stop - 1 and torch.equal(path.latents, whole[0][stop].latents)


def test_guidance_that_is_set_counts_from_this_step_on(denoiser, whole):
    path = path_of(denoiser)
    for step in path:
        if step.index == 1:
            path.weight = torch.tensor([3.0, 0.0, 3.0]).reshape(-1, 1, 1, 1)  # the second row: none
    unguided = path_of(denoiser)
    for step in unguided:
        unguided.weight = 0.0 if step.index >= 1 else 3.0
    assert torch.equal(path.latents[[0, 2]], whole[1][[0, 2]])
    torch.testing.assert_close(path.latents[1], unguided.latents[1])
    assert not torch.equal(path.latents[1], whole[1][1])


def test_another_prediction_stands_in(denoiser):
    asked = []

    def predict(index, t, latents):
        asked.append((index, t))
        return Predictions(*[torch.zeros_like(latents)] * 4)

    path = path_of(denoiser, predict=predict)
    sampler = denoiser.model.sampler
    assert all((step.predicted.magnitude == 0).all() for step in path)
    assert asked == list(enumerate(sampler.timesteps(STEPS)))
    alpha_bar = denoiser.model.noise_process.alphas_cumprod[asked[0][1]]
    last = (1 / alpha_bar).sqrt() * denoiser.noise(SEEDS)  # x_0 where no noise is seen
    final = sampler.scheduler.final_alpha_cumprod.sqrt()
    torch.testing.assert_close(path.latents, final * last)


def test_there_is_one_place_where_the_steps_of_a_path_are_made():
    places = []
    for file in Path(memtrain.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sampler.step"):
                places.append(file.name)
    assert places == ["sampling.py"]
