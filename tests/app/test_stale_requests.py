"""A request that left the page before its lists changed is answered: it is never refused without a word."""
import asyncio
import json

import pytest
from gradio.components import Audio, CheckboxGroup, Dropdown, File, Radio, Slider
from gradio.state_holder import SessionState
from madeup import make_study

from essl_nb.app.compare import DEFAULT, compare_updates
from essl_nb.app.curves import CurvesFile
from essl_nb.app.explorer import create_app
from essl_nb.app.library import Studies
from essl_nb.viz.tradeoff import COSTS

CHECKED = (Dropdown, Radio, CheckboxGroup, Slider)  # the framework refuses what is not among their choices, or beyond their end


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("stale") / "mine", seeds=1, ship=False)


def test_no_callback_has_its_lists_checked_before_it_is_asked(study):
    callbacks = [f for f in create_app(results=study).fns.values() if f.preprocess and any(isinstance(b, CHECKED) for b in f.inputs)]
    assert all(isinstance(f.inputs[0], (File, Audio)) for f in callbacks), [f.name for f in callbacks]
    assert len(callbacks) <= 1, "the microphone's alone"


def test_a_page_that_is_older_than_the_first_view_gets_its_answer(study):
    app = create_app(results=study)
    cost = next(b for b in app.blocks.values() if getattr(b, "elem_id", "") == "pick-cost")
    before = {b._id: b.value for f in app.fns.values() for b in f.inputs if hasattr(b, "value")}
    app.launch.render_first_views()
    assert before[cost._id] == next(iter(COSTS)) not in [v for _, v in cost.choices], "the study lacks the cost that the page begins with"
    begin = next(f for f in app.fns.values() if ("load" in [t[1] for t in f.targets]) and cost in f.inputs)
    found = asyncio.run(app.process_api(begin, [before.get(b._id) for b in begin.inputs], state=SessionState(app)))["data"]
    view = next(json.loads(value) for b, value in zip(begin.outputs, found) if b.elem_id == "compare-view")
    assert view["figure"]["data"] and view["finding"]


@pytest.mark.parametrize("value", ["no such", "", 7, -1.5, ["a"], {"a": 1}, True, None, "<script>"])
def test_any_value_of_any_choice_is_answered(study, value):
    studies = Studies(study)
    for name in ("study", "task", "setting", "head", "metric", "machine", "cost", "chosen", "form", "log", "untrained", "stream"):
        for fresh in (False, True):
            updates = compare_updates(studies, CurvesFile(None), DEFAULT | {"link": "", name: value}, fresh)
            view = json.loads(updates["view"])
            assert view["finding"] and "<script>" not in str(updates.get("card", "")) + str(updates.get("answer", "")), (name, fresh)
