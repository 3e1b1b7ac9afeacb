"""Normalisation of captions before tokenization.

`fix_text` repairs text damaged on the web, `tidy` is CLIP's normalisation, `clean_caption` is the cleaner of
DeepFloyd-IF, PixArt and LlamaGen. They match the originals, which use ftfy and BeautifulSoup, with the exception that
Python's own parser extracts the text of broken HTML.

Everything is linear in the length of any caption: nested entities are resolved PASSES deep, and with more than OPEN
unclosed tags, tags are found without a parser.
"""

from __future__ import annotations

import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from ftfy import fix_encoding, fixes

# ------------------------------------------------------------------------------------------------------- plain text


PASSES = 8
FIXES = (
    fix_encoding,
    fixes.fix_c1_controls,
    fixes.fix_latin_ligatures,
    fixes.fix_character_width,
    fixes.uncurl_quotes,
    fixes.fix_line_breaks,
    fixes.fix_surrogates,
    fixes.remove_terminal_escapes,
    fixes.remove_control_chars,
)


def fix_text(text: str) -> str:
    """A text with one form for equivalent characters: `ftfy.fix_text` (Speer 2019) with a bounded number of passes.

    HTML entities (up to the first line with a `<`), text decoded with a wrong codec, C1 controls, ligatures, full-width
    forms, curled quotes, line ends, surrogates, terminal escapes and control characters; NFC.
    """
    lines, escaped = [], True
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        escaped = escaped and "<" not in line
        for _ in range(PASSES):
            before, line = line, fixes.unescape_html(line) if escaped else line
            for fix in FIXES:
                line = fix(line)
            line = unicodedata.normalize("NFC", line)
            if line == before:
                break
        lines.append(line)
    return "".join(lines)


def tidy(caption: str) -> str:
    """A caption as CLIP reads it: repaired, without HTML entities, one blank between words, lower case."""
    return " ".join(_unescape(_unescape(fix_text(caption))).split()).lower()


def _unescape(text: str) -> str:
    """`html.unescape`, also for numbers with more digits than Python converts to an integer."""
    return html.unescape(_with_short_numbers(text))


def _with_short_numbers(text: str) -> str:
    return re.sub(r"&#0*+[0-9]{9,}", "&#999999999", text)


# ------------------------------------------------------------------------------------------- captions from the web

DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
DASHES += "\ufe31\ufe32\ufe58\ufe63\uff0d"
CJK = "\u31c0-\u4dff\u4e00-\u9fff"
"""Strokes, enclosed and compatible forms, extension A, hexagrams, unified ideographs; kana and hangul are kept."""
DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# These patterns are linear in the text's length, unlike the authors'. If one cannot match at a position, group 1
# consumes the rest of the same run of characters, and is kept.


def _address(scheme: str) -> str:
    """Pattern of an address with a scheme, or of a domain. If no domain starts here, none starts later in the run."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN}|((?:(?!\b{scheme}:)[a-z0-9.\-])++))"


ADDRESSES = (
    ("<person>", "person"),  # placeholder for hidden names in some data sets
    (_address("https?"), r"\1"),
    (_address("www"), r"\1"),
)
MARKS = (
    (r"@\w+\b", ""),
    (f"[{CJK}]+", ""),
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # publication time of an article
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})|(\S+)", r"\1"),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
LEFTOVERS = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*+\b", " "),
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # 640x480, with an x of three alphabets
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """A caption without web artefacts, in lower case, as DeepFloyd-IF wrote it.

    It removes addresses, HTML, @names, ideographs, article numbers, file names and shop phrases; makes dashes and
    quotes plain; replaces brackets and other marks with blanks; and splits names-joined-by-hyphens if there are more
    than three hyphens. The order of words is kept.
    """
    text = _replace(unquote_plus(caption).strip().lower(), ADDRESSES)
    text = _replace(_Text.of(text), MARKS)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = _unescape(_unescape(fix_text(text))).strip()
    return _replace(text, LEFTOVERS).strip()


def clean_twice(caption: str) -> str:
    """`clean_caption` applied twice, as for LlamaGen's text encoder in training."""
    return clean_caption(clean_caption(caption))


def _replace(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, by in rules:
        text = re.sub(pattern, by, text)
    return text


class _Text(HTMLParser):
    """Collects the text between tags, without that of scripts and styles."""

    OPEN = 16

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    @classmethod
    def of(cls, text: str) -> str:
        # The parser searches all of the rest for the end of each tag.
        if len(re.findall(r"<!--|<!\[|<[a-z/!?](?![^<>]*+>)", text)) > cls.OPEN:
            return _unescape(re.sub(r"<[a-z/!?][^<>]*+>", "", text))
        parser = cls()
        parser.feed(_with_short_numbers(text))
        parser.close()
        return "".join(parser.parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)
