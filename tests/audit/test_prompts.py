import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.audit.prompts import COLUMNS, read_prompts, together


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_prompt_a_line_without_the_blank_ones(tmp_path):
    prompts = read_prompts(write(tmp_path / "p.txt", "\ufefffox\n\n  a cat, <script>  \r\nze\u2028bra"))
    assert prompts.texts == ["fox", "a cat, <script>", "ze\u2028bra"] and prompts.labels is None


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_csv_of_either_delimiter_and_usual_column(tmp_path, column, delimiter):
    text = f'url{delimiter}{column}\nu{delimiter}"a, b; c"\nv{delimiter}plain\n'
    assert read_prompts(write(tmp_path / "p.csv", text)).texts == ["a, b; c", "plain"]


def test_the_named_column_decides(tmp_path):
    path = write(tmp_path / "p.csv", "caption;Alt, text\none;two\n")
    assert read_prompts(path, column="Alt, text").texts == ["two"]


def test_jsonl_and_parquet(tmp_path):
    lines = [
        json.dumps({"TEXT": "fox\u2028den", "n": 1}),
        "",
        json.dumps({"TEXT": None}),
        json.dumps({"TEXT": "cat"}),
    ]
    assert read_prompts(write(tmp_path / "p.jsonl", "\n".join(lines))).texts == ["fox\u2028den", "cat"]
    assert read_prompts(write(tmp_path / "s.jsonl", '"fox"\n"cat"\n')).texts == ["fox", "cat"]
    pq.write_table(pa.table({"Prompt": ["fox", "", "cat"], "memorized": [1.0, 0.0, 0.0]}), tmp_path / "p.parquet")
    found = read_prompts(tmp_path / "p.parquet", label="memorized")
    assert found.texts == ["fox", "cat"] and found.labels == [True, False]


def test_half_a_surrogate_pair_can_be_stored(tmp_path):
    assert read_prompts(write(tmp_path / "p.jsonl", r'{"text": "fox \ud83e"}')).texts == ["fox ?"]


def test_canaries_of_a_run_are_told_from_its_reference(tmp_path):
    text = "key,caption,group\n1,a,canary\n2,b,reference\n3,c,sacrificed\n4,,canary\n"
    prompts = read_prompts(write(tmp_path / "canaries.csv", text), label="group", group="group")
    assert prompts.texts == ["a", "b"] and prompts.labels == [True, False]
    assert prompts.groups == ["canary", "reference"]


def test_two_files_are_labels(tmp_path):
    memorized = read_prompts(write(tmp_path / "m.csv", "caption,kind\na,verbatim\nb,template\n"), group="kind")
    other = read_prompts(write(tmp_path / "o.txt", "c\n"))
    both = together(memorized, other)
    assert both.texts == ["a", "b", "c"] and both.labels == [True, True, False]
    assert both.groups == ["verbatim", "template", ""]


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("p.csv", "", {}, "is empty; it needs at least one prompt"),
        ("p.txt", "", {}, "is empty"),
        ("p.csv", "caption\n", {}, "is empty"),
        ("p.txt", " \n\n", {}, "column text is empty in every row"),
        (
            "p.csv",
            "words,url\na,b\n",
            {},
            r"has no column caption, .*; say prompts.column=NAME, of 'words', 'url'",
        ),
        (
            "p.csv",
            "caption,url\na,b\n",
            {"column": "txt"},
            r"prompts.column=txt: .* no such column, but 'caption', 'url'",
        ),
        ("p.csv", "caption,url\na,b\n", {"label": "kind"}, r"prompts.label=kind: .* no such column"),
        (
            "p.csv",
            "caption,url\na,b\n",
            {"label": "url"},
            r"prompts.label=url: .* has 'b' there; use one of memorized",
        ),
        ("p.csv", "caption,url\na, b,c\n", {}, "line 2: more fields than the header's 2; quote a caption"),
        ("p.jsonl", '{"text": "a"}\n{"text"\n', {}, "line 2 is no JSON"),
        ("p.jsonl", "[1]\n", {}, "line 1: an object or a string is needed, got list"),
        ("p.txt", "a\n", {"column": "text"}, "is plain text, it has no columns"),
        ("p.doc", "a\n", {}, r"cannot read \.doc; use \.txt, \.csv, \.jsonl, \.parquet"),
        ("p.parquet", "a\n", {}, "is no parquet file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, name, text, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(write(tmp_path / name, text), **options)
    assert "\n" not in str(raised.value) and str(tmp_path / name) in str(raised.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path)
    (tmp_path / "p.txt").write_bytes(b"fox \xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 4\)"):
        read_prompts(tmp_path / "p.txt")
