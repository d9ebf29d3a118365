"""Fit the planner to the runs in its facts and write what it learned.

    python benchmarks/fit_planner.py

Writes src/lascaux/planner/facts/fitted.toml. Run it after a change to the rows, the ledger or the
parts of a step; `lascaux plan scorecard` then says how well it predicts what it has not seen.
"""

from pathlib import Path

from lascaux.planner.fitted import fit_all, to_toml

TABLE = Path(__file__).parents[1] / "src" / "lascaux" / "planner" / "facts" / "fitted.toml"

if __name__ == "__main__":
    TABLE.write_text(to_toml(fit_all()), encoding="utf-8")
    print(TABLE)
