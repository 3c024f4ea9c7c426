"""Models under measurement: a base that all share, and a module for each kind of model and for what belongs to it."""
