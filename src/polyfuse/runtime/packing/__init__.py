"""Packing of items into graph replays: which budgets to capture, and which items go into which replay."""

from polyfuse.runtime.packing.planner import plan_packing, suggest_budgets

__all__ = ["plan_packing", "suggest_budgets"]
