"""Image sizes and batches: what may be asked for, and how what may not is answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.errors import RequestError
from hypersd.export.shapes import ShapeOptions, image_shapes, parse_dynamic

extents = st.integers(-16, 5000) | st.integers(8, 512).map(lambda n: 8 * n) | st.sampled_from([63, 64, 4096, 4097])
batches = st.integers(-2, 70)
sides = st.sampled_from([64, 512, 768, 1024])
spans = st.tuples(extents, extents, extents) | extents.map(lambda n: (n, n, n))


@st.composite
def options(draw: st.DrawFn) -> ShapeOptions:
    dynamic = draw(
        st.none()
        | st.fixed_dictionaries({}, optional={"batch": st.tuples(batches, batches, batches), "height": spans,
                                              "width": spans})
    )  # fmt: skip
    return ShapeOptions(
        batch=draw(st.none() | batches),
        height=draw(st.none() | extents),
        width=draw(st.none() | extents),
        dynamic=dynamic,
    )


def is_valid_side(span: tuple[int, int, int]) -> bool:
    return all(64 <= n <= 4096 and n % 8 == 0 for n in span) and span[0] <= span[1] <= span[2]


def is_valid_batch(span: tuple[int, int, int]) -> bool:
    return all(1 <= n <= 64 for n in span) and span[0] <= span[1] <= span[2]


@given(options(), sides)
def test_shapes_are_valid_or_refused(given_options: ShapeOptions, default: int) -> None:
    """Valid options come back unchanged; invalid ones are rejected in one line."""
    said = {
        "batch": given_options.batch if given_options.batch is not None else 1,
        "height": given_options.height if given_options.height is not None else default,
        "width": given_options.width if given_options.width is not None else default,
    }
    wanted = {name: (n, n, n) for name, n in said.items()} | (given_options.dynamic or {})
    if given_options.dynamic != {}:  # {} means default ranges, below
        valid = is_valid_batch(wanted["batch"]) and is_valid_side(wanted["height"]) and is_valid_side(wanted["width"])
        for name, span in (given_options.dynamic or {}).items():  # a usual extent beside another range is no answer
            valid = valid and getattr(given_options, name) in (None, span[1])
        if valid:
            shapes = image_shapes(given_options, default)
            for name in wanted:
                found = getattr(shapes, name)
                assert (found.name, found.min, found.opt, found.max) == (name, *wanted[name])
        else:
            with pytest.raises(RequestError) as error:
                image_shapes(given_options, default)
            assert "\n" not in str(error.value)
            assert any(name in str(error.value) for name in wanted)


@given(st.none() | batches, st.none() | extents, st.none() | extents, sides)
def test_default_ranges_hold_the_usual_size(
    batch: int | None, height: int | None, width: int | None, default: int
) -> None:
    """``--dynamic`` alone: every range holds the usual extent, stays within the limits, and really is a range.

    An error is allowed only for what is invalid by itself.
    """
    asked = ShapeOptions(batch=batch, height=height, width=width, dynamic={})
    fixed = ShapeOptions(batch=batch, height=height, width=width)
    try:
        usual = image_shapes(fixed, default)
    except RequestError:
        with pytest.raises(RequestError):
            image_shapes(asked, default)
        return
    shapes = image_shapes(asked, default)
    for name in ("batch", "height", "width"):
        span = getattr(shapes, name)
        assert span.opt == getattr(usual, name).opt
        assert span.min < span.max or span.opt == 64
        is_valid = is_valid_batch if name == "batch" else is_valid_side
        assert is_valid((span.min, span.opt, span.max))


@pytest.mark.parametrize(
    ("given_options", "words"),
    [
        (ShapeOptions(height=101), ["height 101", "multiple of 8", "take 104"]),
        (ShapeOptions(width=70), ["width 70", "multiple of 8", "take 72"]),
        (ShapeOptions(height=65), ["height 65", "take 64"]),
        (ShapeOptions(width=0), ["width 0", "64 to 4096"]),
        (ShapeOptions(width=-8), ["width -8", "64 to 4096"]),
        (ShapeOptions(height=4104), ["height 4104", "64 to 4096"]),
        (ShapeOptions(batch=0), ["batch 0", "1 to 64"]),
        (ShapeOptions(batch=65), ["batch 65", "1 to 64"]),
        (ShapeOptions(dynamic={"height": (512, 256, 1024)}), ["height 512:256:1024", "MIN <= OPT <= MAX"]),
        (ShapeOptions(dynamic={"width": (512, 512, 1001)}), ["width 1001", "multiple of 8"]),
        (ShapeOptions(dynamic={"batch": (0, 1, 4)}), ["batch 0", "1 to 64"]),
        (ShapeOptions(dynamic={"heigth": (64, 64, 64)}), ["heigth", "height"]),
        (ShapeOptions(height=128, dynamic={"height": (64, 64, 512)}), ["height 128", "one of the two"]),
    ],
)
def test_errors_name_the_wrong_dimension(given_options: ShapeOptions, words: list[str]) -> None:
    """The refusal names the dimension and the number given, and says what was expected."""
    with pytest.raises(RequestError) as error:
        image_shapes(given_options, 512)
    for word in words:
        assert word in str(error.value)


@given(
    st.sampled_from(["batch", "height", "width"]), st.tuples(*[st.integers(0, 10**6)] * 3),
)  # fmt: skip
def test_a_written_range_is_read_back(name: str, span: tuple[int, int, int]) -> None:
    """NAME=MIN:OPT:MAX gives these three numbers, in this order."""
    assert parse_dynamic(f"{name}={':'.join(map(str, span))}") == (name, span)


@given(st.text(max_size=40) | st.text("batchegwid=:0123456789-+._ ²٣", max_size=30))
def test_any_text_is_a_range_or_refused_in_one_line(text: str) -> None:
    """No text makes the parser fail in another way, line breaks and non-ASCII digits included."""
    refusal = None
    try:
        name, span = parse_dynamic(text)
    except RequestError as error:
        refusal = str(error)
    if refusal is None:
        assert name in ("batch", "height", "width")
        assert len(span) == 3
        assert min(span) >= 0
    else:
        assert "NAME=MIN:OPT:MAX" in refusal
        assert "\n" not in refusal


@pytest.mark.parametrize(
    "text",
    ["", "height", "height=512", "height=1:2", "height=1:2:3:4", "depth=1:2:3", "height=a:b:c", "height=-8:8:16",
     "height=1.5:2:3", "Height=1:2:3", "height=512:768:1024 ", "height=²:2:3", "batch=1::4"],
)  # fmt: skip
def test_malformed_ranges(text: str) -> None:
    """Text of another form is rejected, and repeated in the message."""
    with pytest.raises(RequestError, match="NAME=MIN:OPT:MAX") as error:
        parse_dynamic(text)
    assert repr(text) in str(error.value)
