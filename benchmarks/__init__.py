"""Measurements of this project beside others; `README.md` says how to run and read them."""
