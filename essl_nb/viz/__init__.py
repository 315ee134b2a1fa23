"""Figures: sound, mixing maps, fronts, curves."""
from essl_nb.core.extras import need

need("plotly", "pandas", extra="study", to="draw figures")
