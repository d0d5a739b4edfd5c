"""The fraction that a build's nested phases make, for any phases in any order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.progress import PhaseTree

NAMES = st.sampled_from("abcde")
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.none() | NAMES, st.integers(-1, 5)),
    st.tuples(st.just("step"), NAMES, st.integers(-1, 7)),
    st.tuples(st.just("end"), NAMES),
)
Tree = tuple[int, list]  # steps of a phase, and the phases inside it
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.tuples(st.integers(1, 4), st.just([])),
    lambda inside: st.tuples(st.integers(1, 4), st.lists(inside, max_size=3)),
    max_leaves=8,
)


def fractions_of(tree: PhaseTree, name: str, parent: str | None, phase: Tree) -> list[float]:
    """Go through a phase as TensorRT does: step by step, the phases inside it one after another in the first steps."""
    steps, inside = phase
    tree.start(name, parent, steps)
    seen = [tree.fraction]
    for index in range(steps):
        for number, child in enumerate(inside if index == 0 else []):
            seen += fractions_of(tree, f"{name}.{number}", name, child)
        tree.step(name, index)
        seen.append(tree.fraction)
    tree.end(name)
    return [*seen, tree.fraction]


@given(st.lists(EVENTS, max_size=40))
def test_it_never_falls_and_stays_a_fraction(events: list[tuple]) -> None:
    """It holds for any report of TensorRT, also of phases that were never announced or have already ended."""
    tree = PhaseTree()
    seen = [tree.fraction]
    for method, *arguments in events:
        getattr(tree, method)(*arguments)
        seen.append(tree.fraction)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] <= 1.0


@given(TREES)
def test_it_ends_at_one(phase: Tree) -> None:
    """Phases as they should be rise from nothing to the whole."""
    seen = fractions_of(PhaseTree(), "build", None, phase)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


@given(TREES)
def test_it_is_not_one_before_the_last_step(phase: Tree) -> None:
    """The outermost phase has one step more than is ever reported, as TensorRT's has: then the end makes the whole."""
    steps, inside = phase
    tree = PhaseTree()
    tree.start("build", None, steps + 1)
    for index in range(steps):
        for number, child in enumerate(inside if index == 0 else []):
            fractions_of(tree, f"build.{number}", "build", child)
        tree.step("build", index)
    assert tree.fraction <= steps / (steps + 1)
    tree.end("build")
    assert tree.fraction == 1.0


@given(TREES, st.lists(st.sampled_from(["step", "end"]), min_size=1))
def test_unknown_names_are_harmless(phase: Tree, methods: list[str]) -> None:
    """A phase that was never started changes nothing."""
    tree = PhaseTree()
    fractions_of(tree, "build", None, phase)
    tree.start("again", None, 2)
    before = tree.fraction
    for method in methods:
        getattr(tree, method)(*{"step": ("unknown", 7), "end": ("unknown",)}[method])
    assert tree.fraction == before


def test_a_step_under_way_counts_as_far_as_its_inner_phase() -> None:
    """Two steps, the first of which is a phase of four: after one of the four it is an eighth."""
    tree = PhaseTree()
    tree.start("build", None, 2)
    tree.start("inner", "build", 4)
    tree.step("inner", 0)
    assert tree.fraction == 1 / 8
    tree.end("inner")
    tree.step("build", 0)
    assert tree.fraction == 1 / 2


def test_an_end_ends_what_is_inside() -> None:
    """TensorRT ends phases inside others late or never: what began inside counts no more, and a new phase may begin."""
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.start("inner", "build", 2)
    tree.start("innermost", "inner", 2)
    tree.end("inner")
    tree.step("innermost", 1)
    assert tree.fraction == 0.0
    tree.end("build")
    assert tree.fraction == 1.0
