"""Which of the files that an item opened is its image, by the layouts of public data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmfilm_plugin.rows.data_set_items import DataSetItems, masks_among
from vlmfilm_plugin.rows.recording import MadeItem

LAYOUTS = {
    "ISIC 2016": ("Training_Data/ISIC_0000000.jpg", "Training_Data/ISIC_0000000_Segmentation.png"),
    "ISIC 2018": ("Task1_Training_Input/ISIC_1.jpg", "Task1_Training_GroundTruth/ISIC_1_segmentation.png"),
    "DRIVE": ("images/21_training.tif", "1st_manual/21_manual1.gif"),
    "CHASEDB1": ("Image_01L.jpg", "Image_01L_1stHO.png"),
    "STARE": ("stare-images/im0001.ppm", "labels-ah/im0001.ah.ppm"),
    "HRF": ("images/01_dr.jpg", "manual1/01_dr.tif"),
    "Kvasir": ("images/a.jpg", "masks/a.jpg"),
    "CamVid": ("train/a.png", "trainannot/a.png"),
    "nnU-Net": ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
    "Cityscapes": ("leftImg8bit/a_leftImg8bit.png", "gtFine/a_gtFine_labelIds.png"),
    "VOC": ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
    "GlaS": ("train_1.bmp", "train_1_anno.bmp"),
    "BUSI": ("benign/benign (1).png", "benign/benign (1)_mask.png"),
    "OCTA-500": ("image/1.png", "label/1.png", "label_prob/1.png", "label_sauna/1.png"),
    "xca": ("train/image/0001.png", "train/label/0001.png"),
    "BraTS": ("a/a_flair.nii.gz", "a/a_seg.nii.gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("root", ["/data/set", "/data/labels and masks/of_seg"])
def test_the_image_of_public_layouts(layout: str, root: str) -> None:
    files = [f"{root}/{file}" for file in LAYOUTS[layout]]
    assert masks_among(files) == [False] + [True] * (len(files) - 1)


def test_layouts_that_name_nothing_fail_with_the_files_and_a_statement_decides() -> None:
    item = MadeItem(3, ("/d/x/1.png", "/d/y/1.png"))
    path, reason = DataSetItems("Pairs").image_of(item, (0,))
    assert path is None and "item 3 of Pairs opened several files" in reason and "/d/y/1.png" in reason
    chosen = DataSetItems("Pairs", [lambda files: None, lambda files: next(file for file in files if "/x/" in file)])
    assert chosen.image_of(item, (0,)) == (Path("/d/x/1.png"), "")


def test_files_of_all_items_lists_and_code_are_no_images() -> None:
    items = DataSetItems("Atlas")
    made = [MadeItem(number, ("/d/mean.png", f"/d/{number}.png", "/d/list.csv", "/lib/codec.py")) for number in range(3)]
    for item in made:
        items.note(item)
    assert [items.image_of(item, ())[0] for item in made] == [Path(f"/d/{number}.png") for number in range(3)]
    alone = DataSetItems("Crops of one image")
    for number in range(3):
        alone.note(MadeItem(number, ("/d/only.png",)))
    assert alone.image_of(MadeItem(1, ("/d/only.png",)), ())[0] == Path("/d/only.png")


def test_a_tensors_own_statement_comes_first_if_it_is_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    own.touch()
    item = MadeItem(0, ("/d/1.png", "/d/2.png"), {("image",): str(own), ("other",): "/gone.png"})
    assert DataSetItems("A").image_of(item, ("image",)) == (own, "")
    assert DataSetItems("A").image_of(item, ("other",))[0] is None


def test_an_index_that_ever_opened_another_file_is_forgotten() -> None:
    items = DataSetItems("Random")
    assert items.image_of(MadeItem(0, ("/d/1.png",)), ())[0] == Path("/d/1.png")
    assert items.image_of(MadeItem(0, ()), ())[0] == Path("/d/1.png")
    assert items.image_of(MadeItem(0, ("/d/2.png",)), ())[0] == Path("/d/2.png")
    assert items.image_of(MadeItem(0, ()), ())[0] is None
