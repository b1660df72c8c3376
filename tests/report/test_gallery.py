import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from memtrain.report.gallery import Match, write_gallery
from memtrain.report.plane import Point, draw_plane

HOSTILE = "<script>alert(1)</script>\"' onload='x' & {0} {caption}"


class Reader(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self):
        super().__init__()
        self.tags, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.text.append(data)


def pair(**said) -> Match:
    shade = np.full((64, 48, 3), 200, dtype=np.uint8)
    defaults = dict(caption="a fox", key="00000.tar/1", group="canary", said="RMSE 0.1", is_copy=True)
    return Match(**(defaults | dict(generated=shade, original=shade // 2) | said))


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_captions_keys_and_groups_show_as_text_whatever_they_hold(tmp_path):
    hostile = pair(caption=HOSTILE, key=HOSTILE, group=HOSTILE, said=HOSTILE)
    write_gallery(tmp_path / "g.html", HOSTILE, HOSTILE, [hostile])
    reader = read(tmp_path / "g.html")
    assert "script" not in reader.tags and reader.tags.count("img") == 2
    assert "".join(reader.text).count(HOSTILE) == 7  # title, heading, rule and the four of the pair


def test_a_gallery_is_one_file_with_its_pictures_in_the_order_given(tmp_path):
    big = np.zeros((700, 350, 3), dtype=np.uint8)
    second = pair(caption="second", generated=big, is_copy=False)
    write_gallery(tmp_path / "g.html", "h", "r", [pair(), second])
    page, reader = (tmp_path / "g.html").read_text(), read(tmp_path / "g.html")
    assert not re.search(r"https?://|<link|src=\"(?!data:)", page)
    sizes, shades = [], []
    for image in reader.images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1]))) as found:
            sizes.append(found.size)
            shades.append(round(np.asarray(found).mean()))
    assert sizes == [(48, 64), (48, 64), (128, 256), (48, 64)]
    assert shades == pytest.approx([200, 100, 0, 100], abs=2)
    assert page.index("a fox") < page.index("second") and page.count('<li class="copy">') == 1
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_a_gallery_of_nothing_is_a_page(tmp_path):
    write_gallery(tmp_path / "g.html", "h", "r", [])
    assert "0 shown" in "".join(read(tmp_path / "g.html").text)


def test_a_plane_has_a_point_for_each_model_whatever_it_is_called(tmp_path):
    points = [Point("$x_", 0.8, 0.06), Point("<b>", 0.0, 0.07), Point("\\frac", 0.2, 0.065)]
    draw_plane(tmp_path / "p.png", points, "copies $", "loss")
    draw_plane(tmp_path / "one.png", points[:1], "copies", "loss")
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 500 and np.asarray(image.convert("L")).std() > 5


def test_numbers_of_points_that_lie_together_stand_in_one_label(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Axes, "annotate", lambda self, text, *args, **kwargs: said.append(text))
    points = [Point(f"model {n}", 0.8 + n / 1000, 0.06) for n in range(9)]
    draw_plane(tmp_path / "many.png", [*points, Point("far", 0.1, 0.09)], "copies", "loss")
    assert said == ["1, 2, 3, 4, 5, 6, 7, 8, 9", "10", "better"]
