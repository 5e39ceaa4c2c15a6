"""Stepwise DPO: preference alignment with a moving reference (arXiv 2403.19270)."""
