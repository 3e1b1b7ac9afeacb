"""Text from outside is what its author wrote, or one clear fault."""

import codecs
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i_jax.core.errors import DataError
from t2i_jax.core.text import clean_text, decode_text, mend, read_lines, split_lines
from t2i_jax.data.records import as_captions, decode, encode

MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\0"))


@given(TEXT, st.sampled_from(list(MARKS)))
def test_text_with_a_mark_is_decoded(text, encoding):
    assert decode_text(MARKS[encoding] + text.encode(encoding)) == text


@given(TEXT)
def test_utf_8_needs_no_mark(text):
    assert decode_text(text.encode()) == text


@given(st.binary())
def test_any_bytes_are_text_or_one_fault_with_its_byte(data):
    try:
        decode_text(data).encode()
    except DataError as error:
        assert str(error).startswith("byte ")


@pytest.mark.parametrize(
    "data, message",
    [
        ("caf\xe9 au lait".encode("cp1252"), r"byte 3 \(0xe9\) is no UTF-8: likely cp1252 or latin-1"),
        (codecs.BOM_UTF8 + b"caf\xe9", r"byte 6 \(0xe9\)"),
        ("[BMW] <caf\xe9>".encode("cp1252"), r"byte 10 \(0xe9\) is no UTF-8: likely cp1252 or latin-1"),
        ("a dog".encode("utf-16-le"), "byte 0: .*UTF-16 without a byte order mark"),
        ("a dog".encode("utf-16-be"), "byte 0: .*UTF-16 without a byte order mark"),
        (codecs.BOM_UTF16_LE + b"a\0b", "byte 4 is no UTF-16"),
        (b"\x1f\x8b\x08abc", r"byte 1 \(0x8b\) is no UTF-8: it is a gzip file"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"byte 0 \(0x89\) is no UTF-8: it is a PNG image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "byte 0: it is a Git LFS pointer"),
        (codecs.BOM_UTF16_LE + "\ud83d".encode("utf-16-le", "surrogatepass"), "byte 2 is no UTF-16"),
    ],
)
def test_other_encodings_are_refused_by_file_and_byte(data, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt: {message}"):
        read_lines(tmp_path / "a.txt")


@given(st.lists(TEXT.filter(lambda t: not set("\r\n") & set(t))), st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_line_ends_with_a_line_break_alone(lines, end):
    assert split_lines(end.join(lines)) == (lines or [""])


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c"])
def test_other_separators_are_part_of_a_line(inside, tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one{inside}line\r\n\r\n  another \rthird\n".encode())
    assert read_lines(tmp_path / "a.txt") == [f"one{inside}line", "another", "third"]


@pytest.mark.parametrize(
    "data", [b"", b"\n \r\n\t", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\0", b"\0\0\0\0", b" \0\n"]
)
def test_blank_lines_are_none(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_lines(tmp_path / "a.txt") == []


@given(st.text(st.characters()))
def test_clean_text_is_text(text):
    """It can be stored and tokenised; whole characters stay, and cleaning it again changes nothing."""
    clean = clean_text(text)
    assert clean.encode().decode() == clean == clean_text(clean) == clean.strip()
    assert "\0" not in clean
    assert [c for c in clean if c.isalnum()] == [c for c in mend(text) if c.isalnum()]


def test_halves_of_pairs_are_joined_or_replaced():
    assert clean_text("a \ud83d\ude00") == "a \U0001f600"
    assert clean_text("a \ud83d") == "a \ufffd" == clean_text("a \ude00")
    assert clean_text(os.fsdecode(b"caf\xe9")) == "caf\ufffd"
    assert clean_text("\ufeff a dog\0") == "a dog"


@pytest.mark.parametrize(
    "value, captions",
    [
        ("a dog", ["a dog"]),
        (b"\xef\xbb\xbfa dog\n", ["a dog"]),
        (["one", None, "", " two ", b"three"], ["one", "two", "three"]),
        (("one",), ["one"]),
        (None, []),
        (float("nan"), []),
        ([], []),
        ("\0", []),
        ("\ufeff", []),
    ],
)
def test_captions_of_files_and_columns(value, captions):
    found = as_captions(value)
    assert found == captions and not found.fault and (captions or found.missing)


@pytest.mark.parametrize("value", [7, 1.5, True, {"text": "a dog"}, [{"text": "a dog"}], ["a dog", 3], b"caf\xe9"])
def test_captions_that_are_no_text_say_so(value):
    found = as_captions(value)
    assert found == [] and found.fault


@given(st.text(st.characters()))
def test_any_string_can_be_stored_in_a_record(text):
    back = decode(encode({"key": text}))
    assert back["key"] == mend(text)
