"""A list of points, each to be done once, shared out among processes and machines through Optuna's storages.

Optuna hands out enqueued trials by reading and then writing their state, which two processes on a SQLite file can do
at once. What every storage of Optuna does in one go is to create a trial, and trials are numbered in that order. So a
point is claimed by creating a running trial that names it, and of several trials that claim the same the first one has
it. A claim whose process was killed is followed by another one, the next attempt at the point, in the same way.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .claims import Claim, Entry, describe_error
from .owners import is_alive, this_process
from .storage import import_optuna, open_study


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

HEARTBEAT_SECONDS = 20.0

# Claims that this process is at work on. A claim of its own that is not among them broke off by an exception.
_active: set[str] = set()


class Ledger:
    """Points of a sweep, who is at work on them, and what came of them.

    Args:
        storage_url: A database URL that Optuna knows.
        study_name: Name of the study in it, made if there is none.
        identity: What the study is about; it may only be opened again with the same. Default: whatever it is about.
        greater_is_better: Whether points with greater values are better ones.
        stale_after: Seconds without a sign of life after which another machine's claim is given to others.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: The study is about something else.
    """

    def __init__(
        self,
        storage_url: str,
        study_name: str,
        identity: Mapping[str, Any] | None = None,
        greater_is_better: bool = True,
        stale_after: float = 300.0,
    ):
        self.optuna = import_optuna()
        self.stale_after = stale_after
        self.greater_is_better = greater_is_better
        self.study_name = study_name
        self._last_signs: dict[int, tuple[Any, float]] = {}
        self.storage = open_study(storage_url, study_name, identity, greater_is_better)
        self.study_id = self.storage.get_study_id_from_name(study_name)

    def claim(self, points: Sequence[int], params: Mapping[int, Mapping[str, Any]] | None = None) -> Claim | None:
        """Take a point that nobody has done or is at work on.

        Args:
            points: All points.
            params: Settings of each, to be written down with the claim.

        Returns:
            None if each point is done or somebody is at work on it.
        """
        # Sorted by their number of attempts: what was broken off goes on last, so that a point at which every
        # process dies does not keep the others from being done.
        while open_points := sorted(
            (self._next_attempt(trials), point) for point, trials in self._open_points(points)
        ):
            attempt, point = open_points[0]
            if claim := self._try_to_claim(point, attempt, params):
                return claim
        return None

    def done(self, points: Sequence[int]) -> list[Entry]:
        """Return what came of the points that are done, in their order."""
        entries = {}
        for trial in self._trials():
            point = trial.user_attrs["point"]
            if trial.state.name == "COMPLETE" and point not in entries:
                result, attempts = trial.user_attrs["result"], trial.user_attrs["attempt"] + 1
                entries[point] = Entry(point, trial.params, trial.value, result, attempts)
        return [entries[point] for point in points if point in entries]

    def best(self, points: Sequence[int]) -> Entry | None:
        """Return the best point; of equally good ones the first. Where all have diverged there is none."""
        entries = [entry for entry in self.done(points) if not entry.diverged]
        sign = 1 if self.greater_is_better else -1
        return max(entries, key=lambda entry: sign * entry.value, default=None)

    def failed(self, points: Sequence[int]) -> dict[int, str]:
        """Return the errors of points whose last attempt ended with one, and that nobody is at work on again."""
        last = {point: trials[-1] for point, trials in self._open_points(points) if trials}
        return {point: trial.user_attrs["error"] for point, trial in last.items() if "error" in trial.user_attrs}

    def num_at_work(self) -> int:
        """Number of claims that are not known to be broken off."""
        return sum(trial.state.name == "RUNNING" and self._is_alive(trial) for trial in self._trials())

    def finish(self, claim: Claim, value: float, result: Mapping[str, Any]) -> bool:
        """Write down what came of a point; False if another process has taken it over in the meantime."""
        try:
            self.storage.set_trial_user_attr(claim.trial_id, "result", dict(result))
            self.storage.set_trial_state_values(claim.trial_id, self._state("COMPLETE"), [value])
        except RuntimeError:  # the trial has ended already
            return False
        finally:
            _active.discard(claim.token)
        return True

    def break_off(self, claim: Claim, error: str | None = None) -> None:
        """Give a point back; with the error, if it was one and nobody who ended the process."""
        _active.discard(claim.token)
        self._fail(claim.trial_id, error)

    @contextmanager
    def at_work(self, claim: Claim) -> Iterator[None]:
        """Give signs of life, and give the point back if an exception ends the work."""
        ended = threading.Event()
        thread = threading.Thread(target=self._give_signs, args=(claim, ended), daemon=True)
        thread.start()
        try:
            yield
        except BaseException as exception:
            self.break_off(claim, describe_error(exception) if isinstance(exception, Exception) else None)
            raise
        finally:
            ended.set()
            thread.join()

    def tidy(self) -> None:
        """End trials that lost a claim to another one, and whose process was killed before it could say so."""
        first = {trial._trial_id for trial in self._trials()}
        for trial in self._trials(every=True):
            if trial.state.name == "RUNNING" and trial._trial_id not in first:
                self._fail(trial._trial_id)

    def study(self, seed: int) -> Any:
        """The study, whose sampler draws by a seed and by what is known of other trials."""
        sampler = self.optuna.samplers.TPESampler(seed=seed % 2**32)
        return self.optuna.load_study(study_name=self.study_name, storage=self.storage, sampler=sampler)

    def _try_to_claim(
        self, point: int, attempt: int, all_params: Mapping[int, Mapping[str, Any]] | None
    ) -> Claim | None:
        earlier = [trial for trial in self._trials() if trial.user_attrs["point"] == point]
        # Drawn settings belong to the point, whoever is at work on it.
        drawn = next((trial for trial in reversed(earlier) if trial.params), None)
        params, distributions = (drawn.params, drawn.distributions) if drawn else ({}, {})
        if all_params is not None:
            params, distributions = dict(all_params[point]), self._choices(all_params.values())
        token = uuid.uuid4().hex
        attributes = {"point": point, "attempt": attempt, "token": token, "owner": this_process(), "sign": 0}
        template = self.optuna.trial.create_trial(
            state=self._state("RUNNING"), params=params, distributions=distributions, user_attrs=attributes
        )
        _active.add(token)
        trial_id = self.storage.create_new_trial(self.study_id, template)
        claim = Claim(point, attempt, params, trial_id, token)
        claims = [trial for trial in self._trials(every=True) if trial.user_attrs.get("point") == point]
        first = next(trial for trial in claims if trial.user_attrs["attempt"] == attempt)
        before = [trial for trial in claims if trial.user_attrs["attempt"] < attempt]
        wins = first.user_attrs["token"] == token
        # Whoever was at work on it must not end it any more, or has done so just now.
        if (
            wins
            and not any(trial.state.name == "COMPLETE" for trial in before)
            and all(self._fail(trial._trial_id) for trial in before if trial.state.name == "RUNNING")
        ):
            return claim
        self.break_off(claim)
        return None

    def _choices(self, all_params: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The values of each setting, which Optuna wants to be the same in all trials."""
        values: dict[str, dict[Any, None]] = {}
        for params in all_params:
            for name, value in params.items():
                values.setdefault(name, {})[value] = None
        return {name: self.optuna.distributions.CategoricalDistribution(list(own)) for name, own in values.items()}

    def _open_points(self, points: Sequence[int]) -> list[tuple[int, list[FrozenTrial]]]:
        by_point: dict[int, list[FrozenTrial]] = {point: [] for point in points}
        for trial in self._trials():
            by_point.setdefault(trial.user_attrs["point"], []).append(trial)
        return [(point, by_point[point]) for point in points if not any(map(self._is_taken, by_point[point]))]

    def _is_taken(self, trial: FrozenTrial) -> bool:
        return trial.state.name == "COMPLETE" or (trial.state.name == "RUNNING" and self._is_alive(trial))

    @staticmethod
    def _next_attempt(trials: Sequence[FrozenTrial]) -> int:
        return max((trial.user_attrs["attempt"] + 1 for trial in trials), default=0)

    def _trials(self, every: bool = False) -> list[FrozenTrial]:
        """Trials by number; of several that claim the same attempt at a point the first alone, unless asked for."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        trials = [trial for trial in trials if "token" in trial.user_attrs]
        if every:
            return trials
        first: dict[tuple[int, int], FrozenTrial] = {}
        for trial in trials:
            first.setdefault((trial.user_attrs["point"], trial.user_attrs["attempt"]), trial)
        return list(first.values())

    def _is_alive(self, trial: FrozenTrial) -> bool:
        owner, own = trial.user_attrs["owner"], this_process()
        if owner == own:
            return trial.user_attrs["token"] in _active
        alive = is_alive(owner)
        if alive is not None:
            return alive
        # Clocks of machines differ, so what counts is how long this process has seen no change.
        sign, now = trial.user_attrs["sign"], time.monotonic()
        if trial._trial_id not in self._last_signs or self._last_signs[trial._trial_id][0] != sign:
            self._last_signs[trial._trial_id] = (sign, now)
        return now - self._last_signs[trial._trial_id][1] < self.stale_after

    def _give_signs(self, claim: Claim, ended: threading.Event) -> None:
        count = 0
        while not ended.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                self.storage.set_trial_user_attr(claim.trial_id, "sign", count)
            except Exception:  # a busy database, or a trial that was taken over, which `finish` tells of
                continue

    def _fail(self, trial_id: int, error: str | None = None) -> bool:
        """End a trial that came to nothing; False if it has come to something."""
        try:
            if error is not None:
                self.storage.set_trial_user_attr(trial_id, "error", error)
            self.storage.set_trial_state_values(trial_id, self._state("FAIL"))
        except RuntimeError:
            return self.storage.get_trial(trial_id).state.name != "COMPLETE"
        return True

    def _state(self, name: str) -> Any:
        return self.optuna.trial.TrialState[name]
