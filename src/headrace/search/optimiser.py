"""Which options to try next, by Optuna: everything in a small space, else its tree-structured Parzen estimator.

Optuna is optional (`headrace[tune]`) and imported here only, when a search begins.
"""

from __future__ import annotations

import importlib.util
import random
from typing import TYPE_CHECKING, Protocol

from headrace.errors import InvalidOption
from headrace.search.space import KEYS, Choice, Space

if TYPE_CHECKING:
    import optuna

WHOLE = 24  # combinations that are all tried, in an order of their own
STARTUP = 8  # random ones before the estimator has anything to go by
HALVING = 2  # of the options at a rung, one in so many goes on
SAME_AGAIN = 30  # proposals of what has been tried already, and nothing new is left to expect


class Optimiser(Protocol):
    """Proposes options, and is told what came of them."""

    def ask(self) -> Choice | None:
        """Return options that have not been tried; None: no more."""

    def worth_more(self, step: int, value: float) -> bool:
        """Take an early value of the options asked for last, the higher the better; False: others promise more."""

    def tell(self, value: float | None) -> None:
        """End the options asked for last; None: they cannot be used, or were given up."""


def require_optuna() -> None:
    """Raise InvalidOption where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InvalidOption("headrace tune needs Optuna; install it with: pip install 'headrace[tune]'")


class OptunaOptimiser:
    """An Optimiser. Gives up early by asynchronous successive halving.

    Sources: J. Bergstra et al., "Algorithms for hyper-parameter optimization", NIPS (2011); L. Li et al., "A system for
    massively parallel hyperparameter tuning", MLSys (2020).
    """

    def __init__(self, space: Space, seed: int) -> None:
        require_optuna()
        import optuna  # noqa: PLC0415  optional

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=HALVING),
        )
        first = {key: values[0] for key, values in space.values().items()}
        queue = [{key: getattr(choice, key) for key in KEYS} for choice in space.choices()]
        random.Random(seed).shuffle(queue)  # noqa: S311  no secret
        for values in (first, *(queue if space.size <= WHOLE else ())):
            self._study.enqueue_trial(values)
        self._known: dict[Choice, float | None] = {}
        self._trial: optuna.Trial | None = None
        self._choice: Choice | None = None

    def ask(self) -> Choice | None:
        for _ in range(SAME_AGAIN):
            if len(self._known) == self._space.size:
                return None
            self._trial = self._study.ask()
            values = {key: self._trial.suggest_categorical(key, values) for key, values in self._space.values().items()}
            self._choice = Choice(**{key: values[key] for key in KEYS})  # type: ignore[arg-type]  # of its key's kind
            if self._choice not in self._known:
                return self._choice
            self.tell(self._known[self._choice])
        return None

    def worth_more(self, step: int, value: float) -> bool:
        assert self._trial is not None
        self._trial.report(value, step)
        return not self._trial.should_prune()

    def tell(self, value: float | None) -> None:
        import optuna  # noqa: PLC0415  optional

        assert self._trial is not None
        assert self._choice is not None
        self._known[self._choice] = value
        if value is None:
            self._study.tell(self._trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(self._trial, value)
