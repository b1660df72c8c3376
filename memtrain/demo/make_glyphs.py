"""Packs the demo's emoji pictures into `glyphs.zip` (a script, run once; needs fonttools and emoji).

    python -m memtrain.demo.make_glyphs \\
        --font NotoColorEmoji.ttf --package "fonts-noto-color-emoji 2.042-0+deb12u1"

The pictures are the bitmaps (CBDT table) of Noto Color Emoji; the names are Unicode CLDR's, through the
package `emoji`. Flags and skin tones are left out: they are too alike at 64 pixels.
"""

import argparse
import io
import math
import zipfile
from pathlib import Path

import emoji
from fontTools.ttLib import TTFont
from PIL import Image

CELL = 64  # pixels, side of a square cell of the atlas
FOLDER = Path(__file__).parent
VARIATION_SELECTOR = 0xFE0F  # asks for the colour form; the font's ligatures are spelt without it
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)  # subdivision flags


def caption_name(cldr_name: str) -> str:
    """The words of a CLDR name as captions write them: ":woman’s_hat:" gives "womans hat"."""
    words = "".join(c for c in cldr_name.lower().replace("_", " ") if c.isalnum() or c in " -")
    return " ".join(words.split())


def is_wanted(sequence: str, name: str) -> bool:
    """Whether an emoji is neither a flag nor a skin tone variant."""
    unwanted = any(ord(c) in block for c in sequence for block in (SKIN_TONES, REGIONAL_INDICATORS, TAGS))
    return not unwanted and not name.endswith(("flag", "flags"))


def wanted_emoji() -> dict[str, str]:
    """Name → code points of every fully-qualified emoji; names that two emoji share are dropped."""
    by_name: dict[str, list[str]] = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["fully_qualified"]:
            name = caption_name(entry["en"])
            if name and is_wanted(sequence, name):
                by_name.setdefault(name, []).append(sequence)
    return {name: sequences[0] for name, sequences in by_name.items() if len(sequences) == 1}


def ligatures(font: TTFont) -> dict[tuple[str, ...], str]:
    """Glyph names of a sequence → glyph name of its ligature (GSUB lookups of type 4)."""
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else []:
            for first, ligature_set in table.ligatures.items():
                for ligature in ligature_set:
                    found[(first, *ligature.Component)] = ligature.LigGlyph
    return found


def glyph_images(font: TTFont, sequences: dict[str, str]) -> dict[str, Image.Image]:
    """Name → RGBA bitmap (136×128) of the emoji that the font draws as one glyph, sorted by name."""
    characters, joined = font.getBestCmap(), ligatures(font)
    bitmaps = font["CBDT"].strikeData[0]
    images = {}
    for name, sequence in sorted(sequences.items()):
        glyphs = tuple(characters.get(ord(c)) for c in sequence if ord(c) != VARIATION_SELECTOR)
        glyph = glyphs[0] if len(glyphs) == 1 else joined.get(glyphs)
        if glyph in bitmaps:
            images[name] = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
    return images


def square_cell(image: Image.Image) -> Image.Image:
    """The bitmap centred in a square and scaled to CELL; Pillow's resize of RGBA premultiplies by alpha."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


def atlas(images: list[Image.Image]) -> Image.Image:
    """The cells row by row in a grid about as wide as it is high."""
    columns = math.ceil(math.sqrt(len(images)))
    grid = Image.new("RGBA", (columns * CELL, math.ceil(len(images) / columns) * CELL))
    for place, image in enumerate(images):
        grid.paste(square_cell(image), (place % columns * CELL, place // columns * CELL))
    return grid


def pack(path: Path, members: dict[str, bytes]) -> None:
    """Writes a zip whose bytes depend on the members alone: fixed times, nothing of this machine."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            stored = name.endswith(".webp")  # compressed already
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the emoji pictures of the demo.")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf with a CBDT table")
    parser.add_argument("--package", required=True, help="package and version the font came from")
    parser.add_argument("--out", type=Path, default=FOLDER / "glyphs.zip")
    arguments = parser.parse_args()

    font = TTFont(arguments.font)
    images = glyph_images(font, wanted_emoji())
    encoded = io.BytesIO()
    atlas(list(images.values())).save(encoded, "WEBP", quality=90, method=6)
    version = font["name"].getDebugName(5).split(" This ")[0]
    built_from = (
        f"Built by make_glyphs.py from {arguments.package}\n(font {version})\n"
        f"and the names in the Python package emoji {emoji.__version__}.\n\n"
    )
    license_text = built_from + (FOLDER / "GLYPHS_LICENSE.txt").read_text(encoding="utf-8")
    pack(
        arguments.out,
        {
            "atlas.webp": encoded.getvalue(),
            "names.txt": ("\n".join(images) + "\n").encode(),
            "LICENSE.txt": license_text.encode(),
            "make_glyphs.py": Path(__file__).read_bytes(),
        },
    )
    print(f"{len(images)} glyphs, {arguments.out.stat().st_size / 1e6:.2f} MB: {arguments.out}")


if __name__ == "__main__":
    main()
