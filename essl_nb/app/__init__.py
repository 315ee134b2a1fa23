"""The explorer."""
from essl_nb.core.extras import need

need("gradio", "pandas", "plotly", extra="app", to="show the explorer")
