"""BERT's tokenizer: lower case without accents, split at spaces and punctuation, words into known pieces."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


class WordPiece:
    """The ids of the pieces of a text, greedily the longest first (Devlin et al. 2019; Wu et al. 2016).

    path: a file with one piece per line, those inside a word with the prefix ##. A text cannot contain the special
    pieces: "[SEP]" is four pieces of ordinary text.
    """

    def __init__(self, path: str | Path):
        index = {piece: n for n, piece in enumerate(Path(path).read_text("utf-8").splitlines())}
        missing = [special for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if special not in index]
        if missing:
            raise ValueError(f"{path}: a WordPiece vocabulary has a line {' and one '.join(missing)}")
        self.pad, self.unknown, self.first, self.last = (index[f"[{s}]"] for s in ("PAD", "UNK", "CLS", "SEP"))
        self.tokenizer = Tokenizer(models.WordPiece(index, unk_token="[UNK]", max_input_chars_per_word=100))
        self.tokenizer.normalizer = normalizers.BertNormalizer()
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def __call__(self, text: str) -> list[int]:
        """Ids without [CLS] and [SEP]."""
        whole = text.encode("utf-8", "ignore").decode()  # a half of a surrogate pair is no text
        return self.tokenizer.encode(whole, add_special_tokens=False).ids
