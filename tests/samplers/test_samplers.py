"""The samplers against diffusers: same seed, same image, to the bit; and the arguments that they reject.

The network is a smooth function of the sample and the timestep, so that a wrong timestep, coefficient or random number
shows in the last latents.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.errors import RequestError
from hypersd.samplers import Sampler, make_sampler
from hypersd.samplers.loop import draw_noise, sample
from hypersd.samplers.noise import randn
from hypersd.samplers.schedule import alphas_cumprod
from hypersd.samplers.step import stacked_coefficients

SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "tcd": TCDScheduler, "lcm": LCMScheduler}
KINDS = list(SCHEDULERS)
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
TRAILING = {**SD, "timestep_spacing": "trailing"}
ZERO_SNR = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
CONFIGS = {
    "diffusers-default": {},
    "stable-diffusion": SD,
    "trailing": TRAILING,
    "linspace": {**SD, "timestep_spacing": "linspace"},
    "alpha-to-one": {**TRAILING, "set_alpha_to_one": True},
    "clipped": {**TRAILING, "clip_sample": True, "clip_sample_range": 0.7},
    "zero-snr": ZERO_SNR,
    "trained-betas": {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    "few-timesteps": {"num_train_timesteps": 200, "original_inference_steps": 30, "timestep_scaling": 5.0},
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
ETAS = {"ddim": [0.0, 0.3, 1.0], "tcd": [0.0, 0.3, 1.0], "lcm": [None]}
KIND_ETA = [(kind, eta) for kind, etas in ETAS.items() for eta in etas]
SHAPE = (2, 4, 8, 8)


def denoise(sample: Tensor, t: int | Tensor) -> Tensor:
    """A network without weights: smooth, nonlinear, and different at every timestep."""
    return torch.tanh(0.8 * sample + float(t) / 700) + 0.2 * torch.sin(3 * sample)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(
    sampler: Sampler,
    denoise: Any,
    latents: Tensor,
    *,
    generator: Any = None,
    noises: Any = None,
    callback: Any = None,
    **steps: Any,
) -> Tensor:
    """All of the steps that were asked for."""
    plan = sampler.plan(**steps)
    return sample(denoise, latents, plan, generator=generator, noises=noises, callback=callback)


def diffusers_scheduler(kind: str, config: dict[str, Any]) -> Any:
    return SCHEDULERS[kind].from_config(config)


def diffusers_sample(
    kind: str, config: dict[str, Any], latents: Tensor, generator: Any, *, eta: float | None = None, **steps: Any
) -> Tensor:
    """The loop of diffusers' pipelines."""
    scheduler = diffusers_scheduler(kind, config)
    scheduler.set_timesteps(**steps)
    options = {"generator": generator} | ({} if eta is None else {"eta": eta})
    for t in scheduler.timesteps:
        latents = scheduler.step(denoise(latents, t), t, latents, **options, return_dict=False)[0]
    return latents


def assert_same_image(
    kind: str, config: dict[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0, **request: Any
) -> None:
    """Twin generators, one for diffusers and one here: equal latents and equally many numbers drawn."""
    ours, theirs = seeded(seed), seeded(seed)
    latents = randn(SHAPE, generator=ours, device="cpu", dtype=dtype)
    expected = diffusers_sample(
        kind, config, randn_tensor(SHAPE, generator=theirs, dtype=dtype), generator=theirs, **request
    )
    actual = run(make_sampler(kind, **config), denoise, latents, generator=ours, **request)
    assert expected.isfinite().all()
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(ours.get_state(), theirs.get_state())


# Same image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("base", ["diffusers-default", "stable-diffusion", "trailing"])
@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_seed_for_seed(kind: str, eta: float | None, base: str, prediction_type: str, dtype: torch.dtype) -> None:
    """Protects the promise: a seed gives diffusers' image, at every step count, prediction type and precision."""
    for n in range(1, 17):
        config = {**CONFIGS[base], "prediction_type": prediction_type}
        assert_same_image(kind, config, dtype=dtype, seed=n, num_inference_steps=n, eta=eta)


@given(
    kind_eta=st.sampled_from(KIND_ETA),
    config=st.sampled_from(list(CONFIGS.values())),
    prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    n=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_of_tensors_gives_the_same_bits(
    kind_eta: tuple[str, float | None], config: dict[str, Any], prediction_type: str, dtype: torch.dtype, n: int
) -> None:
    """Protects recorded graphs, whose coefficients are inputs."""
    kind, eta = kind_eta
    sampler = make_sampler(kind, **{**config, **({} if config is ZERO_SNR else {"prediction_type": prediction_type})})
    plan = sampler.plan(n, eta=eta)
    timesteps, noisy = [torch.tensor([float(step.t)]) for step in plan], [step.noisy for step in plan]
    of_tensors = sampler.steps_from(timesteps, stacked_coefficients(plan), noisy)
    latents = torch.randn(SHAPE, generator=seeded()).to(dtype)
    images = [sample(denoise, latents, each, generator=seeded(n)) for each in (plan, of_tensors)]
    assert images[0].isfinite().all()
    assert images[0].dtype == images[1].dtype
    assert torch.equal(*images)


@pytest.mark.parametrize("base", ["diffusers-default", "stable-diffusion", "trailing"])
@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_a_run_that_starts_later_is_the_end_of_the_whole_one(kind: str, eta: float | None, base: str) -> None:
    """Protects image-to-image: coefficients are those of the whole schedule, as in diffusers' `get_timesteps`."""
    config = CONFIGS[base]
    for n in (2, 3, 4, 7, 8, 12):
        for first in range(n):
            scheduler, theirs = diffusers_scheduler(kind, config), seeded(n)
            scheduler.set_timesteps(n)
            expected = latents = torch.randn(SHAPE, generator=seeded(first))
            options = {"generator": theirs} | ({} if eta is None else {"eta": eta})
            for t in scheduler.timesteps[first:]:
                expected = scheduler.step(denoise(expected, t), t, expected, **options, return_dict=False)[0]
            plan, ours = make_sampler(kind, **config).plan(n, eta=eta), seeded(n)
            assert torch.equal(sample(denoise, latents, plan[first:], generator=ours), expected), (n, first)
            assert torch.equal(ours.get_state(), theirs.get_state())


@EVERY_CONFIG
@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_every_setting_changes_the_image_as_in_diffusers(kind: str, eta: float | None, config: dict) -> None:
    """Protects each scheduler setting: spacing, clipping, last alpha, zero terminal SNR, trained betas."""
    # With zero terminal SNR, eta 1 and a first timestep of 999, diffusers' DDIM is nan: see the test below.
    eta = 0.9 if config is ZERO_SNR and kind == "ddim" and eta == 1 else eta
    for n in (1, 2, 3, 4, 7, 8, 12):
        assert_same_image(kind, config, num_inference_steps=n, eta=eta)


def test_zero_snr_with_full_noise_is_never_nan() -> None:
    """Protects from a black image: below zero by rounding, the root in diffusers' DDIM is nan at eta 1."""
    for n in range(1, 51):
        latents = torch.randn(SHAPE, generator=seeded(n))
        ours = run(make_sampler("ddim", **ZERO_SNR), denoise, latents, num_inference_steps=n, eta=1.0)
        assert ours.isfinite().all()


@pytest.mark.parametrize("timesteps", [[800], [999], [0], [999, 500, 20], [999, 759, 499, 259], [600, 5, 0]], ids=str)
@pytest.mark.parametrize(("kind", "eta"), [(kind, eta) for kind, eta in KIND_ETA if kind != "ddim"])
def test_custom_timesteps(kind: str, eta: float | None, timesteps: list[int]) -> None:
    """Protects Hyper-SD's one-step SDXL UNet, which is made for timestep 800, and any other custom schedule."""
    for dtype in (torch.float32, torch.float16):
        assert_same_image(kind, SD, dtype=dtype, timesteps=timesteps, eta=eta)
    assert make_sampler(kind, **SD).timesteps(timesteps=timesteps) == timesteps


@pytest.mark.parametrize("eta", [0.3, 0.8, 0.9])
def test_tcd_floors_in_float32(eta: float) -> None:
    """Protects TCD's (1 - eta) * t: at these timesteps a float64 product is floored to one timestep less."""
    for t in (90, 170, 350, 650) if eta == 0.3 else (10, 20, 50, 60):
        assert_same_image("tcd", SD, timesteps=[999, t], eta=eta)


DESCENDING = st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True).map(lambda ts: sorted(ts, reverse=True))


@settings(max_examples=80, deadline=None)
@given(timesteps=DESCENDING, eta=st.floats(0, 1), kind=st.sampled_from(["tcd", "lcm"]))
def test_any_custom_timesteps_and_eta(timesteps: list[int], eta: float, kind: str) -> None:
    """Protects every custom schedule, on or off the one that was distilled."""
    assert_same_image(kind, SD, timesteps=timesteps, eta=eta if kind == "tcd" else None)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 60), eta=st.floats(0, 1), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_ddim_any_steps_and_eta(n: int, eta: float, spacing: str) -> None:
    """Protects DDIM's previous timestep, a stride away and not the next one listed."""
    assert_same_image("ddim", {**SD, "timestep_spacing": spacing}, num_inference_steps=n, eta=eta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sample_dtype", "output_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)]
)
def test_network_in_another_precision(kind: str, sample_dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    """Protects the dtype that noise is drawn in: DDIM takes the network's, TCD and LCM the new sample's."""
    eta = None if kind == "lcm" else 1.0
    scheduler = diffusers_scheduler(kind, TRAILING)
    scheduler.set_timesteps(4)
    expected, theirs, ours = torch.randn(SHAPE, generator=seeded()).to(sample_dtype), seeded(1), seeded(1)
    latents = expected.clone()
    for t in scheduler.timesteps:
        options = {"generator": theirs} | ({} if eta is None else {"eta": eta})
        expected = scheduler.step(denoise(expected, t).to(output_dtype), t, expected, **options).prev_sample
    actual = run(
        make_sampler(kind, **TRAILING),
        lambda x, t: denoise(x, t).to(output_dtype),
        latents,
        num_inference_steps=4,
        eta=eta,
        generator=ours,
    )
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Schedules


@EVERY_CONFIG
@pytest.mark.parametrize("kind", KINDS)
def test_alphas_cumprod_to_the_bit(kind: str, config: dict) -> None:
    """Protects the table that every coefficient comes from, and the defaults that differ between the three."""
    ours, theirs = alphas_cumprod(make_sampler(kind, **config).config), diffusers_scheduler(kind, config).alphas_cumprod
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@EVERY_CONFIG
@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_diffusers(kind: str, config: dict) -> None:
    """Protects the rounding of every schedule; 48 trailing steps catch all but diffusers' own way of adding up."""
    sampler, scheduler = make_sampler(kind, **config), diffusers_scheduler(kind, config)
    for n in range(1, 51 if config.get("num_train_timesteps") is None else 31):
        scheduler.set_timesteps(n)
        assert sampler.timesteps(n) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_no_ddim_schedule_leaves_the_range(spacing: str) -> None:
    """Protects the network from timestep -1, at which diffusers' 61 trailing steps end, one step too many."""
    sampler = make_sampler("ddim", **{**SD, "timestep_spacing": spacing})
    for n in range(1, 1001):
        timesteps = sampler.timesteps(n)
        assert len(timesteps) == n
        assert timesteps[-1] >= 0


def test_published_timesteps() -> None:
    """Protects the two schedules that are most easily taken for one another."""
    assert make_sampler("tcd", **TRAILING).timesteps(4) == [999, 759, 499, 259]
    assert make_sampler("ddim", **TRAILING).timesteps(4) == [999, 749, 499, 249]


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 2000),
    original=st.integers(1, 100),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    data=st.data(),
)
def test_timesteps_descend_within_range(kind: str, total: int, original: int, spacing: str, data: Any) -> None:
    """Protects the network from a timestep it was not trained on, and DDIM from a step that goes nowhere."""
    assume(kind == "ddim" or original <= total)
    config = {"num_train_timesteps": total, "original_inference_steps": original, "timestep_spacing": spacing}
    n = data.draw(st.integers(1, total if kind == "ddim" else original))
    timesteps = make_sampler(kind, **config).timesteps(n)
    assert len(timesteps) == n
    assert all(type(t) is int and 0 <= t < total for t in timesteps)
    assert all(a > b for a, b in pairwise(timesteps))


@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_config_that_diffusers_writes(kind: str) -> None:
    """Protects bundles whose scheduler constants were copied whole from diffusers' `scheduler.config`."""
    sampler = make_sampler(kind, **diffusers_scheduler(kind, TRAILING).config)
    assert sampler == make_sampler(kind, **TRAILING)
    assert make_sampler(kind, **SCHEDULERS[kind]().config) == make_sampler(kind)


# Noise


@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_a_generator_for_each_sample(kind: str, eta: float | None) -> None:
    """Protects batches: an image made beside others is the image made alone."""
    latents = torch.randn(SHAPE, generator=seeded())
    generators, twins = [seeded(1), seeded(2)], [seeded(1), seeded(2)]
    expected = diffusers_sample(kind, SD, latents, twins, num_inference_steps=4, eta=eta)
    sampler = make_sampler(kind, **SD)
    actual = run(sampler, denoise, latents, num_inference_steps=4, eta=eta, generator=generators)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    alone = run(sampler, denoise, latents[1:], num_inference_steps=4, eta=eta, generator=seeded(2))
    torch.testing.assert_close(actual[1:], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [True, False], ids=["list-of-one", "global"])
def test_one_generator_for_the_batch(kind: str, listed: bool) -> None:
    """Protects the other two forms: a list of one, and torch's global stream."""
    latents = torch.randn(SHAPE, generator=seeded())
    eta = None if kind == "lcm" else 1.0
    torch.manual_seed(5)
    expected = diffusers_sample(kind, SD, latents, [seeded(3)] if listed else None, num_inference_steps=3, eta=eta)
    torch.manual_seed(5)
    generator = [seeded(3)] if listed else None
    actual = run(make_sampler(kind, **SD), denoise, latents, num_inference_steps=3, eta=eta, generator=generator)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("listed", [False, True], ids=["one-generator", "one-a-sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_noise_drawn_ahead_is_the_noise_of_the_loop(
    kind: str, eta: float | None, dtype: torch.dtype, listed: bool
) -> None:
    """Protects seeds under CUDA graphs, where every number is drawn before the first step: same numbers, same order."""
    sampler = make_sampler(kind, **TRAILING)
    for n in range(1, 13):
        request: dict[str, Any] = {"num_inference_steps": n, "eta": eta}
        ours, theirs = ([seeded(n), seeded(n + 99)] if listed else seeded(n) for _ in range(2))
        latents = randn(SHAPE, generator=ours, device="cpu", dtype=dtype)
        randn(SHAPE, generator=theirs, device="cpu", dtype=dtype)
        noises = draw_noise(latents, sampler.plan(**request), generator=ours)
        actual = run(sampler, denoise, latents, noises=noises, generator=None, **request)
        assert torch.equal(actual, run(sampler, denoise, latents, generator=theirs, **request))
        pairs = zip(ours, theirs, strict=True) if listed else [(ours, theirs)]
        assert all(torch.equal(one.get_state(), other.get_state()) for one, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16])
def test_noise_drawn_ahead_for_a_network_in_another_precision(
    kind: str, sample_dtype: torch.dtype, output_dtype: torch.dtype
) -> None:
    """Protects the dtype rule of each sampler: float16 noise is not float32 noise rounded."""
    sampler, latents = make_sampler(kind, **TRAILING), torch.randn(SHAPE, generator=seeded()).to(sample_dtype)
    request: dict[str, Any] = {"num_inference_steps": 4, "eta": None if kind == "lcm" else 1.0}

    def network(sample: Tensor, t: int) -> Tensor:
        return denoise(sample, t).to(output_dtype)

    noises = draw_noise(latents, sampler.plan(**request), generator=seeded(3), output_dtype=output_dtype)
    actual = run(sampler, network, latents, noises=noises, **request)
    assert torch.equal(actual, run(sampler, network, latents, generator=seeded(3), **request))


def test_noise_of_other_steps_is_refused() -> None:
    """Protects from an image with a step's noise missing, or of a schedule that was not asked for."""
    sampler, latents = make_sampler("tcd", **SD), torch.zeros(SHAPE)
    noises = draw_noise(latents, sampler.plan(3, eta=1.0), generator=seeded())
    for request in ({"num_inference_steps": 4, "eta": 1.0}, {"num_inference_steps": 3, "eta": 0.0}):
        with pytest.raises(RequestError, match="noises: expected the output of draw_noise"):
            run(sampler, pytest.fail, latents, noises=noises, **request)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    each=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_randn_is_randn_tensor(shape: list[int], each: bool, dtype: torch.dtype) -> None:
    """Protects the numbers themselves, for every shape and dtype."""
    ours, theirs = ([seeded(i) for i in range(shape[0])] if each else seeded() for _ in range(2))
    expected = randn_tensor(tuple(shape), generator=theirs, device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(randn(shape, generator=ours, device="cpu", dtype=dtype), expected)


def test_cpu_generator_draws_on_the_cpu_for_another_device() -> None:
    """Protects one seed, one image on every device: the numbers come from the CPU's stream, then move."""
    ours, theirs = seeded(), seeded()
    assert randn(SHAPE, generator=ours, device="meta", dtype=torch.float16).device.type == "meta"
    torch.randn(SHAPE, generator=theirs, dtype=torch.float16)
    assert torch.equal(ours.get_state(), theirs.get_state())


@given(eta=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_tcd_in_one_step_draws_nothing(eta: float) -> None:
    """Protects one-step images: eta plays no part, and the generator stays where it was."""
    sampler, generator, latents = make_sampler("tcd", **SD), seeded(), torch.randn(SHAPE, generator=seeded(1))
    before = generator.get_state()
    image = run(sampler, denoise, latents, num_inference_steps=1, eta=eta, generator=generator)
    assert torch.equal(image, run(sampler, denoise, latents, num_inference_steps=1))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("generator_device", ["cpu", "cuda"])
@pytest.mark.parametrize(("kind", "eta"), KIND_ETA)
def test_seed_for_seed_on_cuda(kind: str, eta: float | None, generator_device: str) -> None:
    """Protects the image on a GPU, from either device's generator; the float16 step may round once differently."""
    for n in (1, 2, 4, 8):
        ours, theirs = (torch.Generator(generator_device).manual_seed(n) for _ in range(2))
        latents = torch.randn(SHAPE, generator=seeded(), dtype=torch.float16).cuda()
        steps = {"num_inference_steps": n, "device": "cuda"}
        expected = diffusers_sample(kind, TRAILING, latents, theirs, eta=eta, **steps)
        actual = run(make_sampler(kind, **TRAILING), denoise, latents, num_inference_steps=n, eta=eta, generator=ours)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(ours.get_state(), theirs.get_state())


# The loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_network_may_reuse_its_output_buffer(kind: str, prediction_type: str) -> None:
    """Protects engines that own their buffers: output is read before the next call, input latents are not written."""
    sampler, buffer = make_sampler(kind, **{**SD, "prediction_type": prediction_type}), torch.empty(SHAPE)
    latents = torch.randn(SHAPE, generator=seeded())
    untouched = latents.clone()
    request = {"num_inference_steps": 4, "eta": 1.0}
    expected = run(sampler, denoise, latents, generator=seeded(), **request)
    actual = run(sampler, lambda x, t: buffer.copy_(denoise(x, t)), latents, generator=seeded(), **request)
    buffer.fill_(float("nan"))
    assert torch.equal(actual, expected)
    assert torch.equal(latents, untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_callback_sees_every_step_and_may_replace_the_latents(kind: str) -> None:
    """Protects the hook that previews and edits hang on."""
    sampler, seen, given_to_network = make_sampler(kind, **SD), [], []

    def callback(i: int, t: int, latents: Tensor) -> Tensor | None:
        seen.append((i, t))
        return torch.zeros_like(latents) if i == 1 else None

    def network(sample: Tensor, t: int) -> Tensor:
        given_to_network.append(sample)
        return denoise(sample, t)

    run(sampler, network, torch.ones(SHAPE), num_inference_steps=3, callback=callback, generator=seeded())
    assert seen == list(enumerate(sampler.timesteps(3)))
    assert given_to_network[1].any()
    assert not given_to_network[2].any()


def test_one_sampler_serves_many_threads() -> None:
    """Protects services: no state is shared between calls."""
    sampler = make_sampler("tcd", **SD)

    def image(job: int) -> Tensor:
        latents = torch.randn(SHAPE, generator=seeded(job))
        return run(sampler, denoise, latents, num_inference_steps=1 + job % 8, eta=1.0, generator=seeded(job))

    with ThreadPoolExecutor(4) as pool:
        for expected, actual in zip(map(image, range(64)), pool.map(image, range(64)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_stay_on_the_cpu(kind: str) -> None:
    """Protects latency: a coefficient on the GPU would cost a copy, and torch's default device must not decide."""
    with torch.device("meta"):
        plan = make_sampler(kind, num_train_timesteps=999).plan(4)
    tensors = [value for step in plan for value in vars(step).values() if isinstance(value, Tensor)]
    assert {(value.device.type, value.dtype, value.ndim) for value in tensors} == {("cpu", torch.float32, 0)}


def test_plan_tells_where_noise_is_drawn() -> None:
    """Protects callers that draw the noise ahead, for a captured graph."""
    for kind, eta, expected in [
        ("ddim", 0.0, [False] * 3),
        ("ddim", 0.5, [True] * 3),
        ("tcd", 0.0, [False] * 3),
        ("tcd", None, [True, True, False]),
        ("lcm", None, [True, True, False]),
    ]:
        assert [step.noisy for step in make_sampler(kind, **SD).plan(3, eta=eta)] == expected


# Rejected arguments


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        ("euler", {}, "'euler'.*ddim or tcd or lcm"),
        ("ddim", {"skip_prk_steps": True, "foo": 1}, "foo, skip_prk_steps.*supported are.*beta_start"),
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2.*linear or scaled_linear"),
        ("tcd", {"prediction_type": "flow"}, "'flow'.*epsilon or sample or v_prediction"),
        ("ddim", {"timestep_spacing": ["trailing"]}, "trailing.*leading"),
        ("lcm", {"num_train_timesteps": 0}, "num_train_timesteps=0.*from 1 to 100000"),
        ("lcm", {"num_train_timesteps": 1000.0}, "num_train_timesteps=1000.0"),
        ("lcm", {"original_inference_steps": 2000}, "original_inference_steps=2000.*1000"),
        ("tcd", {"beta_start": 0}, "beta_start=0"),
        ("tcd", {"beta_end": "0.012"}, "beta_end='0.012'"),
        ("tcd", {"clip_sample": "false"}, "clip_sample='false'.*true or false"),
        ("tcd", {"clip_sample_range": float("nan")}, "clip_sample_range=nan"),
        ("tcd", {"timestep_scaling": -1}, "timestep_scaling=-1"),
        ("ddim", {"steps_offset": -1}, "steps_offset=-1"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values.*1000"),
        ("ddim", {"trained_betas": [0.1, "x"]}, "trained_betas"),
        ("ddim", {"trained_betas": 3}, "trained_betas"),
    ],
)
def test_bad_config(kind: str, config: dict[str, Any], told: str) -> None:
    """Protects from a setting that is ignored, which would give another image without a word."""
    with pytest.raises(RequestError, match=told) as error:
        make_sampler(kind, **config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "request_", "told"),
    [
        ("tcd", {}, "exactly one"),
        ("tcd", {"num_inference_steps": 1, "timesteps": [999]}, "exactly one"),
        ("ddim", {"timesteps": [999, 500]}, "ddim sampler takes num_inference_steps only"),
        *[("tcd", {"num_inference_steps": n}, "1 to 50") for n in (0, -1, 51, True, 2.0, "4")],
        ("ddim", {"num_inference_steps": 1001}, "1 to 1000"),
        ("ddim", {"num_inference_steps": 1000}, "timestep 1000, expected at most 999"),
        *[
            ("lcm", {"timesteps": timesteps}, "strictly descending integers from 999 to 0")
            for timesteps in ([], [1000], [-1], [5, 5], [5, 9], [9.0], [True], 800, "9")
        ],
        *[
            ("tcd", {"num_inference_steps": 1, "eta": eta}, "eta .*0 to 1")
            for eta in (-0.1, 1.1, float("nan"), float("inf"), "1", True)
        ],
    ],
)
def test_bad_request(kind: str, request_: dict[str, Any], told: str) -> None:
    """Protects callers: the message is one line and says what was expected; the network is never called."""
    with pytest.raises(RequestError, match=told) as error:
        run(make_sampler(kind, **SD), pytest.fail, torch.zeros(SHAPE), **request_)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("generator", "told"),
    [([seeded()] * 3, "list of 3 for a batch of 2"), ([], "list of 0 for a batch of 2"), (42, "42.*torch.Generator")],
)
def test_bad_generator(generator: Any, told: str) -> None:
    """Protects from a list that diffusers would use in part: every sample has its generator, or all share one."""
    with pytest.raises(RequestError, match=told):
        randn(SHAPE, generator=generator, device="cpu", dtype=torch.float32)


def test_epsilon_has_no_image_at_zero_snr() -> None:
    """Protects from a division by zero: diffusers' image is all nan."""
    sampler = make_sampler("tcd", **{**ZERO_SNR, "prediction_type": "epsilon"})
    with pytest.raises(RequestError, match=r"timestep 999 is pure noise.*v_prediction"):
        sampler.plan(4)
    assert sampler.plan(timesteps=[800])
