"""DukeMTMC-reID's names and counts."""

from __future__ import annotations

from pathlib import Path

from fake_data import write_image

from sabmn_ext.data import load_data


def test_dukemtmc_is_recognised_in_the_folder_around_it(tmp_path: Path) -> None:
    root = tmp_path / "DukeMTMC-reID"
    write_image(root / "bounding_box_train" / "0001_c2_f0046182.jpg")
    write_image(root / "query" / "0005_c2_f0046985.jpg")
    for name in ("0005_c8_f0047001.jpg", "7000_c1_f0000001.jpg"):
        write_image(root / "bounding_box_test" / name)
    data = load_data(str(tmp_path))
    assert (data.name, data.root) == ("dukemtmc", str(root))
    assert [record[1:] for record in data.gallery] == [(5, 8), (7000, 1)]
    assert "gallery has 2 images, dukemtmc was published with 17,661" in data.notes
