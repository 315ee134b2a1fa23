"""Study: runs over the band of healthy ones, alarms in sentences, a log that grows, and a small study that is run, stopped and resumed."""
import json
import math
import shutil
import time

import numpy as np
import plotly.graph_objects as go
import pytest
import soundfile
from madeup import make_study
from test_stream_tab import chirp

from essl_nb.app.compare import compare_updates
from essl_nb.app.curves import CurvesFile
from essl_nb.app.library import Studies
from essl_nb.app.small_study import OwnStudy, estimated_seconds, form_grid, offered_probes, run_small_study
from essl_nb.app.study_tab import OWN, StudyController, alarms_html, runs_caption, runs_csv
from essl_nb.app.work import DONE, FAILED, STOPPED, Jobs
from essl_nb.core.config import to_json
from essl_nb.core.places import results_dir, study_dir
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.train.config import PretrainConfig
from essl_nb.viz.runs import LogTail, folder_curves, kept_panels, run_curve, runs_figure, runs_finding, study_curves

MIXER = list_mixers()[0]


def config(**more) -> dict:
    return to_json(PretrainConfig(EncoderConfig(MIXER, dim=32, depth=2), **more))


def log(steps: int, factor=1.0, rank=20.0) -> list:
    "Rows as a run writes them: a loss that falls as healthy ones do, or as many times more."
    rows = []
    for step in range(20, steps + 1, 20):
        row = dict(step=step, hours=step / 225, loss=factor * (8 + 8 * math.exp(-step / 300)), masked_accuracy=0.1 * step / steps, grad_norm=1.0, masked_share=0.4, silent_share=0.0)
        if step % 240 == 0:
            row |= dict(valid_loss=row["loss"], valid_masked_accuracy=row["masked_accuracy"], valid_effective_rank=rank, valid_dim=192, valid_frames=9600, valid_predicted_perplexity=200.0, valid_target_largest=0.01)
        rows.append(row)
    return rows


def test_a_shipped_study_is_drawn_over_its_band():
    runs = study_curves(results_dir() / "streaming")
    fig = runs_figure(runs, runs[2].name)
    lines = [t for t in fig.data if (t.meta or {}).get("role") == "run"]
    assert len(lines) == len(runs) * len(kept_panels(runs)) and [t.line.width for t in lines].count(2.5) == len(kept_panels(runs))
    assert {t.meta["run"] for t in lines if t.line.width == 2.5} == {runs[2].name}
    assert any((t.meta or {}).get("role") == "band" for t in fig.data) and "5 healthy runs" in runs_caption(runs, runs[2].name)
    assert "gradient norm" in runs_caption(runs, None).split("Not kept")[1], "what the curves do not hold is said"


def test_an_ill_run_is_said_with_its_cause_and_place():
    asked = config(steps=1200)
    good = run_curve(log(1200), asked, "good, seed 0", MIXER, "clusters")
    bad = run_curve(log(1200, rank=2.0), asked, "bad, seed 0", MIXER, "clusters")
    assert not good.alarms and [a.name for a in bad.alarms] == ["dimensional collapse"]
    text = alarms_html([good, bad], "bad, seed 0")
    assert "dimensional collapse</b>, since step 720 (3.20 h of audio). The frames span 2.0 effective dimensions" in text and "Lower" not in text.split("<ul>")[0]
    assert "No alarm" in alarms_html([good, bad], "good, seed 0") and "Alarms of others: bad, seed 0" in alarms_html([good, bad], "good, seed 0")
    assert runs_finding([good, bad], "bad, seed 0").startswith("1 of 2 runs raise an alarm. bad, seed 0: dimensional collapse since step 720.")
    assert len(runs_figure([good, bad], "bad, seed 0").layout.shapes) > len(runs_figure([good, bad], "good, seed 0").layout.shapes)
    high = run_curve(log(480, factor=2.0), asked, "high", MIXER, "clusters")
    assert "loss outside the band" in [a.name for a in high.alarms]
    assert "<img" not in alarms_html([run_curve(log(1200), asked, "<img src=x>", MIXER, "clusters")], "<img src=x>")
    with pytest.raises(EsslError, match="No run has numbers yet"):
        runs_figure([run_curve([], asked, "new", MIXER, "clusters")])


def test_a_growing_log_is_read_from_its_last_line(tmp_path):
    tail, path = LogTail(tmp_path), tmp_path / "metrics.jsonl"
    (tmp_path / "config.json").write_text(json.dumps(config(steps=200)))
    lines = "".join(json.dumps(r) + "\n" for r in log(200))
    for end in (len(lines) // 3, len(lines) // 2, len(lines)):
        path.write_text(lines[:end])
        assert tail.more() and tail.at == lines[:end].rfind("\n") + 1 and not tail.more()
    assert len(tail.curve().log.rows) == 10 and kept_panels([tail.curve()]) == ["loss", "masked accuracy", "gradient norm"]
    path.write_text(lines[: len(lines) // 2])  # resumed from an earlier state
    assert tail.more() and len(tail.rows) < 10


class Listen:
    def __init__(self, folder):
        self.corpus_source, self.corpus = str(folder), load_corpus(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A controller over a made-up study with curves beside it that cannot be read, and a corpus of a few clips."
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder / "opened", seeds=1, names=list_mixers()[:2])
    shutil.copytree(results_dir() / "streaming" / "seeds", folder / "curves_of_runs")
    (folder / "noise").mkdir()
    (folder / "noise" / "learning.jsonl").write_bytes(bytes(range(128, 256)))
    corpus = folder / "sound"
    corpus.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        soundfile.write(corpus / f"{i}.wav", chirp(4.0) * 0.5 + 0.05 * generator.standard_normal(64000).astype("float32"), 16000)
    jobs = Jobs()
    yield StudyController(Studies(folder / "opened"), Listen(corpus), jobs), folder
    jobs.close()


def test_what_can_be_chosen_and_what_it_gives(made):
    control, _ = made
    known = control.sources("a")
    assert [k for _, k in known] == ["curves_of_runs|clusters"], "what cannot be read is left out"
    names, chosen, value, alarms = control.show(known[0][1], None, "a")
    d = json.loads(value)
    assert len(names) == 8 and chosen == names[0] and d["csv"].startswith("run,objective,panel,number,step") and "h3" in alarms
    got = {}
    *lines, last = d["code"].splitlines()
    exec("\n".join([*lines, "figure = " + last]), got)
    assert isinstance(got["figure"], go.Figure) and json.loads(got["figure"].to_json()) == d["figure"], "the code gives the same figure"
    assert runs_csv(control.runs(known[0][1], "a")[0]) == d["csv"]
    with pytest.raises(EsslError, match="No learning curves"):
        control.show("nowhere|clusters", None, "a")
    with pytest.raises(EsslError, match="No learning curves"):
        control.show(OWN, None, "a visit without a study")


@pytest.mark.parametrize("form, words", [
    (([], 40, 32, 1, "units"), "Mixers: choose"), ((["no such"], 40, 32, 1, "units"), "Mixers: there is no 'no such'"), ((list_mixers()[:7], 40, 32, 1, "units"), "up to 6"),
    (([MIXER], None, 32, 1, "units"), "Steps: None"), (([MIXER], 10**6, 32, 1, "units"), "from 20 to 2000"), (([MIXER], float("nan"), 32, 1, "units"), "Steps: nan"),
    (([MIXER], 40, 33, 1, "units"), "multiple of 16"), (([MIXER], 40, 32, 0, "units"), "Seeds: 0"), (([MIXER], 40, 32, 1, None), "Probe: choose"),
    ((list_mixers()[:6], 2000, 384, 5, "units"), "the page allows 15"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_form_that_cannot_be_run_is_answered_by_field(made, form, words):
    with pytest.raises(EsslError) as e:
        made[0].start("somebody", *form)
    assert words in str(e.value) and "somebody" not in made[0].own


def test_the_estimate_grows_with_the_work(made):
    from essl_nb.study.results import known_rows

    rows = list(known_rows(study_dir("small") / "rows.jsonl").values())
    one, more = (estimated_seconds(form_grid("bundled", [MIXER], steps, 64, seeds, "masked_phones"), rows) for steps, seeds in ((100, 1), (400, 2)))
    assert 60 < one < more
    assert "1 run of 100 steps and 1 score: about" in made[0].estimate([MIXER], 100, 64, 1, "units")
    assert offered_probes(made[0].listen.corpus) and "phones" not in offered_probes(made[0].listen.corpus)


def waited(control, session, what, seconds=400):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.3)
    pytest.fail(f"{control.progress(session)} after {seconds} s")


def test_a_small_study_is_run_stopped_resumed_and_opened(made):
    control, _ = made
    form = ([MIXER], 40, 16, 1, offered_probes(control.listen.corpus)[0])
    control.start("me", *form)
    own = control.own["me"]
    with pytest.raises(EsslError, match="runs already"):
        control.start("me", *form)
    assert control.sources("me")[0] == ("your study", OWN) and OWN not in [k for _, k in control.sources("you")], "nobody else sees it"
    with pytest.raises(EsslError, match="no scores yet"):
        control.open_key("me")
    waited(control, "me", lambda: control.progress("me")[0])
    control.jobs.stop("me")
    waited(control, "me", lambda: own.job.ended)
    assert own.job.state == STOPPED and "Run goes on from there" in control.progress("me")[1] and own.folder.is_dir()
    control.start("me", *form)
    assert control.own["me"] is own, "the same form goes on in the same folder"
    waited(control, "me", lambda: own.job.ended)
    assert own.job.state == DONE, control.progress("me")
    assert control.progress("me") == (False, "Finished: 2 facts.")
    names, chosen, value, _ = control.show(OWN, None, "me")
    assert names == [f"{MIXER}, seed 0"] and json.loads(value)["figure"] and len(folder_curves(own.folder)) == 1
    key = control.open_key("me")
    assert ("your study", key) in control.studies.choices(key) and key not in [k for _, k in control.studies.choices()]
    updates = compare_updates(control.studies, CurvesFile(None), dict.fromkeys(["task", "setting", "head", "metric", "machine", "cost", "log", "untrained", "chosen"]) | dict(study=key, budget_x="") | {f"budget_{b}": "" for b in __import__("essl_nb.app.compare", fromlist=["BUDGETS"]).BUDGETS}, True)
    assert updates["study"].value == key and MIXER in updates["view"]
    control.leave("me")
    assert not own.folder.exists() and key not in control.studies.private and "me" not in control.own


def test_a_visitor_who_leaves_takes_the_process_along(made):
    control, _ = made
    control.start("gone", [MIXER], 40, 16, 1, offered_probes(control.listen.corpus)[0])
    job, folder = control.own["gone"].job, control.own["gone"].folder
    control.leave("gone")
    waited(control, "gone", lambda: job.ended, 60)
    assert job.state in (STOPPED, FAILED) and not folder.exists()
    assert OwnStudy({}).facts() == {} and callable(run_small_study)
