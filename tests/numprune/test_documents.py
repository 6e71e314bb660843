import json
import sys

import pyarrow
import pytest
from pyarrow import ipc, parquet

from numprune import arrow
from numprune.chat import renderer
from numprune.documents import Document, content_of, read_documents
from numprune.errors import InputError
from tests.conftest import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
)
CONVERSATION = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def records(*texts):
    return [{"text": text} for text in texts]


def lines(*items):
    return "\n".join(json.dumps(item) for item in items)


def chatting(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return renderer(tokenizer)


def test_a_plain_file_is_one_document_and_json_lines_are_many(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x\u2028y", "name": "first"}\n\n{"text": "z"}\n')
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert documents == [Document("a.txt", "one\n\ntwo"), Document("first", "x\u2028y"), Document("b.jsonl:3", "z")]


def test_line_endings_and_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [document.text for document in documents] == ["one\ntwo\nthree\n", "x", "y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(records("x", "y"), indent=2)),
        ("a.json", lines(*records("x", "y"))),
        ("a.ndjson", lines(*records("x", "y"))),
        ("A.JSONL", lines(*records("x", "y"))),
    ],
)
def test_records_in_json(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_documents([tmp_path / name]) == [Document(f"{name}:1", "x"), Document(f"{name}:2", "y")]


def test_records_in_parquet_and_in_a_saved_dataset(tmp_path):
    table = pyarrow.table({"text": ["x", "y"], "id": [1, 2], "name": ["first", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    folder = tmp_path / "saved"  # as `Dataset.save_to_disk` writes it
    folder.mkdir()
    for number, part in enumerate((table.slice(0, 1), table.slice(1))):
        with ipc.new_stream(str(folder / f"data-{number}.arrow"), table.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{n}.arrow"} for n in (0, 1)]}))

    for path in (tmp_path / "a.parquet", folder):
        assert read_documents([path]) == [Document("first", "x"), Document(f"{path.name}:2", "y")]
    assert [path.name for path in content_of(folder)] == ["state.json", "data-0.arrow", "data-1.arrow"]
    assert content_of(tmp_path / "a.parquet") == [tmp_path / "a.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"a\xff", "cannot be read as UTF-8 text"),
        ("a.txt", b"a\0b", "contains NUL bytes, so it is not text"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text, not text; convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.txt", b'{"text": "a"}\n{"text": "b"}', "contains JSON; rename it to .jsonl"),
        ("a.txt", b'{\n "text": "a"\n}', "contains JSON"),
        ("a", b'[\n {"text": "a"}\n]', "contains JSON"),
        ("a.txt", b"PAR1", "is Parquet, not text; rename it to .parquet"),
        ("a.jsonl.gz", b"\x1f\x8b", "is compressed, not text; unpack it first"),
        ("a.txt.zst", b"text", "is compressed"),
        ("a.txt", b"\x28\xb5\x2f\xfd", "is compressed"),
        ("a.csv", b"text\na", "is a table, not text; write its text column as .jsonl"),
        ("a.tsv", b"text\na", "is a table"),
        ("a.pdf", b"%PDF-1.7", "is a formatted document, not text; extract its text first"),
        ("a", b"%PDF-1.7", "is a formatted document"),
        ("a.html", b"<p>a", "is a formatted document"),
        ("a.arrow", b"", "is an Arrow file, not text; give the folder that `datasets` saved"),
        ("a.jsonl", b"\x1f\x8b", "is compressed"),
        ("a.jsonl", b'{"text": 1}', "line 1 must be an object with a string field \"text\"; its fields are 'text'"),
        ("a.jsonl", b'{"id": 1, "content": "a"}', "its fields are 'id', 'content'"),
        ("a.jsonl", b'{"text": "a"}\n[1]', 'line 2 must be an object with a string field "text"'),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a", "name": 1}', 'line 1: its field "name" must be a string'),
        ("a.jsonl", b'{"text": "half \\ud800"}', "line 1 contains a lone surrogate"),
        (
            "a.json",
            b'{\n "text": "a"\n}',
            "line 1 is not JSON .*; a .json file must be an array of records or a record per",
        ),
        ("a.json", b'["a"]', "item 1 must be an object"),
        ("a.json", b"[]", "contains no documents"),
        ("a.json", b'[{"text": "a"}', "the file is not JSON"),
        (
            "a.jsonl",
            lines({"messages": CONVERSATION}).encode(),
            "it has messages: --chat, or data.chat = true, renders",
        ),
        ("a.parquet", b"PAR1", "pyarrow cannot read it: "),
    ],
)
def test_files_that_are_not_text_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_documents([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_all_bad_files_are_reported_together(tmp_path):
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(InputError, match=r"a\.csv' is a table.*; text file .*nowhere\.txt' does not exist"):
        read_documents([tmp_path / "a.csv", tmp_path / "b.txt", tmp_path / "nowhere.txt"])


def test_a_file_given_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a\.txt: given twice; it would count twice, so omit one"):
        read_documents([tmp_path / "a.txt", str(tmp_path / "a.txt")])


def test_folders_that_are_not_datasets_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(
        InputError, match=r"train: is a folder, but not one that `Dataset.save_to_disk` wrote; give the"
    ):
        read_documents([tmp_path / "train"])
    for names in ([], ["../secret.arrow"]):
        state = {"_data_files": [{"filename": name} for name in names]}
        (tmp_path / "train" / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match="is a folder, but not one"):
            read_documents([tmp_path / "train"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match="contains the splits train; give the folder of one of them"):
        read_documents([tmp_path])


def test_a_table_without_text_names_its_columns(tmp_path):
    parquet.write_table(pyarrow.table({"prompt": ["x"], "answer": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"no column named \"text\" or \"messages\" or \"codes\"; .* 'prompt', 'answer'"
    ):
        read_documents([tmp_path / "a.parquet"])


def test_a_missing_pyarrow_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r'a\.parquet: needs the package pyarrow: pip install "numprune\[par'):
        list(arrow.rows(tmp_path / "a.parquet", ["text"]))


# --- separators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("blank-line", {"a:2": " = One =", "a:5": "first\nparagraph", "a:9": " = Two =", "a:11": "second"}),
        (r"^(?= = )", {"a:2": " = One = \n\n\nfirst\nparagraph\n \n\n", "a:9": " = Two =\n\nsecond\n"}),
        (r"\n\n\n", {"a:2": "\n = One = ", "a:5": "first\nparagraph\n \n\n = Two =\n\nsecond\n"}),
    ],
)
def test_separators_of_a_plain_text(tmp_path, split, expected):
    (tmp_path / "a").write_text("\n = One = \n\n\nfirst\nparagraph\n \n\n = Two =\n\nsecond\n")
    found = {document.name: document.text for document in read_documents([tmp_path / "a"], split)}
    assert {name: text.strip() for name, text in found.items()} == {n: text.strip() for n, text in expected.items()}


@pytest.mark.parametrize("end", ["", "\n", "\n \n\n", "\n\t"])
def test_blank_lines_and_the_final_newline_belong_to_no_document(tmp_path, end):
    (tmp_path / "a").write_text(f" \n\none \n\t\n\n  two\nthree{end}")
    assert [document.text for document in read_documents([tmp_path / "a"], "blank-line")] == ["one ", "  two\nthree"]


def test_records_are_not_split(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*records("one\n\ntwo")))
    assert len(read_documents([tmp_path / "a.jsonl"], "blank-line")) == 1


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("(", 'must be "file", "blank-line" or a regular expression'),
        ("x*", "must not match an empty string"),
        (r"[\s\S]+", "a' contains no documents"),
        ("blank-lines", r"split 'blank-lines' separates nothing in .*a; correct it, or omit it"),
    ],
)
def test_useless_separators_are_refused(tmp_path, split, message):
    (tmp_path / "a").write_text("one\n\ntwo")
    with pytest.raises(InputError, match=message):
        read_documents([tmp_path / "a"], split)


# --- conversations --------------------------------------------------------------------------------


def test_messages_are_rendered_by_the_chat_template(tmp_path):
    items = [{"messages": CONVERSATION}, {"messages": CONVERSATION[:1], "tools": [{}], "name": "b"}, {"text": "plain"}]
    (tmp_path / "a.jsonl").write_text(lines(*items))
    assert read_documents([tmp_path / "a.jsonl"], render=chatting()) == [
        Document("a.jsonl:1", "<user>Hello?</s><assistant>Hello.</s>"),
        Document("b", "<user>Hello?</s>1 tools"),
        Document("a.jsonl:3", "plain"),
    ]


def test_null_columns_are_left_out_of_messages(tmp_path):
    template = (
        "{% for message in messages %}{{ message['content'] }}{% if message.call is defined %}!{% endif %}{% endfor %}"
    )
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "call": "c"}]]
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    documents = read_documents([tmp_path / "a.parquet"], render=chatting(template))
    assert [document.text for document in documents] == ["a", "b!"]


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": CONVERSATION}, None, "line 1: the model has no chat template"),
        (
            {"messages": CONVERSATION},
            "{{ raise_exception('no system prompt') }}",
            "accept this conversation: no system",
        ),
        ({"messages": CONVERSATION}, "{{ messages.__class__.__mro__ }}", "accept this conversation: .*unsafe"),
        ({"messages": CONVERSATION}, "{% if", "does not accept this conversation: "),
        ({"messages": []}, TEMPLATE, 'line 1: its field "messages" must be a list of messages'),
        ({"messages": "hello"}, TEMPLATE, "must be a list of messages"),
        (
            {"messages": [{"from": "user"}]},
            TEMPLATE,
            'each of its messages must be an object with a string field "role"',
        ),
        ({"messages": CONVERSATION, "tools": 1}, TEMPLATE, 'its field "tools" must be a list'),
    ],
)
def test_unrenderable_conversations_are_refused(tmp_path, record, template, message):
    (tmp_path / "a.jsonl").write_text(lines(record))
    with pytest.raises(InputError, match=message):
        read_documents([tmp_path / "a.jsonl"], render=chatting(template))


def test_a_template_with_a_date_always_renders_the_same_date(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"messages": CONVERSATION}))
    (document,) = read_documents([tmp_path / "a.jsonl"], render=chatting("{{ strftime_now('%d %b %Y') }}"))
    assert document.text == "26 Jul 2024"
