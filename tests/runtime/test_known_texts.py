"""Texts that were seen lately: not encoded again, and the same embeddings to the bit whatever came before."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import counting_pipe
from torch import Tensor

from hypersd import Pipeline
from hypersd.runtime.text import KEPT_TEXTS

FAMILIES = pytest.mark.parametrize("family", ["sd15", "sdxl"])
PROMPT, OTHER = "a photo of a cat", "blue dog"


@pytest.fixture
def counted(family: str, request: pytest.FixtureRequest) -> tuple[Pipeline, Mapping[str, Any]]:
    return counting_pipe(request.getfixturevalue(f"{family}_bundle"))


def encoder_runs(engines: Mapping[str, Any]) -> int:
    return sum(len(engine.rows) for name, engine in engines.items() if name.startswith("text_encoder"))


@FAMILIES
def test_a_known_prompt_runs_no_encoder_and_draws_the_same(counted: Any) -> None:
    """A service that generates one prompt under many seeds encodes it once."""
    pipe, engines = counted
    first = pipe(PROMPT, seed=1, output_type="np").images
    runs = encoder_runs(engines)
    assert runs > 0
    for seed, prompts in [(1, PROMPT), (2, PROMPT), (1, [PROMPT, PROMPT])]:
        again = pipe(prompts, seed=seed, output_type="np").images
    assert encoder_runs(engines) == runs
    assert np.array_equal(pipe(PROMPT, seed=1, output_type="np").images, first)
    assert not np.array_equal(again[:1], pipe(OTHER, seed=1, output_type="np").images)
    assert encoder_runs(engines) == 2 * runs


@FAMILIES
def test_a_prompts_embeddings_do_not_depend_on_its_company(counted: Any) -> None:
    """Alone, in a list, at any place, known or new: the same bits, so the same seed gives the same image."""
    pipe, _ = counted
    alone = pipe.encode_prompt([OTHER])
    lists = [[PROMPT, OTHER, ""], [OTHER, OTHER], ["red", OTHER]]
    fresh = Pipeline(pipe.manifest, pipe.engines, pipe.tokenizers)
    for maker in (pipe, fresh):
        for prompts in lists:
            rows = maker.encode_prompt(prompts)
            assert torch.equal(rows.hidden_states[1], alone.hidden_states[0])
            if alone.text_embeds is not None:
                assert torch.equal(rows.text_embeds[1], alone.text_embeds[0])


@FAMILIES
def test_what_a_caller_does_to_embeddings_stays_with_the_caller(counted: Any) -> None:
    """In place, on what ``encode_prompt`` returned and on what a callback was given."""
    pipe, _ = counted
    first = pipe(PROMPT, seed=1, output_type="np").images

    def spoil(_pipe: Any, _i: int, _t: int, tensors: dict[str, Tensor]) -> None:
        tensors["prompt_embeds"].zero_()

    pipe.encode_prompt([PROMPT]).map(Tensor.zero_)
    pipe(PROMPT, seed=1, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert np.array_equal(pipe(PROMPT, seed=1, output_type="np").images, first)


def test_the_least_recently_used_is_forgotten(sd15_bundle: Path) -> None:
    """Memory is bounded however many prompts a service sees."""
    pipe, engines = counting_pipe(sd15_bundle)
    pipe.encode_prompt([PROMPT])
    for i in range(KEPT_TEXTS - 1):
        pipe.encode_prompt([f"cat {i}"])
    runs = encoder_runs(engines)
    pipe.encode_prompt([PROMPT])
    assert encoder_runs(engines) == runs, "the oldest of those that fit"
    pipe.encode_prompt(["one more"])
    pipe.encode_prompt([PROMPT])
    assert encoder_runs(engines) == runs + 1, "it was used since"
    pipe.encode_prompt(["cat 0"])
    assert encoder_runs(engines) == runs + 2, "this one was not"


def test_more_prompts_than_are_kept_in_one_call(sd15_bundle: Path) -> None:
    """A call holds the embeddings of its own prompts."""
    pipe, engines = counting_pipe(sd15_bundle, "null")
    prompts = [f"cat {i}" for i in range(KEPT_TEXTS + 5)]
    assert len(pipe.encode_prompt(prompts).hidden_states) == len(prompts)
    assert encoder_runs(engines) == len(prompts)


@FAMILIES
def test_threads_share_what_is_known(counted: Any) -> None:
    """Services call from many threads: each gets the embeddings of its own prompt, however they meet."""
    pipe, _ = counted
    texts = [f"cat {i}" for i in range(6)]
    alone = {text: pipe.encode_prompt([text]).hidden_states for text in texts}
    fresh = Pipeline(pipe.manifest, pipe.engines, pipe.tokenizers)
    barrier = threading.Barrier(4)

    def work(i: int) -> bool:
        barrier.wait(60)
        order = texts[i:] + texts[:i]
        return all(torch.equal(fresh.encode_prompt([text]).hidden_states, alone[text]) for text in order * 3)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
