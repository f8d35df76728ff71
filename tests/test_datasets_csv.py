from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.datasets import ImageData, load_data
from zoo.errors import DataError

GRID = ",".join(f"{y}x{x}" for y in range(1, 5) for x in range(1, 5))
PIXELS = ",".join(f"pixel{i}" for i in range(16))


def written(tmp_path: Path, text: str, name: str = "data.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def failing(path: Path, **options: bool) -> DataError:
    with pytest.raises(DataError) as error:
        load_data(path, **options).batch([0])
    assert error.value.file == str(path)
    return error.value


def labels(data: ImageData) -> list[str]:
    assert data.labels is not None
    return [data.classes[label] for label in data.labels]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png, b.png and sub/c,d.png in the test's folder; each of one colour."""
    (tmp_path / "sub").mkdir()
    for value, name in enumerate(("a.png", "b.png", "sub/c,d.png"), start=1):
        Image.new("RGB", (6, 6), (value, value, value)).save(tmp_path / name)
    return tmp_path


# Manifests


def test_manifest(images: Path) -> None:
    text = 'note,label,path\nx,10,a.png\n\ny, 2 ,"sub/c,d.png"\nz,10,' + f"{images / 'b.png'}\n"
    data = load_data(written(images, text), image_size=6)
    assert data.classes == ("2", "10")
    assert labels(data) == ["10", "2", "10"]
    assert data.batch([0, 1, 2])[0][:, 0, 0, 0].tolist() == [1, 3, 2]


def test_spellings_of_a_manifest(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    written(images, "path,label\r\na.png,x\r\nb.png,y")
    written(images, "label\tpath\nx\ta.png\ny\tb.png\n", "data.tsv")
    written(images, "\ufeffpath,label\na.png,x\nb.png,y\n", "excel.csv")
    written(images, "path,label\na.png,x\nb.png,y\n", "list.txt")
    for given in ("data.csv", "data.tsv", "excel.csv", "csv:list.txt", "csv:data.csv"):
        assert labels(load_data(given)) == ["x", "y"]


def test_unlabelled_manifest(images: Path) -> None:
    data = load_data(written(images, "path\na.png\nb.png\n"), labelled=False)
    assert (len(data), data.labels) == (2, None)
    blind = load_data(written(images, "path,label\na.png,\nb.png,\n"), labelled=False)
    assert blind.labels is None


@pytest.mark.parametrize(("text", "row", "message"), [
    ("", None, "the file is empty, expected a header like 'path,label'"),
    ("\n\n", None, "the file is empty"),
    ("path,label\n", None, "there is a header and no row below it"),
    ("path,Label\na.png,x\n", 1, "no column 'label'; the columns are path, Label: rename 'Label'"),
    ("paths,label\na.png,x\n", 1, "no column 'path'; the columns are paths, label: rename 'paths'"),
    ("path;label\na.png;x\n", 1, "the columns are path;label, and a manifest has 'path' and 'label'"
                                 " separated by commas"),
    ("\npath,label,path\na.png,x,y\n", 2, "the header has 'path' more than once"),
    ("path,label\na.png,x\n\nb,b.png,x\n", 4, "expected 2 columns, the row has 3; a text with a"),
    ("path,label\na.png\n", 2, "expected 2 columns, the row has 1"),
    ('path,label,note\na.png,x,"two\nlines"\nb.png, ,z\n', 4, "the label is empty"),
    ("path,label\n,x\n", 2, "the path is empty"),
    ("path,label\na.png,x\nc.png,x\n", 3, "the image 'c.png' does not exist (looked in "),
    ("path,label\na.png,x\nsub,x\n", 3, "the image 'sub' does not exist"),
    ('path,label\na.png,x\n"b.png,x\n', 3, "this is not CSV"),
    ("path,label\nbroken.png,x\n", 2, "the image '"),
])
def test_wrong_manifests(images: Path, text: str, row: int | None, message: str) -> None:
    (images / "broken.png").write_bytes(b"\x89PNG")
    error = failing(written(images, text))
    assert error.problem.startswith(message) or message in error.problem
    assert error.row == row
    assert str(error).startswith(f"{images / 'data.csv'}" + (f", row {row}: " if row else ": "))


def test_an_unreadable_image_says_what_to_do(images: Path) -> None:
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:45])
    data = load_data(written(images, "path,label\na.png,x\nb.png,y\n"))
    assert len(data.subset([0]).batch([0])[0]) == 1
    with pytest.raises(DataError, match=r"data\.csv, row 3: the image '.*b\.png' cannot be read "
                                        r"\(.+\): replace it, or delete the row"):
        data.subset([1]).batch([0])


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("path,label\na.png,café\n".encode("latin-1"))
    assert "the file is not UTF-8 text" in str(failing(path))


# Pixels


def row(values: str, label: str = "1") -> str:
    return f"{label},{values}\n"


def rows(n: int = 3, columns: int = 16) -> list[str]:
    return [",".join(str((7 * i + j) % 256) for j in range(columns)) for i in range(n)]


GOOD = row(rows(1)[0])


@pytest.mark.parametrize("header", [f"label,{GRID}\n", f"\n\nlabel,{PIXELS}\n", "", "\ufeff",
                                    "label," + ",".join(map(str, range(16))) + "\n",
                                    f'"label","{GRID.replace(",", chr(34) + "," + chr(34))}"\n'])
def test_pixels_with_any_header(tmp_path: Path, header: str) -> None:
    body = "".join(f"{label},{row}\n" for label, row in zip((9, 2, 9), rows(), strict=True))
    data = load_data(written(tmp_path, header + body))
    assert data.in_memory
    assert data.classes == ("2", "9")
    assert labels(data) == ["9", "2", "9"]
    images, _ = data.batch([2])
    assert images.dtype == torch.uint8
    assert images[0].tolist() == [[[14 + 4 * y + x for x in range(4)] for y in range(4)]]


def test_pixels_are_separated_by_tabs_in_a_tsv(tmp_path: Path) -> None:
    text = f"label,{PIXELS}\n5,{rows(1)[0]}\n".replace(",", "\t")
    assert labels(load_data(written(tmp_path, text, "data.tsv"))) == ["5"]


def test_a_header_of_two_lines(tmp_path: Path) -> None:
    header = PIXELS.replace("pixel0", '"pixel\n0"')
    assert labels(load_data(written(tmp_path, f"label,{header}\n{GOOD}"))) == ["1"]


def test_the_label_may_stand_anywhere(tmp_path: Path) -> None:
    data = load_data(written(tmp_path, f"{PIXELS},label\n{rows(1)[0]},3\n"))
    assert labels(data) == ["3"]
    assert data[0][0].flatten().tolist() == list(range(16))


def test_rectangles_and_colours(tmp_path: Path) -> None:
    names = ",".join(f"{y}x{x}" for y in range(1, 4) for x in range(1, 7))
    wide = load_data(written(tmp_path, f"label,{names}\n0,{rows(1, 18)[0]}\n"))
    assert wide[0][0].shape == (1, 3, 6)
    names = ",".join(f"p{i}" for i in range(48))
    colour = load_data(written(tmp_path, f"label,{names}\n0,{rows(1, 48)[0]}\n"))
    assert colour[0][0].shape == (3, 4, 4)
    assert colour[0][0][1, 0].tolist() == [16, 17, 18, 19]


def test_unlabelled_pixels(tmp_path: Path) -> None:
    pixels = rows(1)[0]
    for text in (f"{PIXELS}\n{pixels}\n", f"{pixels}\n", f"label,{PIXELS}\n5,{pixels}\n",
                 f"5,{pixels}\n"):
        data = load_data(written(tmp_path, text), labelled=False)
        assert data.labels is None
        assert data[0][0].flatten().tolist() == list(range(16))


def test_large_pixels_are_resized_and_small_ones_are_not(tmp_path: Path) -> None:
    names = ",".join(f"{y}x{x}" for y in range(1, 9) for x in range(1, 13))
    pixels = np.random.RandomState(0).randint(0, 256, 96)
    path = written(tmp_path, f"label,{names}\n0," + ",".join(map(str, pixels)) + "\n")
    assert load_data(path, image_size=8)[0][0].shape == (1, 8, 12)
    small = load_data(path, image_size=4)[0][0]
    picture = Image.fromarray(pixels.reshape(8, 12).astype(np.uint8))
    expected = picture.resize((6, 4), Image.Resampling.BICUBIC).crop((1, 0, 5, 4))
    assert torch.equal(small[0], torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize(("text", "line", "message"), [
    (GOOD + row("256" + ",0" * 15), 3, "pixel in column 2 is '256', expected a whole number from "),
    (GOOD + "\n" + row("0,-1" + ",0" * 14), 4, "the pixel in column 3 is '-1'"),
    (GOOD + row("0,0.5" + ",0" * 14), 3, "the pixel in column 3 is '0.5'"),
    (GOOD + row("0,1_0" + ",0" * 14), 3, "the pixel in column 3 is '1_0'"),
    (GOOD + row("0," + ",0" * 14), 3, "the pixel in column 3 is ''"),
    (GOOD + row("0" * 400 + "1" * 400 + ",0" * 15), 3, "the pixel in column 2 is '000"),
    (GOOD + row("0" + ",0" * 14), 3, "expected 17 columns, the row has 16"),
    (row("0" + ",0" * 16) * 2, 2, "expected 17 columns, the row has 18"),
    (GOOD + row(rows(1)[0], ""), 3, "the label is empty"),
    (GOOD + row(rows(1)[0], "cat"), 3, "the label is 'cat', expected a whole number from 0 to 32"),
    (GOOD + row(rows(1)[0], "-1"), 3, "the label is '-1', expected a whole number from 0"),
    (GOOD + row(rows(1)[0], "40000"), 3, "the label is '40000', expected a whole number from 0"),
    ("", None, "there is a header and no row below it"),
])
def test_wrong_pixels(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    error = failing(written(tmp_path, f"label,{PIXELS}\n{text}"))
    assert message in error.problem
    assert error.row == line


def test_pixels_that_only_numpy_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("strange")

    monkeypatch.setattr(np, "loadtxt", refuse)
    error = failing(written(tmp_path, f"label,{PIXELS}\n{GOOD}"))
    assert error.problem == "the pixels cannot be read (strange)"


@pytest.mark.parametrize(("header", "message"), [
    (PIXELS, "no column 'label'; the columns are pixel0, pixel1, pixel2, pixel3, pixel4, pixel5, "
             "pixel6, …, pixel15, and a manifest"),
    (f"labels,{PIXELS}", "rename 'labels' to 'label'"),
    (f"label,{PIXELS},pixel16", "17 pixel columns are no square image, grey or of three channels"),
    ("label," + ",".join(reversed(GRID.split(","))), "pixel columns are not 1x1, 1x2, … 1x1"),
    (f"label,{PIXELS},pixel3", "the header has 'pixel3' more than once"),
    ("1," + ",".join(["0"] * 17), "17 pixel columns are no square image"),
])
def test_wrong_headers_of_pixels(tmp_path: Path, header: str, message: str) -> None:
    error = failing(written(tmp_path, f"{header}\n"))
    assert message in error.problem
    assert error.row == 1
