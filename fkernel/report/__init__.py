"""Tables and pictures, from finished results and from estimates."""

from fkernel.report.estimate import estimate_line, estimate_record, estimate_table
from fkernel.report.pictures import heatmap, predicted_vs_realised
from fkernel.report.table import calibration_table, effects_table

__all__ = [
    "calibration_table",
    "effects_table",
    "estimate_line",
    "estimate_record",
    "estimate_table",
    "heatmap",
    "predicted_vs_realised",
]
