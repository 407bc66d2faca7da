"""One frontend's hand on the server's board: its own rows to write, and everybody's sums to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace.frontend.board import Board, ModelTotals, Row

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.pool import Pool


class Ledger:
    """The rows of frontend number `frontend`. Without a board it counts for itself. One thread uses it."""

    def __init__(self, board: Board | None = None, frontend: int = 0) -> None:
        self.board = board or Board.private()
        self._frontend = frontend
        self._rows: dict[tuple[str, str], Row] = {}
        self._latest: dict[str, Row] = {}
        self.board.forget_held(frontend)  # a predecessor that died may have left something

    def open(self, model: ServedModel) -> None:
        """Begin to count, or go on counting, requests of a model's version."""
        row = self.board.row(self._frontend, self.board.slot(model.name, model.version))
        row.lanes = model.lanes
        self._rows[model.name, model.version] = self._latest[model.name] = row

    def row(self, model: ServedModel) -> Row:
        return self._rows[model.name, model.version]

    def latest(self, name: str) -> Row | None:
        """Return where to count what cannot be said of one version; None for a model that never was ready."""
        return self._latest.get(name)

    def hold(self, pool: Pool) -> None:
        """Say what a version's engines hold now."""
        self.row(pool.model).hold(pool.in_flight, pool.free_rows, pool.rows)

    def let_go(self, model: ServedModel) -> None:
        """Say that nothing of a model is held any more."""
        self.row(model).hold(0, 0, 0)

    def all(self) -> Sequence[ModelTotals]:
        """Return the sums over all frontends, of each model."""
        return self.board.totals()

    def of(self, model: ServedModel) -> ModelTotals:
        """Return the sums over all frontends, of one model's version that has been opened."""
        return self.board.totals()[self.board.slot(model.name, model.version)]
