"""Text becomes classes and text again, in one Unicode form, and what cannot be written is named."""
import random

import pytest

from essl_nb.core.registry import EsslError
from essl_nb.probes.vocabulary import BytePairs, Characters, TextForm, load_vocabulary

TEXTS = ["o păuniță roșie", "un papagal rosella", "o broască", "L'été, où va-t-il ?", "Ёлка и йод"]


def test_the_same_text_typed_in_two_ways_is_the_same_classes():
    vocabulary = Characters.of(TEXTS)
    assert vocabulary.encode("e\u0301te\u0301") == vocabulary.encode("\u00e9t\u00e9") and "é" in vocabulary.symbols
    assert TextForm(unicode="NFKC")("ﬁn") == "fin" and TextForm()("ﬁn") == "ﬁn"
    assert TextForm()("’Tis «rock ’n’ roll»…") == "tis rock n roll" and TextForm()("l’été") == "l'été"
    assert TextForm(lower=False)("Ёлка, И") == "Ёлка И"


@pytest.mark.parametrize("make", [Characters.of, lambda texts: BytePairs.of(texts, 60)], ids=["characters", "bpe"])
def test_classes_are_from_one_and_give_the_text_back(make, tmp_path):
    vocabulary = make(TEXTS)
    for text in TEXTS:
        classes = vocabulary.encode(text)
        assert min(classes) >= 1 and max(classes) <= len(vocabulary) and vocabulary.decode(classes) == vocabulary.form(text)
        assert vocabulary.unknown(text) == []
    assert vocabulary.unknown("un œu") == ["œ"] and vocabulary.decode(vocabulary.encode("un œu")) == "un u"
    again = load_vocabulary(vocabulary.save(tmp_path / "v"))
    assert again.symbols == vocabulary.symbols and again.form == vocabulary.form and again.encode(TEXTS[0]) == vocabulary.encode(TEXTS[0])
    assert vocabulary.decode([]) == "" and vocabulary.encode("?!") == []


def test_the_same_texts_give_the_same_vocabulary_whatever_their_order():
    mixed = random.Random(0).sample(TEXTS, len(TEXTS))
    assert Characters.of(TEXTS).symbols == Characters.of(mixed).symbols
    assert BytePairs.of(TEXTS, 60).model == BytePairs.of(TEXTS, 60).model


def test_rare_characters_can_be_left_out():
    kept = Characters.of(["aab", "aac"], least=2)
    assert kept.symbols == ("a",) and kept.unknown("abc") == ["b", "c"]


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(EsslError, match="3 byte-pair tokens cannot be learnt"):
        BytePairs.of(TEXTS, 3)
    with pytest.raises(EsslError, match="10000 byte-pair tokens cannot be learnt"):
        BytePairs.of(TEXTS, 10000)
    with pytest.raises(EsslError, match="No character"):
        Characters.of(["", "?!"])
    with pytest.raises(EsslError, match="each character once"):
        Characters("aab")
    with pytest.raises(EsslError, match="NFC"):
        TextForm(unicode="nfc")
    with pytest.raises(EsslError, match="no file"):
        load_vocabulary(tmp_path)
    folder = BytePairs.of(TEXTS, 60).save(tmp_path / "v")
    (folder / "tokens.model").write_bytes(b"\x0a\x03abc" * 5)
    with pytest.raises(EsslError):
        load_vocabulary(folder)
    (folder / "tokens.model").unlink()
    with pytest.raises(EsslError, match="tokens.model"):
        load_vocabulary(folder)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    import essl_nb.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(EsslError, match=r"essl_nb\[words\]"):
        BytePairs.of(TEXTS, 60)
