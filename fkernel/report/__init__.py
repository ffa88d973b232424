"""Tables and pictures, from finished results, batches and estimates."""

from fkernel.report.batch import batch_lines, batch_table
from fkernel.report.estimate import estimate_line, estimate_record, estimate_table
from fkernel.report.pictures import heatmap, predicted_vs_realised
from fkernel.report.table import calibration_table, effects_table

__all__ = [
    "batch_lines",
    "batch_table",
    "calibration_table",
    "effects_table",
    "estimate_line",
    "estimate_record",
    "estimate_table",
    "heatmap",
    "predicted_vs_realised",
]
