"""Points are shared out so that each is done once, whoever is killed and however many are at it."""

import multiprocessing
import os
import random
import sys
import time
from collections import Counter

import optuna
import pytest

from hf_vpt.sweep import Ledger, owners, protocol, work_off
from hf_vpt.sweep import ledger as ledger_module


FORK = multiprocessing.get_context("fork")
# Once, so that not every forked process imports what a database needs.
optuna.storages.RDBStorage("sqlite:///:memory:")


def url(folder):
    return f"sqlite:///{folder}/sweep.db"


def log(folder, *words):
    with open(folder / "log.txt", "a") as stream:
        stream.write(" ".join(map(str, words)) + "\n")


def lines(folder):
    file = folder / "log.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def work(folder, num_points, seconds):
    """What a process of a sweep does, with an objective that costs nothing."""

    def run(claim):
        log(folder, "start", claim.point, claim.attempt)
        time.sleep(seconds)
        return float(claim.point % 7), {"process": os.getpid()}

    work_off(
        Ledger(url(folder), "cheap"),
        range(num_points),
        run,
        after=lambda entry: log(folder, "end", entry.point),
        params={point: {"learning_rate": 0.1 * point} for point in range(num_points)},
        poll_seconds=0.05,
    )


def start(folder, num_points, seconds=0.05):
    process = FORK.Process(target=work, args=(folder, num_points, seconds))
    process.start()
    return process


def wait_for_starts(folder, number):
    deadline = time.monotonic() + 60
    while sum(line[0] == "start" for line in lines(folder)) < number:
        assert time.monotonic() < deadline, lines(folder)
        time.sleep(0.005)


def check_that_each_was_done_once(folder, num_points, num_kills):
    ledger = Ledger(url(folder), "cheap")
    trials = ledger.storage.get_all_trials(ledger.study_id)
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == num_points and set(states) <= {"COMPLETE", "FAIL"}
    done = ledger.done(range(num_points))
    assert [entry.point for entry in done] == list(range(num_points)), "a point was lost"
    assert [entry.params["learning_rate"] for entry in done] == [0.1 * point for point in range(num_points)]
    assert [entry.value for entry in done] == [float(point % 7) for point in range(num_points)]
    # One more attempt for each that a kill has hit, and no more.
    starts = Counter(int(line[1]) for line in lines(folder) if line[0] == "start")
    assert sum(starts.values()) <= num_points + num_kills
    assert sum(entry.attempts for entry in done) <= num_points + num_kills
    # Nothing is begun again once it has come to its end.
    ended = set()
    for word, point, *_ in lines(folder):
        assert word == "end" or point not in ended, f"point {point} was run twice"
        if word == "end":
            ended.add(point)


def test_a_sweep_of_40_trials_killed_five_times_finishes_with_40_trials_none_run_twice_none_lost(tmp_path):
    num_points, kills = 40, (4, 11, 19, 27, 36)
    for number in kills:
        process = start(tmp_path, num_points)
        wait_for_starts(tmp_path, number)
        time.sleep(random.Random(number).uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9
    process = start(tmp_path, num_points)
    process.join()
    assert process.exitcode == 0
    check_that_each_was_done_once(tmp_path, num_points, len(kills))


def test_two_workers_of_which_one_is_killed_share_the_trials(tmp_path):
    num_points = 30
    stays, killed = start(tmp_path, num_points), start(tmp_path, num_points)
    wait_for_starts(tmp_path, 12)
    killed.kill()
    killed.join()
    late = start(tmp_path, num_points)
    for process in (stays, late):
        process.join()
        assert process.exitcode == 0
    check_that_each_was_done_once(tmp_path, num_points, num_kills=1)
    ledger = Ledger(url(tmp_path), "cheap")
    assert len({entry.result["process"] for entry in ledger.done(range(num_points))}) >= 2, "one did all the work"


def test_workers_that_claim_at_the_same_moment_never_get_the_same_point(tmp_path):
    num_points = 24
    processes = [start(tmp_path, num_points, seconds=0) for _ in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    starts = Counter(line[1] for line in lines(tmp_path) if line[0] == "start")
    assert starts == {str(point): 1 for point in range(num_points)}
    check_that_each_was_done_once(tmp_path, num_points, num_kills=0)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(url(tmp_path), "one", {"method": "vpt"})


def test_an_exception_gives_the_point_back_for_a_further_attempt(ledger):
    claim = ledger.claim(range(1))
    with pytest.raises(KeyboardInterrupt), ledger.at_work(claim):
        assert ledger.claim(range(1)) is None
        raise KeyboardInterrupt
    again = ledger.claim(range(1))
    assert (claim.attempt, again.attempt, again.point) == (0, 1, 0)
    assert not ledger.done(range(1))


def test_points_that_broke_off_are_tried_again_after_those_that_nobody_was_at(ledger):
    ledger.break_off(ledger.claim(range(3)))
    assert [ledger.claim(range(3)).point for _ in range(3)] == [1, 2, 0]


def test_the_best_point_is_the_first_of_equally_good_ones(ledger, tmp_path):
    for value in (0.5, 0.7, 0.7, 0.1):
        assert ledger.finish(ledger.claim(range(4)), value, {})
    assert ledger.best(range(4)).point == 1
    smaller = Ledger(url(tmp_path), "loss", greater_is_better=False)
    for value in (0.5, 0.1, 0.1):
        smaller.finish(smaller.claim(range(3)), value, {})
    assert smaller.best(range(3)).point == 1


def test_another_machines_claim_is_given_to_others_once_it_has_been_silent_for_long(ledger, tmp_path, monkeypatch):
    elsewhere = {"machine": "elsewhere", "pid": 1, "started": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "this_process", lambda: elsewhere)
        claim = ledger.claim(range(1))
    now = [0.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    watching = Ledger(url(tmp_path), "one", stale_after=300, identity={"method": "vpt"})
    assert watching.claim(range(1)) is None
    now[0] = 250.0
    ledger.storage.set_trial_user_attr(claim.trial_id, "sign", 1)  # it lives
    assert watching.claim(range(1)) is None
    now[0] = 500.0
    assert watching.claim(range(1)) is None
    now[0] = 551.0
    taken = watching.claim(range(1))
    assert taken.attempt == 1
    # The first one was only slow: its result comes too late and is not counted twice.
    assert not ledger.finish(claim, 0.1, {})
    assert watching.finish(taken, 0.2, {})
    assert [entry.value for entry in watching.done(range(1))] == [0.2]


def test_a_result_that_comes_while_a_point_is_taken_over_counts_and_ends_the_takeover(ledger, monkeypatch):
    claim = ledger.claim(range(1))
    monkeypatch.setattr(ledger_module, "_active", set())  # as if it had broken off
    original = ledger.storage.create_new_trial

    def late(*args):
        created = original(*args)
        ledger.finish(claim, 0.3, {})
        return created

    monkeypatch.setattr(ledger.storage, "create_new_trial", late)
    assert ledger.claim(range(1)) is None
    assert [entry.value for entry in ledger.done(range(1))] == [0.3]
    assert ledger.num_at_work() == 0


def test_of_two_claims_to_the_same_attempt_the_first_one_has_it(ledger, tmp_path, monkeypatch):
    rival = Ledger(url(tmp_path), "one")
    won = []
    original = ledger.storage.create_new_trial

    def after_the_rival(*args):
        if not won:
            won.append(rival.claim(range(2)))
        return original(*args)

    monkeypatch.setattr(ledger.storage, "create_new_trial", after_the_rival)
    claim = ledger.claim(range(2))
    assert (won[0].point, claim.point) == (0, 1)


def test_a_process_is_alive_until_it_ends_even_before_its_parent_has_asked():
    process = FORK.Process(target=time.sleep, args=(60,))
    process.start()
    try:
        started = owners.start_of(process.pid)
        owner = owners.this_process() | {"pid": process.pid, "started": started}
        assert owners.is_alive(owner) is True
        assert owners.is_alive(owner | {"started": started - 100}) is False  # another process of the same number
        assert owners.is_alive(owner | {"machine": "elsewhere"}) is None
        os.kill(process.pid, 9)
        deadline = time.monotonic() + 10
        while owners.is_alive(owner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert owners.is_alive(owner) is False
    finally:
        process.kill()
        process.join()


def test_a_study_goes_on_only_with_what_it_is_about(ledger, tmp_path):
    with pytest.raises(
        ValueError, match="'one' made with method vpt, and a sweep with method bpt.*use another output"
    ):
        Ledger(url(tmp_path), "one", {"method": "bpt"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a start is a time of day")
def test_a_clock_that_is_set_makes_no_process_look_dead(monkeypatch):
    owner = owners.this_process()
    original = owners.psutil.Process.create_time
    # Seconds since 1970 of every process, which psutil counts from the start of the machine.
    monkeypatch.setattr(owners.psutil.Process, "create_time", lambda self: original(self) + 3600)
    assert owners.is_alive(owner) is True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the number of a start of the machine")
def test_processes_of_another_machine_of_the_same_name_are_not_taken_for_dead(monkeypatch, tmp_path):
    process = FORK.Process(target=int)
    process.start()
    process.join()
    gone = owners.this_process() | {"pid": process.pid}
    assert owners.is_alive(gone) is False
    # As if this process asked on the other machine, where nobody has that number either.
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(owners, "BOOT_ID", tmp_path / "boot_id")
    assert owners.is_alive(gone) is None


def run_with_errors(ledger, fails, num_points=4, **options):
    """Work off points of which some fail; the points that were tried, in order, and what `work_off` returns."""
    tried = []

    def run(claim):
        tried.append(claim.point)
        if claim.point in fails:
            raise MemoryError(f"point {claim.point}\nis too large")
        return 0.5, {}

    try:
        failed = work_off(ledger, range(num_points), run, poll_seconds=0.01, **options)
    except MemoryError as error:
        failed = error
    return tried, failed


def test_a_point_that_fails_does_not_keep_the_others_from_being_done_and_is_tried_again_by_the_next_process(ledger):
    reported = []
    after = {"after_failure": lambda claim, error: reported.append((claim.point, error))}
    tried, failed = run_with_errors(ledger, {0, 2}, **after)
    assert tried == [0, 1, 2, 3]
    assert failed == dict(reported) == {0: "MemoryError: point 0 is too large", 2: "MemoryError: point 2 is too large"}
    assert ledger.failed(range(4)) == failed and [entry.point for entry in ledger.done(range(4))] == [1, 3]
    tried, failed = run_with_errors(ledger, {2}, **after)
    assert (tried, list(failed)) == ([0, 2], [2])
    tried, failed = run_with_errors(ledger, {}, **after)
    assert (tried, failed) == ([2], {})


def test_several_points_that_fail_in_a_row_end_the_process(ledger):
    tried, error = run_with_errors(ledger, range(9), 9, after_failure=lambda *args: None)
    assert tried == [0, 1, 2] and isinstance(error, MemoryError)


def test_failed_points_are_left_alone_where_they_are_to_be_skipped(ledger):
    options = {"after_failure": lambda *args: None, "skip_failed": True}
    tried, failed = run_with_errors(ledger, range(5), 6, **options)
    assert (tried, list(failed)) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4])
    assert run_with_errors(ledger, {}, 6, **options) == ([], failed)


def test_a_kill_is_no_failure(ledger, monkeypatch):
    ledger.break_off(ledger.claim(range(1)), "MemoryError: too large")
    assert ledger.failed(range(1))
    ledger.claim(range(1))
    assert not ledger.failed(range(1)), "somebody is at work on it"
    monkeypatch.setattr(ledger_module, "_active", set())  # as if it had been killed
    assert not ledger.failed(range(1))


def test_a_failed_point_that_others_do_meanwhile_is_not_counted_twice(ledger, tmp_path, monkeypatch):
    rival = Ledger(url(tmp_path), "one")
    claims = {}

    def run(claim):
        if claim.point == 0:
            claims[1] = rival.claim([1])
            raise MemoryError("too large")
        raise AssertionError("the rival has the other one")

    original = ledger.claim

    def the_rival_does_it(points, params=None):
        claim = original(points, params)
        if claim is None and len(claims) == 1:
            claims[0] = rival.claim([0])
            rival.finish(claims[0], 0.1, {})
        return claim

    monkeypatch.setattr(ledger, "claim", the_rival_does_it)
    monkeypatch.setattr(protocol.time, "sleep", lambda seconds: rival.finish(claims[1], 0.2, {}))
    assert work_off(ledger, range(2), run, after_failure=lambda *args: None) == {}
    assert [entry.value for entry in ledger.done(range(2))] == [0.1, 0.2]


def test_what_has_diverged_is_never_the_best(ledger):
    for value, diverged in ((0.0, "loss of nan"), (0.0, None)):
        ledger.finish(ledger.claim(range(3)), value, {"diverged": diverged})
    assert ledger.best(range(2)).point == 1
    assert ledger.best(range(1)) is None
