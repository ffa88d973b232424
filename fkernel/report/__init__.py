"""Tables and pictures, from finished results, batches and estimates."""

from fkernel.report.accounts import analysis_tables, ledger_table, update_tables
from fkernel.report.batch import batch_lines, batch_table
from fkernel.report.estimate import estimate_line, estimate_record, estimate_table
from fkernel.report.pictures import (
    contributor_bars,
    draw_all,
    heatmap,
    influence_histogram,
    predicted_vs_realised,
    spectrum,
)
from fkernel.report.table import calibration_table, effects_table, influence_table, pair_view, study_lines
from fkernel.report.tokens import token_html, token_table, token_text

__all__ = [
    "analysis_tables",
    "batch_lines",
    "batch_table",
    "calibration_table",
    "contributor_bars",
    "draw_all",
    "effects_table",
    "estimate_line",
    "estimate_record",
    "estimate_table",
    "heatmap",
    "influence_histogram",
    "influence_table",
    "ledger_table",
    "pair_view",
    "predicted_vs_realised",
    "spectrum",
    "study_lines",
    "token_html",
    "token_table",
    "token_text",
    "update_tables",
]
