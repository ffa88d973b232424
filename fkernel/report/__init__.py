"""Tables and pictures, from finished results only."""

from fkernel.report.pictures import heatmap, predicted_vs_realised
from fkernel.report.table import calibration_table, effects_table

__all__ = ["calibration_table", "effects_table", "heatmap", "predicted_vs_realised"]
