"""Prompts: the same tokens, the same embeddings and the same words on what was cut as diffusers with transformers."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import null_pipe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer

from hypersd import Pipeline
from hypersd.errors import BundleError, RequestError
from hypersd.runtime.text import ClipTokenizer, TextConditioner, TruncationWarning

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
LONG = "a photo of the red cat with the blue dog " * 12
NASTY = [
    "",
    " ",
    "\t\n \r\n",
    "a photo of a cat",
    "A  PHOTO\tof\na   Cat ",
    "it's the cat's don't we'll they've I'm",
    "hello!!! cat! !dog ! ! !",
    "1234567890 3.14 1,000",
    "猫的照片,红色的狗。",
    "ネコ ねこ 고양이 قطة חתול",
    "🐈 cat 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "e\u0301 é ﬁ Å Å ½ ①",
    "\u0300\u0301\u0302 combining alone",
    "İstanbul straße ΣΑΣ ǅ",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f",
    "zero\u200bwidth\u200djoin\ufeffbom\u2028line\u00a0space",
    "<|startoftext|> cat <|endoftext|> dog",
    "<|endoftext|><|endoftext|>",
    "&amp; &lt;b&gt; <html>",
    "\U0010ffff \uffff \ue000",
    "cat" * 100,
    "x " * 75,
    "x " * 76,
    LONG,
    "🐈" * 200,
    "!" * 200,
]


@pytest.fixture(scope="session")
def tokenizer_pairs(
    tiny_repos: Path, sd15_bundle: Path, sdxl_bundle: Path
) -> list[tuple[ClipTokenizer, CLIPTokenizer]]:
    """The bundles' tokenizers, each with transformers' own of the folder that it was made from."""
    places = [(sd15_bundle, SD15, "tokenizer"), (sdxl_bundle, SDXL, "tokenizer"), (sdxl_bundle, SDXL, "tokenizer_2")]
    return [
        (ClipTokenizer(bundle / name / "tokenizer.json"), CLIPTokenizer.from_pretrained(tiny_repos / repo / name))
        for bundle, repo, name in places
    ]


@pytest.fixture(scope="session")
def null_pipes(sd15_bundle: Path, sdxl_bundle: Path) -> dict[str, Pipeline]:
    """Pipelines whose networks compute nothing: what happens to the prompt before them."""
    return {"sd15": null_pipe(sd15_bundle), "sdxl": null_pipe(sdxl_bundle)}


def transformers_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """As diffusers' pipelines call it."""
    return tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def words_cut(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The text that diffusers' pipelines report as cut off."""
    ids = tokenizer(prompt, padding="longest", return_tensors="pt").input_ids
    return tokenizer.batch_decode(ids[:, tokenizer.model_max_length - 1 : -1])[0]


def squeezed(text: str) -> str:
    """Without what tokens do not carry: case and white space."""
    return "".join(text.lower().split())


def warnings_of(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [warning for warning in caught if issubclass(warning.category, TruncationWarning)]


# Tokens


@pytest.mark.parametrize("prompt", NASTY, ids=lambda prompt: ascii(prompt[:20]))
def test_nasty_prompts_have_transformers_tokens(prompt: str, tokenizer_pairs: Any) -> None:
    """Protects parity of every image at its root: normalisation, merges, special tokens, truncation, padding."""
    for ours, theirs in tokenizer_pairs:
        ids, _ = ours([prompt])
        assert ids.shape == (1, 77)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, transformers_ids(theirs, [prompt]))


@settings(max_examples=150)
@given(prompts=st.lists(st.text(max_size=120) | st.text("aàeé\u0301 !'<|>中🐈\n", max_size=60), min_size=1, max_size=3))
@example(prompts=["cat", "", LONG])
def test_any_prompts_have_transformers_tokens(prompts: list[str], tokenizer_pairs: Any) -> None:
    """The same for whatever can be typed, in batches: a row does not depend on its neighbours."""
    for ours, theirs in tokenizer_pairs:
        assert torch.equal(ours(prompts)[0], transformers_ids(theirs, prompts))


def test_sdxls_tokenizers_pad_differently(tokenizer_pairs: Any) -> None:
    """The second tokenizer pads with "!" where the first pads with the end token: a mix-up would show in no shape."""
    ids = [ours(["cat"])[0][0] for ours, _ in tokenizer_pairs[1:]]
    assert torch.equal(ids[0][:3], ids[1][:3])
    assert (ids[0][3:] == ids[0][2]).all()
    assert (ids[1][3:] == 0).all()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_prompts_that_no_tokenizer_can_read_are_refused(family: str, null_pipes: dict[str, Pipeline]) -> None:
    """A byte that is no text on the command line arrives as a lone surrogate: bad input, not a crash."""
    for prompt in ("\udcff", "cat \ud800 dog"):
        with pytest.raises(RequestError, match="prompt") as caught:
            null_pipes[family](prompt, seed=0)
        assert "\n" not in str(caught.value)
        with pytest.raises(RequestError, match="negative_prompt"):
            null_pipes[family]("cat", negative_prompt=prompt, guidance_scale=2.0, seed=0)


def test_a_missing_tokenizer_file_is_a_bundle_error(tmp_path: Path) -> None:
    """The file may vanish after the bundle's check."""
    with pytest.raises(BundleError, match="absent") as caught:
        ClipTokenizer(tmp_path / "absent.json")
    assert "\n" not in str(caught.value)


# Truncation


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "prompt",
    ["x " * 75 + "cat", "a photo of " * 30 + "the red dog", "red! " * 60, "x " * 76 + "!!!", LONG],
    ids=lambda prompt: prompt[-8:],
)
def test_what_is_cut_is_named_once_as_diffusers_names_it(
    family: str, prompt: str, null_pipes: dict[str, Pipeline], tokenizer_pairs: Any
) -> None:
    """The user learns exactly which words have no effect; SDXL's two tokenizers cut alike and say it once."""
    caught = warnings_of(lambda: null_pipes[family](prompt, seed=0))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "77" in message
    cut = squeezed(words_cut(tokenizer_pairs[0][1], prompt))
    assert cut
    named = squeezed(message.partition("cut off: ")[2]).strip("'\"")
    assert named == cut or (named.endswith("…") and len(named) > 100 and cut.startswith(named[:-1]))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("prompt", ["", "x " * 75, "!" * 75, "a photo of a cat"], ids=lambda prompt: repr(prompt[:4]))
def test_what_fits_is_not_warned_of(family: str, prompt: str, null_pipes: dict[str, Pipeline]) -> None:
    """75 tokens fit between the two special ones: no warning at the border."""
    assert warnings_of(lambda: null_pipes[family](prompt, seed=0)) == []


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_long_prompt_of_a_batch_is_named(family: str, null_pipes: dict[str, Pipeline]) -> None:
    """One warning for each prompt that is cut, none for the others."""
    prompts = ["x " * 75 + "cat", "short", "x " * 75 + "dog"]
    messages = [str(warning.message) for warning in warnings_of(lambda: null_pipes[family](prompts, seed=0))]
    assert len(messages) == 2
    assert "cat" in messages[0]
    assert "dog" in messages[1]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_call_warns_if_the_user_asks_for_that(family: str, null_pipes: dict[str, Pipeline]) -> None:
    """A service sees the warning for every request, not only for the first of the process."""
    prompt = "x " * 75 + "again"
    assert len(warnings_of(lambda: [null_pipes[family](prompt, seed=0) for _ in range(3)])) == 3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_users_warning_filters_hold(family: str, null_pipes: dict[str, Pipeline]) -> None:
    """Python's warning filters hold: the warning can be turned off or into an error, for both families."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        null_pipes[family](LONG, seed=0)
    assert caught == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncationWarning)
        with pytest.raises(TruncationWarning):
            null_pipes[family](LONG, seed=0)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_warning_points_at_the_callers_line(family: str, null_pipes: dict[str, Pipeline]) -> None:
    """Python shows a warning with a line of code: it has to be the user's, and its filters go by that module."""
    (warning,) = warnings_of(lambda: null_pipes[family](LONG, seed=0))
    assert warning.filename == __file__


def test_threads_leave_the_warning_filters_alone(sdxl_bundle: Path) -> None:
    """``warnings.catch_warnings`` is not safe in threads: two calls that overlap must not leave its filters behind.

    The two calls are held so that the first to enter is the first to leave.
    """
    entered = {"a": threading.Event(), "b": threading.Event()}
    leave = {"a": threading.Event(), "b": threading.Event()}
    real = ClipTokenizer(sdxl_bundle / "tokenizer/tokenizer.json")

    def slow(texts: Sequence[str]) -> Any:
        entered[texts[0]].set()
        assert leave[texts[0]].wait(30)
        return real(texts)

    tokenizer: Any = slow
    conditioner = TextConditioner({"tokenizer": tokenizer, "tokenizer_2": tokenizer}, {})
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        before = list(warnings.filters)
        calls = {}
        for name in ("a", "b"):
            calls[name] = pool.submit(conditioner.tokenize, [name])
            assert entered[name].wait(30)
        for name in ("a", "b"):
            leave[name].set()
            calls[name].result(30)
        assert warnings.filters == before


# Embeddings


PROMPTS = ["a photo of a cat", "", LONG, "猫 🐈 e\u0301!", "A RED dog, and the blue cat"]


def test_sd15_embeddings_are_diffusers(
    sd15_bundle: Path, load_pipeline: Callable[..., Pipeline], reference: Callable[[str], Any]
) -> None:
    """The hidden state that the UNet consumes, for several prompts at once."""
    pipe, judge = load_pipeline(sd15_bundle), reference("Hyper-SD15-1step-lora")
    with torch.no_grad():
        expected, _ = judge.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    actual = encode(pipe, PROMPTS)
    assert actual.text_embeds is None
    assert len(expected.unique(dim=0)) == len(PROMPTS), "prompts that all look alike would prove nothing"
    torch.testing.assert_close(actual.hidden_states, expected, rtol=1e-4, atol=1e-4)


def test_sdxl_embeddings_are_diffusers(
    sdxl_bundle: Path, load_pipeline: Callable[..., Pipeline], reference: Callable[[str], Any]
) -> None:
    """Both penultimate hidden states side by side, and the second encoder's pooled projection."""
    pipe, judge = load_pipeline(sdxl_bundle), reference("Hyper-SDXL-1step-lora")
    with torch.no_grad():
        expected, _, pooled, _ = judge.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    actual = encode(pipe, PROMPTS)
    assert len(pooled.unique(dim=0)) == len(PROMPTS)
    torch.testing.assert_close(actual.hidden_states, expected, rtol=1e-4, atol=1e-4)
    assert actual.text_embeds is not None
    torch.testing.assert_close(actual.text_embeds, pooled, rtol=1e-4, atol=1e-4)


def encode(pipe: Pipeline, prompts: Sequence[str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return pipe.encode_prompt(prompts)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_embeddings_are_the_callers_to_keep(family: str, request: pytest.FixtureRequest) -> None:
    """Embeddings outlive the engines' buffers: encoding another prompt leaves them alone."""
    pipe = Pipeline.load(request.getfixturevalue(f"{family}_bundle"))
    first = pipe.encode_prompt(["a photo of a cat"])
    kept = first.map(torch.clone)
    other = pipe.encode_prompt(["blue dog"])
    assert not torch.equal(first.hidden_states, other.hidden_states)
    assert torch.equal(first.hidden_states, kept.hidden_states)
    if first.text_embeds is not None and kept.text_embeds is not None:
        assert torch.equal(first.text_embeds, kept.text_embeds)
