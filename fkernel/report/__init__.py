"""Tables, pictures and the page, from finished results, batches and estimates."""

from fkernel.report.analysis_tables import ledger_table, request_tables, update_tables
from fkernel.report.batch import batch_lines, batch_table
from fkernel.report.comparisons import (
    counterfactuals_panel,
    observable_panel,
    preconditioners_panel,
    uncertainty_panel,
)
from fkernel.report.estimate import estimate_line, estimate_record, estimate_table, ranks_record, ranks_table
from fkernel.report.forecast import forecast_lines, forecast_record, forecast_table
from fkernel.report.gallery import draw_all
from fkernel.report.heatmaps import covariates_panel, tokens_panel
from fkernel.report.page import load_results, write_page
from fkernel.report.panels import ledger_panel, parts_panel, sweep_panel
from fkernel.report.pictures import contributor_bars, heatmap, influence_histogram, predicted_vs_realised, spectrum
from fkernel.report.replays import (
    recording_lines,
    recording_table,
    replay_lines,
    replay_record,
    replay_table,
)
from fkernel.report.run_gallery import draw_account
from fkernel.report.run_pictures import (
    culprit_bars,
    influence_over_steps,
    parts_timeline,
    rewards_timeline,
    run_heatmap,
    timeline,
)
from fkernel.report.run_shares import ages_table, parts_table
from fkernel.report.run_summary import account_findings, most_of_it
from fkernel.report.run_tables import account_lines, account_table, culprits_table, prompts_table, rewards_table
from fkernel.report.summary import findings, probe_lines, request_lines
from fkernel.report.table import calibration_table, effects_table, influence_table, pair_view, study_lines
from fkernel.report.tokens import token_html, token_table, token_text
from fkernel.report.update_panels import health_panel, structure_panel

__all__ = [
    "account_findings",
    "account_lines",
    "account_table",
    "ages_table",
    "batch_lines",
    "batch_table",
    "calibration_table",
    "contributor_bars",
    "counterfactuals_panel",
    "covariates_panel",
    "culprit_bars",
    "culprits_table",
    "draw_account",
    "draw_all",
    "effects_table",
    "estimate_line",
    "estimate_record",
    "estimate_table",
    "findings",
    "forecast_lines",
    "forecast_record",
    "forecast_table",
    "health_panel",
    "heatmap",
    "influence_histogram",
    "influence_over_steps",
    "influence_table",
    "ledger_panel",
    "ledger_table",
    "load_results",
    "most_of_it",
    "observable_panel",
    "pair_view",
    "parts_panel",
    "parts_table",
    "parts_timeline",
    "preconditioners_panel",
    "predicted_vs_realised",
    "probe_lines",
    "prompts_table",
    "ranks_record",
    "ranks_table",
    "recording_lines",
    "recording_table",
    "replay_lines",
    "replay_record",
    "replay_table",
    "request_lines",
    "request_tables",
    "rewards_table",
    "rewards_timeline",
    "run_heatmap",
    "spectrum",
    "structure_panel",
    "study_lines",
    "sweep_panel",
    "timeline",
    "token_html",
    "token_table",
    "token_text",
    "tokens_panel",
    "uncertainty_panel",
    "update_tables",
    "write_page",
]
