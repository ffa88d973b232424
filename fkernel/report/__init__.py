"""Tables and pictures, from finished results, batches and estimates."""

from fkernel.report.analysis_tables import ledger_table, request_tables, update_tables
from fkernel.report.batch import batch_lines, batch_table
from fkernel.report.comparisons import (
    counterfactuals_panel,
    observable_panel,
    preconditioners_panel,
    uncertainty_panel,
)
from fkernel.report.estimate import estimate_line, estimate_record, estimate_table
from fkernel.report.forecast import forecast_lines, forecast_record, forecast_table
from fkernel.report.gallery import draw_all
from fkernel.report.heatmaps import covariates_panel, tokens_panel
from fkernel.report.panels import ledger_panel, parts_panel, sweep_panel
from fkernel.report.pictures import contributor_bars, heatmap, influence_histogram, predicted_vs_realised, spectrum
from fkernel.report.table import calibration_table, effects_table, influence_table, pair_view, study_lines
from fkernel.report.tokens import token_html, token_table, token_text
from fkernel.report.update_panels import health_panel, structure_panel

__all__ = [
    "batch_lines",
    "batch_table",
    "calibration_table",
    "contributor_bars",
    "counterfactuals_panel",
    "covariates_panel",
    "draw_all",
    "effects_table",
    "estimate_line",
    "estimate_record",
    "estimate_table",
    "forecast_lines",
    "forecast_record",
    "forecast_table",
    "health_panel",
    "heatmap",
    "influence_histogram",
    "influence_table",
    "ledger_panel",
    "ledger_table",
    "observable_panel",
    "pair_view",
    "parts_panel",
    "preconditioners_panel",
    "predicted_vs_realised",
    "request_tables",
    "spectrum",
    "structure_panel",
    "study_lines",
    "sweep_panel",
    "token_html",
    "token_table",
    "token_text",
    "tokens_panel",
    "uncertainty_panel",
    "update_tables",
]
