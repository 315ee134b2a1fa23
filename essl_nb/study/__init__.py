"""Grids that resume, their results, the front."""
from essl_nb.core.extras import need

need("pandas", extra="study", to="run and read studies")
