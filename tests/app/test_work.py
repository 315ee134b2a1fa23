"""Long work in an isolated process: what it reports, how it ends, and that nothing of it is left."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from essl_nb.app.work import DONE, FAILED, RUNNING, STOPPED, WAITING, Jobs, progress_text
from essl_nb.core.registry import EsslError


def counting(n, seconds=0.05):
    for i in range(n):
        time.sleep(seconds)
        yield dict(done=i + 1, total=n, part=[i])
    return n


def settings():
    import torch

    return dict(threads=torch.get_num_threads(), group=os.getpgrp(), pid=os.getpid())


def with_family(path):
    "Starts a process that ignores polite signals, and waits for ever."
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    time.sleep(0.3)
    Path(path).write_text(f"{os.getpid()} {child.pid}")
    yield dict(note="two of us")
    time.sleep(3600)


def deaf(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(path).write_text(str(os.getpid()))
    time.sleep(3600)


def saving(path):
    from essl_nb.core.stop import noticing_stops

    with noticing_stops() as stop:
        yield dict(done=0, total=1)
        while not stop:
            time.sleep(0.02)
        Path(path).write_text("saved")


def asks_too_much():
    raise EsslError("Three spoons were given, two are allowed.")


def breaks():
    raise ValueError("the spoon is bent")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if os.path.isdir("/proc/self") else os.kill(pid, 0) is None
    except (OSError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.close()
    assert not jobs.open


def test_reports_arrive_in_order_and_the_value_last(jobs):
    events = list(jobs.start("a", counting, 5, 0.2).events(0.1))
    assert [e["part"] for e in events if "part" in e] == [[i] for i in range(5)] and events[-1] == dict(state=DONE, value=5)
    running = [e for e in events if e["state"] == RUNNING]
    assert len(running) > 5, "a sign of life between two reports"
    left = [e["seconds_left"] for e in running if "seconds_left" in e]
    assert left and 0 < left[0] < 2 and left[-1] < 0.3
    assert jobs.of("a") is None


def test_a_process_of_its_own_with_one_thread(jobs):
    *_, last = jobs.start("a", settings).events()
    assert last["value"]["threads"] == 1 and last["value"]["group"] == last["value"]["pid"] != os.getpgrp()


def test_a_stop_ends_the_whole_family(jobs, tmp_path):
    job = jobs.start("a", with_family, str(tmp_path / "pids"))
    for event in job.events(0.1):
        if event.get("note"):
            jobs.stop("a")
    assert event == dict(state=STOPPED, error="Stopped.")
    wait_until(lambda: not any(alive(int(p)) for p in (tmp_path / "pids").read_text().split()), 5)


def test_who_does_not_listen_is_ended_all_the_same(jobs, tmp_path):
    job = jobs.start("a", deaf, str(tmp_path / "pid"))
    wait_until((tmp_path / "pid").exists)
    wait_until(lambda: (tmp_path / "pid").read_text())
    job.stop()
    wait_until(lambda: job.ended, 10)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_stop_leaves_time_to_save(jobs, tmp_path):
    job = jobs.start("a", saving, str(tmp_path / "state"))
    for event in job.events(0.1):
        if "total" in event:
            job.stop()
    assert event["state"] == STOPPED and (tmp_path / "state").read_text() == "saved"


def test_to_leave_the_iteration_ends_the_job(jobs, tmp_path):
    job = jobs.start("a", deaf, str(tmp_path / "pid"))
    events = job.events(0.1)
    next(events)
    events.close()
    wait_until(lambda: job.ended)
    assert job.state == STOPPED and not jobs.open


def test_one_for_a_visitor_two_for_the_server(jobs):
    first, second = jobs.start("a", counting, 1000), jobs.start("b", counting, 1000)
    with pytest.raises(EsslError, match="stop it, or wait"):
        jobs.start("a", counting, 1)
    third, fourth = jobs.start("c", counting, 2), jobs.start("d", counting, 2)
    waiting = [third.events(0.1), fourth.events(0.1)]
    one, two = map(next, waiting)
    assert (one, two) == (dict(state=WAITING, place=1), dict(state=WAITING, place=2))
    assert "the next" in progress_text(one) and "number 2" in progress_text(two)
    [events.close() for events in waiting]
    wait_until(lambda: third.ended and fourth.ended)
    assert third.error == "Stopped before it began."
    fifth = jobs.start("e", counting, 2)
    assert jobs.place_of(fifth) == 1
    first.stop()
    jobs.start("a", counting, 1)  # while the stopped one ends
    *_, last = fifth.events(0.1)
    assert last == dict(state=DONE, value=2) and second.state == RUNNING


def test_a_queue_has_an_end():
    jobs = Jobs(most=0, queue=2)
    for name in "ab":
        jobs.start(name, counting, 1)
    with pytest.raises(EsslError, match="2 others .* try again"):
        jobs.start("c", counting, 1)
    jobs.close()
    assert not jobs.open


@pytest.mark.parametrize("function, words", [(asks_too_much, "Three spoons were given, two are allowed."), (breaks, "the spoon is bent; ask"), (dies, "for want of memory; ask for less")], ids=lambda v: getattr(v, "__name__", ""))
def test_a_crash_is_one_sentence_with_a_way_out(jobs, function, words):
    *_, last = jobs.start("a", function).events()
    assert last["state"] == FAILED and words in last["error"] and "\n" not in last["error"] and "Traceback" not in last["error"]


def test_what_takes_too_long_is_stopped():
    jobs = Jobs(limit=0.5)
    *_, last = jobs.start("a", counting, 1000).events()
    assert last["state"] == FAILED and "the longest that this page allows" in last["error"]


def test_nothing_is_left_when_the_interpreter_ends(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from essl_nb.app.work import Jobs
from test_work import with_family
Jobs().start("a", with_family, {str(tmp_path / "pids")!r})
while not Path({str(tmp_path / "pids")!r}).exists():
    time.sleep(0.02)
time.sleep(0.2)
"""
    (own := tmp_path / "tmp").mkdir()  # other tests have jobs of their own
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | dict(TMPDIR=str(own)))
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not any(alive(int(p)) for p in (tmp_path / "pids").read_text().split()), 5)
    assert not list(own.glob("essl-job-*"))


def test_words_of_progress():
    assert progress_text(dict(state=RUNNING, done=12, total=24, seconds_left=41.3)) == "12 of 24 points, about 40 s left"
    assert progress_text(dict(state=RUNNING, done=1, total=2, seconds_left=601.0), "steps").endswith("about 10 minutes left")
    assert progress_text(dict(state=RUNNING, seconds=1.0)).endswith("…") and progress_text(dict(state=DONE, value=1)) == ""
