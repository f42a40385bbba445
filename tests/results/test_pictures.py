"""Clips as mp4, as a strip, and side by side with the words that belong to them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from wan_distill.system import pictures

CHINESE = "一只红色的球"


def test_without_an_encoder_a_strip_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    file = pictures.write_video(tmp_path / "a.mp4", numpy.random.rand(3, 16, 32, 3), 16)
    assert file.suffix == ".png"
    assert pictures.Image.open(file).size == (96, 16)


def test_the_sheet_shows_each_samplers_frames_in_their_place(tmp_path):
    shades = torch.linspace(0, 1, 4).view(1, 4, 1, 1, 1).expand(2, 4, 48, 32, 3)
    file = tmp_path / "sheet.png"
    pictures.contact_sheet(file, {"teacher": shades, "student": 1 - shades}, ["a", "b"], frames=3)
    sheet = pictures.Image.open(file)
    assert sheet.size == (190 + 3 * 66, 2 * (24 + 2 * 98 + 2))  # 48 x 32, enlarged twice
    centres = [190 + 32 + column * 66 for column in range(3)]
    for block in (0, 222):
        rows = [[sheet.getpixel((x, block + 24 + r * 98 + 48))[0] for x in centres] for r in (0, 1)]
        assert rows == [[0, 170, 255], [255, 85, 0]]  # frames 0, 2 and 3 of 4
    assert [f.name for f in tmp_path.iterdir()] == ["sheet.png"]


def test_a_prompt_is_drawn_as_one_line_within_the_sheet(tmp_path):
    clip = torch.ones(1, 1, 96, 96, 3)
    for name, prompt in (("short", "a b"), ("broken", "a\n b"), ("long", "a b " * 1000)):
        pictures.contact_sheet(tmp_path / name, {"": clip}, [prompt], frames=1)
    short, broken, long = (
        numpy.asarray(pictures.Image.open(tmp_path / name))[:24]
        for name in ("short", "broken", "long")
    )
    assert (short < 255).any() and (short == broken).all()
    assert (long[:, 200:] < 255).any() and (long[:, -6:] == 255).all()


# -------------------------------------------------------------------------------------------- fonts


def test_english_searches_no_installed_font(monkeypatch):
    def search():
        yield pytest.fail("fonts were searched")

    monkeypatch.setattr(pictures, "installed_fonts", search)
    prompt = 'a red ball, "fast" & round (50%)'
    font, words = pictures.font_for(prompt)
    assert words == prompt and not pictures.missing_in(font, prompt)


def test_what_no_font_can_draw_is_written_as_an_escape(monkeypatch):
    monkeypatch.setattr(pictures, "FONT_FOLDERS", ())
    font, words = pictures.font_for("a 球 b")
    assert words == r"a \u7403 b" and not pictures.missing_in(font, words)


def test_another_script_gets_a_font_that_has_it(monkeypatch):
    """Stands in for installed fonts: Cyrillic, then Chinese too, then one without letters."""
    has = {"default": "a b", "cyrillic": "a bшар", "chinese": "a bшар" + CHINESE, "none": ""}
    monkeypatch.setattr(pictures.ImageFont, "load_default", lambda size: "default")
    monkeypatch.setattr(pictures, "installed_fonts", lambda: iter(["cyrillic", "chinese", "none"]))
    monkeypatch.setattr(pictures, "missing_in", lambda font, text: set(text) - set(has[font]))
    assert pictures.font_for("a b") == ("default", "a b")
    assert pictures.font_for("шар") == ("cyrillic", "шар")
    assert pictures.font_for(CHINESE) == ("chinese", CHINESE)
    assert pictures.font_for("шар " + CHINESE + "é") == ("chinese", "шар " + CHINESE + r"\xe9")


def test_installed_fonts_are_those_that_load_plain_ones_first(tmp_path, monkeypatch):
    default = pictures.ImageFont.load_default(pictures.TEXT_SIZE)
    for name in ("b.ttf", "a-Bold.ttf"):
        (tmp_path / name).write_bytes(default.font_bytes)
    (tmp_path / "a.otf").write_bytes(b"no font")
    (tmp_path / "readme.txt").write_bytes(default.font_bytes)
    monkeypatch.setattr(pictures, "FONT_FOLDERS", (str(tmp_path), str(tmp_path / "nowhere")))
    opened = [font.path for font in pictures.installed_fonts()]
    assert [str(path) for path in opened] == [str(tmp_path / n) for n in ("b.ttf", "a-Bold.ttf")]


def test_a_video_appears_once_it_is_complete(tmp_path, monkeypatch):
    def torn(frames, file, **options):
        Path(file).write_bytes(b"half a video")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "export_to_video", torn)
    with pytest.raises(OSError, match="space"):
        pictures.write_video(tmp_path / "clip.mp4", numpy.zeros((2, 16, 16, 3)), 8)
    assert not (tmp_path / "clip.mp4").exists()
