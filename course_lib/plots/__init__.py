"""Figures: pure functions of data that return a matplotlib `Figure`, in one style."""
