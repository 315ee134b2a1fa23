"""The beam finds the most likely text, as all alignments added up in float64 say; greedy needs no library."""
import itertools
import math

import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.probes.decode import BeamDecoder, TextEvaluation, TextScore, blank_notice, greedy_texts, text_errors
from essl_nb.probes.vocabulary import BytePairs, Characters

AB = Characters("ab")


def random_posteriors(seed: int, T: int, classes: int, sharpness: float = 2.0) -> torch.Tensor: # (T,V+1)
    logits = sharpness * torch.randn(T, classes + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(-1)


def every_text(logp: torch.Tensor) -> dict: # text as classes → probability, all alignments added in float64
    "The slow reference: every alignment of (T,V+1) posteriors."
    T, classes = logp.shape
    found = {}
    for path in itertools.product(range(classes), repeat=T):
        text = tuple(k for k, _ in itertools.groupby(path) if k)
        found[text] = found.get(text, 0.0) + math.exp(sum(float(logp[t, c]) for t, c in enumerate(path)))
    return found


def prefix_search(logp: torch.Tensor, width: int) -> tuple: # classes, log-probability
    "Prefix beam search (1408.2873, algorithm 1 without a language model) in float64, as plainly as it can be written."
    beams = {(): (0.0, -math.inf)}  # prefix → log-probabilities of ending in a blank, in its last class
    add = lambda a, b: max(a, b) + math.log1p(math.exp(-abs(a - b))) if max(a, b) > -math.inf and a != b else max(a, b) + (a == b) * math.log(2)
    for row in logp.tolist():
        new = {}

        def put(prefix, blank=-math.inf, other=-math.inf):
            b, o = new.get(prefix, (-math.inf, -math.inf))
            new[prefix] = add(b, blank), add(o, other)

        for prefix, (b, o) in beams.items():
            put(prefix, blank=add(b, o) + row[0])
            for c in range(1, len(row)):
                if prefix and c == prefix[-1]:
                    put(prefix, other=o + row[c])
                    put(prefix + (c,), other=b + row[c])
                else:
                    put(prefix + (c,), other=add(b, o) + row[c])
        beams = dict(sorted(new.items(), key=lambda item: -add(*item[1]))[:width])
    best = max(beams, key=lambda p: add(*beams[p]))
    return best, add(*beams[best])


@pytest.mark.parametrize("seed", range(6))
def test_the_two_references_agree(seed):
    logp = random_posteriors(seed, 5, 2)
    best, score = prefix_search(logp, 1000)
    texts = every_text(logp)
    assert math.isclose(sum(texts.values()), 1.0, rel_tol=1e-9)
    assert best == max(texts, key=texts.get) and math.isclose(math.exp(score), texts[best], rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_a_wide_beam_finds_the_most_likely_text(seed):
    logp = random_posteriors(seed, 7, 3, sharpness=1.0)
    texts = every_text(logp)
    best, second = sorted(texts.values())[-1:-3:-1]
    vocabulary = Characters("abc")
    found = BeamDecoder(vocabulary, 500)(logp[None], torch.tensor([7]))[0]
    assert texts[tuple(vocabulary.encode(found))] >= best * (1 - 1e-4), f"{found}: the best has {best:.4f}, the second {second:.4f}"


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_is_prefix_search(seed):
    logp = random_posteriors(100 + seed, 30, 5, sharpness=3.0)
    vocabulary = Characters("abcde")
    found = BeamDecoder(vocabulary, 200)(logp[None], torch.tensor([30]))[0]
    assert tuple(vocabulary.encode(found)) == prefix_search(logp, 200)[0]


@pytest.mark.parametrize("width", [1, 50])
def test_where_posteriors_are_peaked_a_beam_is_greedy(width):
    generator = torch.Generator().manual_seed(width)
    vocabulary = Characters(" abcdefg")
    classes = torch.randint(0, 9, (3, 40), generator=generator)
    logp = torch.nn.functional.one_hot(classes, 9).mul(20.0).log_softmax(-1)
    lengths = torch.tensor([40, 25, 0])
    assert BeamDecoder(vocabulary, width)(logp, lengths) == greedy_texts(logp, lengths, vocabulary)


def test_byte_pairs_are_decoded_by_both():
    vocabulary = BytePairs.of(["un paon", "une grenouille", "un paon royal"] * 3, 25)
    classes = [c for k in vocabulary.encode("un paon royal") for c in (k, 0)]
    logp = torch.nn.functional.one_hot(torch.tensor([classes]), 26).mul(20.0).log_softmax(-1)
    lengths = torch.tensor([len(classes)])
    assert greedy_texts(logp, lengths, vocabulary) == BeamDecoder(vocabulary, 10)(logp, lengths) == ["un paon royal"]


def test_a_list_of_words_limits_the_text_and_keeps_words_separate(tmp_path):
    (tmp_path / "words.txt").write_text("ab\nba\nabba\nœ\n", encoding="utf-8")
    vocabulary = Characters(" ab")
    frames = vocabulary.encode("ab ba")  # an a that is nearly a b
    logp = torch.nn.functional.one_hot(torch.tensor([frames]), 4).mul(4.0).log_softmax(-1)
    decoder = BeamDecoder(vocabulary, 20, words=str(tmp_path / "words.txt"))
    assert decoder(logp, torch.tensor([len(frames)])) == ["ab ba"]
    spoilt = logp.clone()
    spoilt[0, 0] = torch.tensor([-9.0, -9.0, -0.9, -0.5])  # greedy hears "bb ba"
    assert greedy_texts(spoilt, torch.tensor([5]), vocabulary) == ["b ba"] and decoder(spoilt, torch.tensor([5])) == ["ab ba"]


ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t0
-1.0\t</s>
-0.5\tab\t-0.3
-2.0\tba\t-0.3

\\2-grams:
-0.1\t<s> ab
-3.0\t<s> ba

\\end\\
"""


def test_a_language_model_by_file_decides_between_words_that_sound_alike(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA, encoding="utf-8")
    (tmp_path / "words.txt").write_text("ab\nba\n", encoding="utf-8")
    vocabulary = Characters(" ab")
    logp = torch.tensor([[0.02, 0.01, 0.42, 0.55], [0.02, 0.01, 0.54, 0.43]]).log()[None]  # a little more like "ba"
    kw = dict(words=str(tmp_path / "words.txt"))
    assert BeamDecoder(vocabulary, 20, **kw)(logp, torch.tensor([2])) == ["ba"]
    assert BeamDecoder(vocabulary, 20, lm=str(tmp_path / "lm.arpa"), lm_weight=1.0, **kw)(logp, torch.tensor([2])) == ["ab"]


def test_errors_are_those_of_a_table_in_plain_python():
    def slow(a, b):
        table = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if i * j == 0}
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
        return table[len(a), len(b)]

    generator = torch.Generator().manual_seed(0)
    word = lambda: "".join("ab "[i] for i in torch.randint(0, 3, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)).strip()
    for _ in range(40):
        a, b = word(), word()
        assert text_errors(a, b) == ((slow(a, b), len(a)), (slow(a.split(), b.split()), len(a.split())))
    assert text_errors("un paon", "") == ((7, 7), (2, 2)) and text_errors("", "a") == ((1, 0), (1, 0))


def test_a_score_has_an_interval_and_its_counts():
    score = TextScore.of("cer", [(1, 10), (0, 10), (3, 10), (2, 10)], list("abcd"))
    assert score.value == 0.15 and score.low < 0.15 < score.high and score.n == 4 and "CER 15.0%" in str(score)
    assert TextScore.of("wer", [(1, 2)], ["a"]).low is None
    with pytest.raises(EsslError):
        TextScore.of("cer", [(1, 0)], ["a"])
    with pytest.raises(EsslError, match="allowed: 'cer', 'wer'"):
        TextEvaluation(["a"], ["x"], ["x"], 0.0, 0.0).score("per")


def test_the_blank_collapse_is_said_late_and_its_beginning_is_not_an_alarm():
    silent = TextEvaluation(["a"], ["a long sentence of many characters"], [""], 3.0, 1.0)
    assert "BLANK COLLAPSE" not in blank_notice(silent, 10, 100) and "CTC begins so" in blank_notice(silent, 10, 100)
    assert "BLANK COLLAPSE" in blank_notice(silent, 50, 100) and "learning rate" in blank_notice(silent, 50, 100)
    assert blank_notice(silent, 50, 100, frozen=60).endswith("CTC begins so.")
    assert blank_notice(TextEvaluation(["a"], ["un paon"], ["un"], 1.0, 0.9), 50, 100) is None


def test_bad_input_is_answered(tmp_path, monkeypatch):
    with pytest.raises(EsslError, match="at least 1"):
        BeamDecoder(AB, 0)
    with pytest.raises(EsslError, match="no file"):
        BeamDecoder(AB, lm=str(tmp_path / "none.arpa"))
    (tmp_path / "words.txt").write_text("œ\n", encoding="utf-8")
    with pytest.raises(EsslError, match="holds no word"):
        BeamDecoder(AB, words=str(tmp_path / "words.txt"))
    import essl_nb.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(EsslError, match=r"essl_nb\[words\]"):
        BeamDecoder(AB)
    assert greedy_texts(torch.tensor([[[0.1, 0.8, 0.1]]]).log(), torch.tensor([1]), AB) == ["a"]
