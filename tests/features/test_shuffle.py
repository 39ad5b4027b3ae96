"""The rule of mode `shuffle`: who gets whose feature depends on step, seed and names, and on nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from vlmfilm_plugin.features.shuffle import Shuffle, Split, images_of, permutation_hash


def names(count: int, folder: str = "") -> list[str]:
    return sorted(f"{folder}{index:04d}.png" for index in range(count))


def pairing(members: list[str], step: int = 0, seed: int = 0) -> dict[str, str]:
    split, shuffle = Split(members), Shuffle(seed)
    return {member: next(shuffle.donors(member, step, split)) for member in members}


# In a batch


@pytest.mark.parametrize("n", range(2, 12))
def test_a_permutation_moves_every_row(n: int) -> None:
    for step in range(50):
        found = Shuffle().derangement(n, step)
        assert sorted(found) == list(range(n))
        assert all(row != other for row, other in enumerate(found))


@pytest.mark.parametrize("n", [5, 6])
def test_no_step_repeats_a_permutation_before_all_have_been_drawn(n: int) -> None:
    count = math.factorial(n - 1)
    drawn = [tuple(Shuffle().derangement(n, step)) for step in range(count)]
    assert len(set(drawn)) == count
    # Every image is every other one's donor equally often.
    assert set(Counter(found[0] for found in drawn).values()) == {count // (n - 1)}


@pytest.mark.parametrize("n", [5, 8, 64, 500])
def test_neighbouring_steps_have_different_permutations_from_five_rows_on(n: int) -> None:
    drawn = [tuple(Shuffle().derangement(n, step)) for step in (0, 1, 2, 100, 101, 123_456_789)]
    assert len(set(drawn)) == len(drawn)


def test_a_permutation_is_the_same_in_every_process_and_version() -> None:
    assert [Shuffle().derangement(5, step) for step in range(3)] == [[4, 0, 1, 2, 3], [1, 2, 4, 0, 3], [2, 3, 1, 4, 0]]
    assert Shuffle(7).derangement(5, 0) == [2, 4, 3, 1, 0]


def test_a_permutation_depends_on_the_seed() -> None:
    assert len({tuple(Shuffle(seed).derangement(8, 3)) for seed in range(20)}) == 20


def test_names_tell_rows_apart_and_shape_nothing_else() -> None:
    found = Shuffle().exchange(["a", "b", "c", "d", "e"], 4)
    assert found == Shuffle().exchange(["/x/9", "q", "r", "s", "t"], 4) == Shuffle().derangement(5, 4)


@pytest.mark.parametrize("step", range(6))
def test_rows_of_one_image_never_get_its_own_feature(step: int) -> None:
    images = ["a", "a", "b", "c", "b", "a"]
    found = Shuffle().exchange(images, step)
    assert found is not None
    assert all(images[row] != images[other] for row, other in enumerate(found))
    # Every image goes to one other image as a whole.
    assert len({(images[row], images[other]) for row, other in enumerate(found)}) == 3


@pytest.mark.parametrize("images", [["a"], ["a", "a", "a"], []])
def test_one_image_has_nobody_to_exchange_with(images: list[str]) -> None:
    assert Shuffle().exchange(images, 0) is None


def test_images_are_told_apart_by_their_features_in_every_dtype() -> None:
    a, b = torch.randn(2, 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        found = images_of(torch.stack([a, b, a]).to(dtype))
        assert found[0] == found[2] != found[1]


# Alone


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_the_donors_of_one_step_are_all_images_and_nobody_is_its_own(count: int) -> None:
    members = names(count)
    for step in range(20):
        found = pairing(members, step)
        assert sorted(found.values()) == members
        assert all(image != donor for image, donor in found.items())


def test_the_next_donors_are_every_other_image_once() -> None:
    members = names(9)
    found = list(Shuffle().donors(members[4], 3, Split(members)))
    assert sorted([*found, members[4]]) == members


def test_donors_depend_on_step_and_seed() -> None:
    members = names(50)
    assert len({tuple(pairing(members, step).values()) for step in range(40)}) > 25
    assert len({tuple(pairing(members, 0, seed).values()) for seed in range(10)}) == 10


def test_donors_do_not_depend_on_the_folder_the_data_lie_in() -> None:
    here, there = pairing(names(30, "/data/xca/test/"), 5), pairing(names(30, "/elsewhere/deep/down/test/"), 5)
    assert [donor[-8:] for donor in here.values()] == [donor[-8:] for donor in there.values()]


def test_donors_are_the_same_in_every_process_and_version() -> None:
    assert list(pairing(names(6), 0).values()) == ["0003.png", "0000.png", "0005.png", "0001.png", "0002.png", "0004.png"]


def test_donors_do_not_depend_on_what_was_drawn_before() -> None:
    members = names(20)
    split, shuffle = Split(members), Shuffle()
    for step in (9, 2, 5):
        for member in reversed(members):
            next(shuffle.donors(member, step, split))
    assert {member: next(shuffle.donors(member, 2, split)) for member in members} == pairing(members, 2)
    # Another seed on the same split, and back.
    next(Shuffle(4).donors(members[0], 2, split))
    assert next(shuffle.donors(members[0], 2, split)) == pairing(members, 2)[members[0]]


def test_an_image_outside_the_split_gets_one_of_it() -> None:
    members = names(5)
    for outsider in ("", "0002.pnga", "zzz"):
        assert sorted(Shuffle().donors(outsider, 1, Split(members))) == members
    assert list(Shuffle().donors("a", 0, Split([]))) == [] == list(Shuffle().donors("a", 0, Split(["a"])))


def test_a_permutation_has_a_stable_name() -> None:
    assert permutation_hash([1, 0]) == permutation_hash((1, 0))
    assert len({permutation_hash(p) for p in ([0, 1], [1, 0], [10], [1, 0, 2])}) == 4


def test_a_draw_looks_at_few_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(list[str]):
        reads = 0

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            Counted.reads += 1
            return super().__getitem__(index)

        def __iter__(self) -> Iterator[str]:
            Counted.reads += len(self)
            return super().__iter__()

    split = Split(Counted(names(100_000)))
    next(Shuffle().donors("00000.png", 0, split))
    Counted.reads = 0
    for step in range(100):
        next(Shuffle().donors("00700.png", step, split))
        next(Shuffle().donors("unknown", step, split))
    assert Counted.reads < 100 * 40
