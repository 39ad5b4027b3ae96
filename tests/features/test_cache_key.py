"""Cache keys: the exact order of sources, odd batches, and content hashes that know neither position nor luck."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.batch_names import source_paths, split_of
from vlmfilm_plugin.features.cache_key import CacheKeys, cache_keys, content_keys

IMAGE = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)


class Meta(torch.Tensor):
    """A tensor with `meta`, as MONAI's MetaTensor has it."""

    meta: dict[str, Any]


def _with_meta(meta: object) -> torch.Tensor:
    image = IMAGE.clone().as_subclass(Meta)
    image.meta = meta  # type: ignore[assignment]
    return image


# Weakest last: each layer alone names the rows, and each is beaten by all before it.
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("batch['name']", {"name": ["n0", "n1"]}),
    ("batch['image_meta_dict']['filename_or_obj']", {"image_meta_dict": {"filename_or_obj": ["n0", "n1"]}}),
    ("batch['image_meta_dict']['filepath']", {"image_meta_dict": {"filepath": ["n0", "n1"]}}),
    ("batch['image_meta_dict']['path']", {"image_meta_dict": {"path": ["n0", "n1"]}}),
    ("batch['image_meta_dict']['filename']", {"image_meta_dict": {"filename": ["n0", "n1"]}}),
    ("batch['image_meta_dict']['image_id']", {"image_meta_dict": {"image_id": ["n0", "n1"]}}),
    ("batch['image_meta_dict']['meta']['filename_or_obj']", {"image_meta_dict": {"meta": {"filename_or_obj": ["n0", "n1"]}}}),
    ("batch['image_meta_dict']['meta']['image_id']", {"image_meta_dict": {"meta": {"image_id": ["n0", "n1"]}}}),
    ("batch['meta_dict']['path']", {"meta_dict": {"path": ["n0", "n1"]}}),
    ("batch['metadata']['path']", {"metadata": {"path": ["n0", "n1"]}}),
    ("batch['meta']['path']", {"meta": {"path": ["n0", "n1"]}}),
    ("batch['image_path']", {"image_path": ["n0", "n1"]}),
    ("batch['path']", {"path": ["n0", "n1"]}),
    ("batch['image_id']", {"image_id": ["n0", "n1"]}),
    ("batch['id']", {"id": ["n0", "n1"]}),
    ("batch['filename']", {"filename": ["n0", "n1"]}),
    ("batch['image'].meta['filename_or_obj']", {"image": _with_meta({"filename_or_obj": ["n0", "n1"]})}),
    ("batch['image'].meta['meta']['path']", {"image": _with_meta({"meta": {"path": ["n0", "n1"]}})}),
    ("batch['filepath']", {"filepath": ["n0", "n1"]}),
    ("batch['index']", {"index": ["n0", "n1"]}),
    ("batch['idx']", {"idx": ["n0", "n1"]}),
    ("batch['case_id']", {"case_id": ["n0", "n1"]}),
]


@pytest.mark.parametrize(("source", "fields"), LAYERS)
def test_each_source_alone(source: str, fields: dict[str, Any]) -> None:
    assert cache_keys(fields, 2, image=IMAGE) == CacheKeys(("unknown:n0", "unknown:n1"), source)


def _merged(stronger: dict[str, Any], weaker: dict[str, Any]) -> dict[str, Any]:
    merged = {**weaker, **stronger}
    for key in stronger.keys() & weaker.keys():
        if isinstance(stronger[key], dict):
            merged[key] = _merged(stronger[key], weaker[key])
        elif isinstance(stronger[key], torch.Tensor):
            merged[key] = _with_meta(_merged(stronger[key].meta, weaker[key].meta))
    return merged


@pytest.mark.parametrize("position", range(len(LAYERS) - 1))
def test_the_order_is_exact(position: int) -> None:
    source, fields = LAYERS[position]
    for _, weaker in LAYERS[position + 1 :]:
        assert cache_keys(_merged(fields, weaker), 2, image=IMAGE).source == source


def test_a_name_is_cut_at_the_at_sign_and_others_are_not() -> None:
    assert cache_keys({"name": ["a@1", "b@2@3"]}, 2).keys == ("unknown:a", "unknown:b")
    assert cache_keys({"path": ["a@1", "b@2"]}, 2).keys == ("unknown:a@1", "unknown:b@2")


@pytest.mark.parametrize("text", ["a.png::3", "a.png|x", "a.png#frag", "a.png?q=1", "a.png::1|2#3?4", "a.png?1::2"])
def test_values_are_cut_at_the_first_separator(text: str) -> None:
    assert cache_keys({"path": [text]}, 1).keys == ("unknown:a.png",)


def test_a_single_colon_does_not_cut() -> None:
    assert cache_keys({"path": ["C:/x.png"]}, 1).keys == ("unknown:C:/x.png",)


def test_a_plain_name_is_shared_but_a_plain_path_does_not_count() -> None:
    assert cache_keys({"name": "all"}, 3).keys == ("unknown:all",) * 3
    assert cache_keys({"path": "all.png", "image": IMAGE[:1]}, 1).source == "content"


@pytest.mark.parametrize(
    "names", [["a"], ["a", "b", "c"], ["a", None], ["a", ""], ["a", "@1"], [], "", None, 5, [["a"], ["b"]], [1.5, 2.5], [True, False], {"a": 1}]
)
def test_a_source_that_does_not_name_every_row_does_not_count(names: object) -> None:
    assert cache_keys({"name": names, "case_id": ["x", "y"]}, 2).source == "batch['case_id']"


def test_rows_of_a_patch_batch_are_not_named_by_their_images() -> None:
    found = cache_keys({"name": ["a", "b"], "image": torch.rand(8, 1, 4, 4)}, 8)
    assert found.source == "content" and len(set(found.keys)) == 8


@pytest.mark.parametrize(
    "values",
    [
        (7, 8),
        [7, 8],
        torch.tensor([7, 8]),
        np.array([7, 8]),
        np.array(["7", "8"]),
        np.array([7, 8], dtype=object),
        [np.int64(7), torch.tensor(8)],
        [Path("7"), b"8"],
    ],
)
def test_lists_tuples_arrays_and_tensors_count(values: object) -> None:
    assert cache_keys({"index": values}, 2).keys == ("unknown:7", "unknown:8")


@pytest.mark.parametrize("values", [torch.tensor([[7], [8]]), np.array(7), torch.tensor(7)])
def test_arrays_of_another_rank_do_not_count(values: object) -> None:
    assert cache_keys({"index": values, "image": IMAGE}, 2).source == "content"


def test_metadata_as_a_list_with_one_mapping_a_row() -> None:
    assert cache_keys({"image_meta_dict": [{"path": "a"}, {"path": "b"}]}, 2).keys == ("unknown:a", "unknown:b")
    assert cache_keys({"image_meta_dict": [{"path": "a"}, {}], "image": IMAGE}, 2).source == "content"


@pytest.mark.parametrize(
    ("root", "name", "expected"),
    [
        ("/data/a", "/data/a/images/1.png", "images/1.png"),
        ("/data/a/", "/data/a/images/1.png", "images/1.png"),
        (Path("/data/a"), "/data/a/1.png", "1.png"),
        ("/data/a", "/data/ab/1.png", "/data/ab/1.png"),
        ("/data/a", "/data/a", "/data/a"),
        ("/data/a", "images/1.png", "images/1.png"),
        ("data", "data/1.png", "1.png"),
        ("", "/data/1.png", "/data/1.png"),
        (None, "/data/1.png", "/data/1.png"),
    ],
)
def test_dataset_root_is_a_prefix_by_components(root: Any, name: str, expected: str) -> None:
    assert cache_keys({"path": [name]}, 1, dataset_root=root).keys == (f"unknown:{expected}",)


def test_split_is_split_then_stage_then_mode() -> None:
    fields = {"split": "train", "stage": "val", "mode": "test"}
    for expected in ("train", "val", "test", "unknown"):
        assert split_of(fields, 2) == [expected] * 2
        fields = dict(list(fields.items())[1:])
    assert split_of({"split": ["train", "val"]}, 2) == ["train", "val"]
    assert split_of({"split": ["train"], "stage": "fit"}, 2) == ["fit"] * 2
    assert split_of(None, 2) == ["unknown"] * 2
    assert cache_keys({"split": ["train", "val"], "path": ["a", "a"]}, 2).keys == ("train:a", "val:a")


def test_split_of_a_text_enum_is_its_value() -> None:
    from enum import Enum

    class Stage(str, Enum):
        FIT = "train"

    assert split_of({"stage": Stage.FIT}, 1) == ["train"]


def test_the_same_image_has_the_same_key_at_any_position_and_in_any_batch() -> None:
    a, b = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    first = cache_keys({"split": "train"}, 2, image=torch.stack([a, b])).keys
    second = cache_keys({"split": "train"}, 3, image=torch.stack([b, b, a])).keys
    assert first == (second[2], second[0]) and second[0] == second[1]
    assert first[0].startswith("train:fp-") and len(first[0]) == len("train:fp-") + 32


def test_one_pixel_anywhere_changes_the_content_hash_however_black_the_border() -> None:
    rows = torch.zeros(65, 1, 64, 64)
    for row in range(64):
        rows[row, 0, row, (row * 37) % 64] = 1e-6
    assert len(set(content_keys(rows, "train"))) == 65


def test_shape_and_dtype_are_part_of_the_content() -> None:
    keys = {
        content_keys(torch.zeros(shape, dtype=dtype), "s")[0]
        for shape in ((1, 1, 4, 8), (1, 1, 8, 4), (1, 2, 4, 4))
        for dtype in (torch.float32, torch.int32)
    }
    assert len(keys) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_any_dtype_has_a_content_hash(dtype: torch.dtype) -> None:
    image = (torch.rand(2, 1, 4, 4) * 2).to(dtype)
    assert len(content_keys(image, "s")) == 2


def test_layout_grad_numpy_and_subclass_do_not_change_the_content_hash() -> None:
    image = torch.rand(2, 3, 8, 8)
    expected = content_keys(image, "s")
    assert content_keys(image.clone().requires_grad_(), "s") == expected
    assert content_keys(image.to(memory_format=torch.channels_last), "s") == expected
    assert content_keys(image.numpy(), "s") == expected
    assert content_keys(image.clone().as_subclass(Meta), "s") == expected
    assert content_keys(list(image), "s") == expected
    with torch.inference_mode():
        assert content_keys(image.clone(), "s") == expected


def test_meta_tensor_of_monai_names_and_content() -> None:
    data = pytest.importorskip("monai.data")
    image = data.MetaTensor(IMAGE.clone(), meta={"filename_or_obj": ["a", "b"]})
    assert cache_keys({"image": image}, 2).keys == ("unknown:a", "unknown:b")
    assert content_keys(image, "s") == content_keys(IMAGE, "s")


def test_crop_metadata_is_folded_in_row_by_row() -> None:
    image = torch.zeros(3, 1, 4, 4)
    plain = cache_keys({"image": image}, 3).keys
    patch = cache_keys({"image": image, "patch_index": torch.tensor([0, 1, 0])}, 3).keys
    assert len(set(plain)) == 1 and patch[0] == patch[2] != patch[1] and patch[0] != plain[0]
    centre = cache_keys({"image": image, "image_meta_dict": {"crop_center": torch.tensor([[1, 2], [3, 4], [1, 2]])}}, 3).keys
    assert centre[0] == centre[2] != centre[1]
    listed = cache_keys({"image": image, "image_meta_dict": [{"crop_center": [1, 2]}, {"crop_center": (3, 4)}, {"crop_center": [1, 2]}]}, 3).keys
    assert listed == centre


def test_ambiguous_crop_metadata_is_left_out_rather_than_read_by_position() -> None:
    image = torch.zeros(2, 1, 4, 4)
    plain = cache_keys({"image": image}, 2).keys
    collated = {"crop_center": [torch.tensor([1, 2]), torch.tensor([3, 4])], "spatial_shape": torch.tensor([64, 32])}
    assert cache_keys({"image": image, **collated}, 2).keys == plain


def test_content_keys_takes_one_split_or_one_a_row() -> None:
    keys = content_keys(IMAGE, ["train", "val"])
    assert [key.split(":")[0] for key in keys] == ["train", "val"]
    with pytest.raises(ConditionError):
        content_keys(IMAGE, ["train"])


@pytest.mark.parametrize("image", [None, "text", torch.rand(3, 1, 4, 4), torch.tensor(1.0), [1, 2], {"a": 1}, 7])
def test_no_name_and_no_image_is_a_clear_error(image: object) -> None:
    with pytest.raises(ConditionError, match="cannot name the rows") as caught:
        cache_keys({"image": image}, 2)
    assert {"found", "expected"} <= set(caught.value.facts) and caught.value.fix


@pytest.mark.parametrize("batch", [None, 5, "text", [1, 2], (IMAGE, IMAGE), torch.rand(2), object()])
def test_a_batch_that_is_no_mapping_falls_back_to_the_image(batch: object) -> None:
    assert cache_keys(batch, 2, image=IMAGE).source == "content"
    assert source_paths(batch, 2) == [None, None]


class _Hostile(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError(key)


def test_a_mapping_that_raises_names_nothing() -> None:
    assert cache_keys(_Hostile(name=["a", "b"]), 2, image=IMAGE).source == "content"
    assert split_of(_Hostile(split="a"), 1) == ["unknown"] and source_paths(_Hostile(), 1) == [None]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
values = st.recursive(
    scalars
    | st.sampled_from(
        [
            torch.tensor([1, 2]),
            np.array(["a", "b"]),
            torch.rand(2, 2),
            np.array(3),
            Path("x"),
            _with_meta({"path": ["p", None]}),
            _Hostile(),
            float,
            torch.Size([2]),
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["meta", "path", "filename_or_obj", "crop_center"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = [
    "name",
    "image_meta_dict",
    "meta_dict",
    "meta",
    "path",
    "index",
    "image",
    "split",
    "stage",
    "patch_index",
    "crop_center",
    "spatial_shape",
    "filename",
]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=5), st.integers(1, 3), st.sampled_from([None, "", "/data", "x"]))
def test_odd_batches_never_raise_and_give_one_key_a_row(batch: dict[str, object], rows: int, root: str | None) -> None:
    image = torch.zeros(rows, 1, 2, 2)
    found = cache_keys(batch, rows, dataset_root=root, image=image)
    assert len(found.keys) == rows and all(":" in key for key in found.keys)
    assert len(source_paths(batch, rows, dataset_root=root)) == rows
    assert found == cache_keys(dict(batch), rows, dataset_root=root, image=image)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(4)), st.data())
def test_keys_move_with_their_rows(order: list[int], data: st.DataObject) -> None:
    image = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)), dtype=torch.float32).reshape(4, 1, 1, 1)
    centre = torch.tensor(data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=4, max_size=4)))
    keys = cache_keys({"crop_center": centre}, 4, image=image).keys
    assert cache_keys({"crop_center": centre[order]}, 4, image=image[order]).keys == tuple(keys[i] for i in order)


def _files(folder: Path, *names: str) -> list[str]:
    paths = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        paths.append(str(folder / name))
    return paths


def test_source_paths_in_order_and_only_of_files_that_exist(tmp_path: Path) -> None:
    a, b, c, d = _files(tmp_path, "a.png", "b.png", "c.png", "d.png")
    assert source_paths({"path": [a, str(tmp_path / "no.png")]}, 2) == [Path(a), None]
    batch = {"image": _with_meta({"filename_or_obj": [a, a]}), "image_meta_dict": {"filename_or_obj": [b, b]}, "path": [c, c], "filepath": [d, d]}
    for expected, strongest in ((a, "image"), (b, "image_meta_dict"), (c, "path"), (d, "filepath")):
        assert source_paths(batch, 2) == [Path(expected)] * 2
        del batch[strongest]
    assert source_paths({"path": [a, "no"], "filepath": ["no", b]}, 2) == [Path(a), Path(b)]


def test_source_path_of_a_name_is_under_dataset_root(tmp_path: Path) -> None:
    _files(tmp_path, "images/1.png", "images/2.png")
    batch = {"name": ["images/1.png@3", "images/2.png"]}
    assert source_paths(batch, 2, dataset_root=tmp_path) == [tmp_path / "images/1.png", tmp_path / "images/2.png"]
    assert source_paths(batch, 2) == [None, None]


def test_relative_paths_are_tried_against_working_directory_then_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _files(tmp_path, "cwd/a.png", "root/a.png", "root/b.png")
    monkeypatch.chdir(tmp_path / "cwd")
    assert source_paths({"path": ["a.png", "b.png"]}, 2, dataset_root=tmp_path / "root") == [Path("a.png"), tmp_path / "root/b.png"]


def test_source_path_with_a_suffix_is_found_and_a_file_with_such_a_name_wins(tmp_path: Path) -> None:
    a, odd = _files(tmp_path, "a.png", "b#1.png")
    assert source_paths({"path": [a + "::3", odd]}, 2) == [Path(a), Path(odd)]


def test_plain_text_in_the_meta_of_one_image_names_its_row(tmp_path: Path) -> None:
    (a,) = _files(tmp_path, "a.png")
    assert source_paths({"image": _with_meta({"filename_or_obj": a})}, 1) == [Path(a)]
    assert source_paths({"image": _with_meta({"filename_or_obj": a})}, 2) == [None, None]
    assert source_paths({"path": a}, 1) == [None]


@pytest.mark.parametrize("odd", ["x" * 5000, "a\0b", ".", "/", "", "..", "\udcff"])
def test_names_no_file_can_have_are_no_files(tmp_path: Path, odd: str) -> None:
    assert source_paths({"path": [odd], "name": [odd]}, 1, dataset_root=tmp_path) == [None]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, vlmfilm_plugin.features.cache_key; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
