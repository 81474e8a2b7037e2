"""One reading of text files: whoever reads prompts, JSON or CSV reads them alike, whatever wrote the file."""

import argparse
import codecs
import json
import re

import pytest
from PIL import Image

from stagevar.cli import model_options
from stagevar.errors import UsageError
from stagevar.prompts.prompt_files import natural_key, read_prompt_file
from stagevar.text_files import read_json, read_json_values, read_table, split_lines
from stagevar.yaml_files import read_yaml
from tuner.cli import plan
from tuner.config import prompts as study_prompts
from tuner.config.space import PromptSource
from tuner.config.space_file import load_space
from tuner.evalkit.image_folder import read_folder
from tuner.evalkit.user_study import read_votes
from tuner.evalkit.verbs import prompts
from tuner.metrics import prompt_sets
from tuner.metrics.answers_file import read_answers, read_questions
from tuner.metrics.base import prompt_text
from tuner.metrics.detections import read_detections, read_metadata

# U+2028, U+0085, a form feed and a no-break space are characters; a comma, quotes and a semicolon look like CSV.
PROMPTS = [
    "a red circle",
    'a "blue" star, dotted; left\u2028of\x85it',
    "un caf\xe9\x0c et \U0001f600\xa0deux",
    "#4 [x] {y}: z",
]
TEXT = "\n".join(PROMPTS) + "\n"
LINES = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in PROMPTS)
CSV = "prompt\n" + "".join('"' + prompt.replace('"', '""') + '"\n' for prompt in PROMPTS)

#: What systems and programs do to the same text, by name.
BYTES = {
    "utf-8": lambda text: text.encode(),
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16 le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "mark and crlf": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "no last line end": lambda text: text.removesuffix("\n").encode(),
    "blank lines": lambda text: ("\n\n" + text.replace("\n", "\n \t\n") + "\n\n").encode(),
    "mixed line ends": lambda text: text.replace("\n", "\r\n", 1).replace("\n", "\r", 2).encode(),
    "utf-32 and crlf": lambda text: text.replace("\n", "\r\n").encode("utf-32"),
    "utf-32 be": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
    "utf-16 le and crlf": lambda text: codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"),
    "utf-16 be and cr": lambda text: codecs.BOM_UTF16_BE + text.replace("\n", "\r").encode("utf-16-be"),
    "two marks": lambda text: 2 * codecs.BOM_UTF8 + text.encode(),
    "a mark on every line": lambda text: re.sub(r"^", "\ufeff", text, flags=re.MULTILINE).encode(),
    "mark and cr": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r").encode(),
    "blank lines and crlf": lambda text: ("\r\n" + text.replace("\n", "\r\n\r\n")).encode(),
    "many last line ends": lambda text: (text + 5 * "\r\n").encode(),
}

#: The same four prompts, twenty times and more: file name and bytes.
AWKWARD = {f"text, {name}": ("p.txt", write(TEXT)) for name, write in BYTES.items()} | {
    "marks in the middle": ("p.txt", "".join(f"\ufeff{prompt}\n" for prompt in PROMPTS).encode()),
    "space around": ("p.TXT", "".join(f"  {prompt} \t\n" for prompt in PROMPTS).encode()),
    "no suffix": ("prompts", TEXT.encode()),
    "lines": ("p.jsonl", LINES.encode()),
    "lines, upper case": ("P.JSONL", LINES.encode()),
    "ndjson": ("p.ndjson", LINES.encode()),
    "lines as json": ("p.json", LINES.encode()),
    "lines as txt": ("p.txt", LINES.encode()),
    "lines, utf-16": ("p.jsonl", BYTES["utf-16 le"](LINES)),
    "lines of strings": ("p.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS).encode()),
    "list": ("p.json", json.dumps([{"prompt": prompt} for prompt in PROMPTS]).encode()),
    "list as jsonl": ("p.jsonl", json.dumps([{"prompt": prompt} for prompt in PROMPTS]).encode()),
    "list over lines": ("p.JSON", json.dumps([{"prompt": prompt} for prompt in PROMPTS], indent=2).encode()),
    "list of strings as txt": ("p.txt", json.dumps(PROMPTS, indent=1).encode()),
    "wrapped list": ("p.json", json.dumps({"prompts": PROMPTS}).encode()),
    "csv": ("p.csv", CSV.encode()),
    "csv of Excel": ("p.CSV", codecs.BOM_UTF8 + ("sep=;\r\n" + CSV.replace("\n", "\r\n")).encode()),
    "csv, header in capitals, empty column": (
        "p.csv",
        CSV.replace("prompt\n", "Prompt,\n").replace('"\n', '",\n').encode(),
    ),
    "tsv": (
        "p.tsv",
        "\ufeff".encode("utf-16-le") + ("prompt\tn\n" + CSV[7:].replace('"\n', '"\t\n')).encode("utf-16-le"),
    ),
}


@pytest.fixture(params=AWKWARD.values(), ids=AWKWARD.keys())
def awkward(request, tmp_path):
    name, data = request.param
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_there_are_twenty_awkward_files():
    assert len({write(TEXT) for write in BYTES.values()}) >= 20
    assert len(set(AWKWARD.values())) >= 35


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture per prompt, without prompts of their own."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(len(PROMPTS)):
        Image.new("RGB", (4, 4)).save(folder / f"x-{index}.png")
    return folder


def every_reading(path, pictures):
    """The prompts of a file or folder by who reads them."""
    asked = plan.with_prompts(load_space("nano"), str(path), None).prompts.source
    sets = study_prompts.load_prompts(PromptSource(source=asked, search=2, heldout=2, micro_batch=2))
    order = {prompt: place for place, prompt in enumerate(PROMPTS)}
    return {
        "stagevar-tune": [prompt_text(prompt) for prompt in study_prompts.read_prompts(asked)],
        "a study's sets": sorted([*sets["search"].texts, *sets["heldout"].texts], key=lambda text: order.get(text, -1)),
        "checks before loading": [prompt_text(prompt) for _, prompt in study_prompts.prompt_lines(path)],
        "stagevar-eval": [prompt["prompt"] for prompt in prompt_sets.read_prompts(path)],
        "stagevar-eval images": [prompt_text(image.prompt) for image in read_folder(pictures, path)],
        "stagevar analyze": model_options.prompts_of_file(argparse.Namespace(prompts_file=path, prompts=100)),
    }


def test_every_reader_of_prompts_reads_alike(awkward, pictures):
    readings = every_reading(awkward, pictures)
    assert readings == dict.fromkeys(readings, PROMPTS)


def test_every_reader_takes_a_folder_with_a_prompt_in_each_file(tmp_path, pictures):
    for index, (prompt, write) in enumerate(zip(PROMPTS, BYTES.values(), strict=False)):
        (tmp_path / f"x-{index}.txt").write_bytes(write(prompt + "\n"))
    readings = every_reading(tmp_path, pictures)
    assert readings == dict.fromkeys(readings, PROMPTS)


METADATA = [{"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt} for prompt in PROMPTS]


@pytest.mark.parametrize("write", BYTES.values(), ids=BYTES.keys())
def test_readers_of_json_and_csv_take_the_same_bytes(tmp_path, write):
    def lines(entries, name):
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (tmp_path / name).write_bytes(write(text))
        return tmp_path / name

    assert read_metadata(lines(METADATA, "metadata.jsonl")) == METADATA
    images = read_detections(
        lines([{"name": f"{i}", "metadata": m, "detections": []} for i, m in enumerate(METADATA)], "d.jsonl")
    )
    assert [image.metadata["prompt"] for image in images] == PROMPTS
    cells = "".join('a,{},"{}",yes\n'.format(i, p.replace('"', '""')) for i, p in enumerate(PROMPTS))
    (tmp_path / "a.csv").write_bytes(write("item_id,proposition_id,text,answer\n" + cells))
    questions, answers = read_answers(tmp_path / "a.csv")
    assert [question.prompt for question in questions] == PROMPTS and set(answers.values()) == {1.0}
    (tmp_path / "q.csv").write_bytes(write("item_id,proposition_id,text\n" + cells.replace(",yes", "")))
    assert [question.prompt for question in read_questions(tmp_path / "q.csv")] == PROMPTS
    (tmp_path / "x.json").write_bytes(write(json.dumps({"prompts": PROMPTS}, indent=1) + "\n"))
    assert read_json(tmp_path / "x.json") == {"prompts": PROMPTS}


@pytest.mark.parametrize("write", BYTES.values(), ids=BYTES.keys())
def test_readers_of_what_a_folder_a_vote_a_result_and_a_space_say_take_the_same_bytes(tmp_path, write):
    for index, metadata in enumerate(METADATA):
        samples = tmp_path / "images" / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(samples / "0000.png")
        text = json.dumps(metadata, ensure_ascii=False, indent=1 if index else None) + "\n"
        (samples.parent / "metadata.jsonl").write_bytes(write(text))
    assert [image.prompt for image in read_folder(tmp_path / "images")] == METADATA

    def document(name, content):
        (tmp_path / name).write_bytes(write(json.dumps(content, ensure_ascii=False, indent=1) + "\n"))
        return tmp_path / name

    key = document("key.json", {"study": "s", "pairs": {"p": {"name": PROMPTS[1], "a": "left"}}})
    votes = document("votes.json", {"study": "s", "voter": PROMPTS[2], "answers": [{"pair": "p", "choice": "left"}]})
    assert read_votes(read_json(key), [votes]) == [(PROMPTS[2], PROMPTS[1], "A")]
    rows = document("result.json", {"results": {"metrics": {"psnr": {"rows": [{"value": 1.5}, {"value": 2}]}}}})
    assert [list(values) for values in prompts._values_of([rows], "psnr", 2)] == [[1.5, 2.0]]
    space = write("prompts: {source: nano}\nquality:\n  clip_score: 1.0\n")
    (tmp_path / "space.yaml").write_bytes(space.replace(b"\t", b""))  # no tab may stand on a line of YAML, blank or not
    assert read_yaml(tmp_path / "space.yaml", "space") == {
        "prompts": {"source": "nano"},
        "quality": {"clip_score": 1.0},
    }


def test_lines_end_at_line_feeds_and_carriage_returns_only():
    assert split_lines("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ri\n\nj") == [
        "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
        "h",
        "i",
        "",
        "j",
    ]
    assert split_lines("") == [] and split_lines("a\n") == ["a"]


REFUSED = {
    "not UTF-8": ("p.txt", b"a dog\na caf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
    "cut UTF-16": (
        "p.txt",
        codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"x",
        "line 1: byte 0x78 is not UTF-16-LE",
    ),
    "binary": ("p.txt", b"a\nb\0c", "line 2 has a zero byte"),
    "UTF-16 without a mark": ("p.txt", "a dog".encode("utf-16-le"), "zero byte"),
    "empty": ("p.txt", b"", "holds no prompt"),
    "blank": ("p.jsonl", b"\n \n", "holds no prompt"),
    "empty list": ("p.json", b"[]", "holds no prompt"),
    "empty csv": ("p.csv", b"", "holds no prompt"),
    "header alone": ("p.csv", b"prompt\n", "no rows"),
    "plain lines as jsonl": ("p.jsonl", b"a red dog\n", "line 1: not JSON"),
    "a broken line": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not JSON"),
    "a broken line as txt": ("p.txt", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
    "a cut list": ("p.txt", b'[{"prompt": "a"},\n', "line 2: not JSON"),
    "another key": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"caption": "b"}\n',
        r"line 2 has no text under 'prompt' \(keys: caption",
    ),
    "a number": ("p.json", b"[\n1]", "line 2 has no text"),
    "an empty prompt": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "line 2: the prompt is empty"),
    "a key twice": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n',
        "line 2: key 'prompt' appears twice",
    ),
    "NaN": (
        "p.jsonl",
        b'{"prompt": "NaN", "x": 1}\n{"prompt": "NaN", "x": NaN}\n',
        "line 2: NaN is not a valid JSON number",
    ),
    "half a character": ("p.jsonl", b'{"prompt": "a \\ud83d"}\n', "line 1: .* is half a character"),
    "no column": ("p.csv", b"a red dog\na blue dog\n", "no column 'prompt' .*\\.txt"),
    "an open quote": ("p.csv", b'prompt\nx\n"a red dog\na blue dog\n', "line 3: not CSV"),
    "too many cells": ("p.csv", b"prompt\na red dog, running\n", "line 2: 2 cells under 1 columns"),
    "a column twice": ("p.csv", b"prompt,Prompt\na,b\n", "line 1: column 'prompt' appears twice"),
    "yaml": ("p.yaml", b"- a red dog\n", "not a supported type of prompt file"),
    "bad metadata": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"prompt": "b", "tag": "colors", "include": 3}\n',
        "line 2: .*include",
    ),
    "misspelled metadata": (
        "p.json",
        b'[{"prompt": "b",\n "tag": "colors", "includes": []}]',
        "line 1: unknown key 'includes'",
    ),
    "deep": ("p.json", b"[" * 100_000, "nested too deeply"),
    "long number": ("p.json", b'[{"prompt": "a", "seed": ' + b"1" * 5000 + b"}]", "line 1: not JSON"),
}


@pytest.mark.parametrize(("name", "data", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_prompt_file_is_refused_with_its_line(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    for read in (study_prompts.read_prompts, prompt_sets.read_prompts):
        with pytest.raises(UsageError, match=named) as raised:
            read(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none.txt", tmp_path / "folder", tmp_path / "nu\0l"):
        with pytest.raises(UsageError, match="prompts"):
            read_prompt_file(path)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_json(tmp_path / "folder")


def test_a_key_twice_is_found_at_any_depth(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        '{"a": {"b": [1, {"c": "{\\"c\\": 1, \\"c\\": 2}",\n "d": 1}]},\n "e": {"f": 1, "g": {},\n "\\u0066": 2}}'
    )
    with pytest.raises(UsageError, match="line 4: key 'f' appears twice"):
        read_json(path)
    path.write_text('{"a": {"b": 1}, "c": {"b": "a"}, "d": [{"b": 1}, {"b": 2}]}')
    assert read_json(path)["d"][1] == {"b": 2}


def test_values_know_their_lines(tmp_path):
    path = tmp_path / "x"
    path.write_text('\n[1, {"a":\n 2},\n\n "[", [3\n]]')
    assert read_json_values(path) == [(2, 1), (2, {"a": 2}), (5, "["), (5, [3])]
    path.write_text('{"a": 1}\r\r\n\n{"a": 2}')
    assert read_json_values(path) == [(1, {"a": 1}), (4, {"a": 2})]
    path.write_text('{"a":\n 1}')
    assert read_json_values(path) == [(1, {"a": 1})]


def test_tables_know_their_lines_and_keep_line_ends_in_cells(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('A, B\n\n1,"x\ny"\n2,z\n')
    table = read_table(path)
    assert table.columns == ("a", "b")
    assert table.rows == ((3, {"a": "1", "b": "x\ny"}), (5, {"a": "2", "b": "z"}))


def test_prompts_of_a_folder_come_in_natural_order(tmp_path):
    for name in ("x-10", "x-2", "x-1", ".hidden"):
        (tmp_path / f"{name}.txt").write_bytes(codecs.BOM_UTF8 + name.encode())
    assert [entry.metadata for entry in read_prompt_file(tmp_path)] == [
        {"item_id": name, "prompt": name} for name in ("x-1", "x-2", "x-10")
    ]
    (tmp_path / "x-3.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"x-3\.txt is empty"):
        read_prompt_file(tmp_path)
    assert sorted(["b1", "a10", "a9", "a", "a09", "10", "9"], key=natural_key) == [
        "9",
        "10",
        "a",
        "a09",
        "a9",
        "a10",
        "b1",
    ]
