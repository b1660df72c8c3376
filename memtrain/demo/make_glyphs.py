"""Packs emoji pictures for the demo: Noto Color Emoji into `glyphs.zip`, Fluent Emoji into `fluent.zip` (a script, run
once for each; needs emoji, for Noto fonttools too).

    python -m memtrain.demo.make_glyphs noto NotoColorEmoji.ttf --package "fonts-noto-color-emoji 2.042-0+deb12u1"
    python -m memtrain.demo.make_glyphs fluent assets/ --package "@lobehub/fluent-emoji-3d 1.1.0"

Noto's pictures are the bitmaps (CBDT table) of the font, Fluent's the files of the npm package, named by code points.
The names are Unicode CLDR's, through the package `emoji`. Flags and skin tones are left out: they are too alike at 64
pixels.
"""

import argparse
import io
import math
import zipfile
from pathlib import Path

import emoji
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
    """Name → code points of every fully-qualified emoji, sorted by name; names that two emoji share are dropped."""
    by_name: dict[str, list[str]] = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["fully_qualified"]:
            name = caption_name(entry["en"])
            if name and is_wanted(sequence, name):
                by_name.setdefault(name, []).append(sequence)
    return {name: sequences[0] for name, sequences in sorted(by_name.items()) if len(sequences) == 1}


def ligatures(font) -> dict[tuple[str, ...], str]:
    """Glyph names of a sequence → glyph name of its ligature (GSUB lookups of type 4)."""
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else []:
            for first, ligature_set in table.ligatures.items():
                for ligature in ligature_set:
                    found[(first, *ligature.Component)] = ligature.LigGlyph
    return found


def noto_images(source: Path, sequences: dict[str, str]) -> tuple[dict[str, Image.Image], str]:
    """Name → RGBA bitmap (136×128) of the emoji that the font draws as one glyph, and the font's version."""
    from fontTools.ttLib import TTFont

    font = TTFont(source)
    characters, joined = font.getBestCmap(), ligatures(font)
    bitmaps = font["CBDT"].strikeData[0]
    images = {}
    for name, sequence in sequences.items():
        glyphs = tuple(characters.get(ord(c)) for c in sequence if ord(c) != VARIATION_SELECTOR)
        glyph = glyphs[0] if len(glyphs) == 1 else joined.get(glyphs)
        if glyph in bitmaps:
            images[name] = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
    return images, f" (font {font['name'].getDebugName(5).split(' This ')[0]})"


def fluent_images(source: Path, sequences: dict[str, str]) -> tuple[dict[str, Image.Image], str]:
    """Name → RGBA picture (256×256) of the emoji that the folder has a file of: 1f3c3-200d-2640-fe0f.webp."""
    images = {}
    for name, sequence in sequences.items():
        file = source / ("-".join(f"{ord(c):04x}" for c in sequence) + ".webp")
        if file.exists():
            images[name] = Image.open(file).convert("RGBA")
    return images, ""


SOURCES = {  # what reads the pictures, what is written, its licence, the quality of the atlas
    "noto": (noto_images, "glyphs.zip", "GLYPHS_LICENSE.txt", 90),
    "fluent": (fluent_images, "fluent.zip", "FLUENT_LICENSE.txt", 85),
}


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
    parser.add_argument("pictures", choices=SOURCES)
    parser.add_argument("source", type=Path, help="NotoColorEmoji.ttf with a CBDT table, or a folder of webp files")
    parser.add_argument("--package", required=True, help="package and version the pictures came from")
    parser.add_argument("--out", type=Path, help="(default: beside this script)")
    arguments = parser.parse_args()

    images_of, file, license_file, quality = SOURCES[arguments.pictures]
    images, version = images_of(arguments.source, wanted_emoji())
    encoded = io.BytesIO()
    atlas(list(images.values())).save(encoded, "WEBP", quality=quality, method=6)
    built_from = (
        f"Built by make_glyphs.py from {arguments.package}{version}\n"
        f"and the names in the Python package emoji {emoji.__version__}.\n\n"
    )
    license_text = built_from + (FOLDER / license_file).read_text(encoding="utf-8")
    out = arguments.out or FOLDER / file
    pack(
        out,
        {
            "atlas.webp": encoded.getvalue(),
            "names.txt": ("\n".join(images) + "\n").encode(),
            "LICENSE.txt": license_text.encode(),
            "make_glyphs.py": Path(__file__).read_bytes(),
        },
    )
    print(f"{len(images)} glyphs, {out.stat().st_size / 1e6:.2f} MB: {out}")


if __name__ == "__main__":
    main()
