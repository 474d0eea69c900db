"""Write the pages of docs/ that come from the code: `python -m docs_build`, which `make docs` runs first."""
