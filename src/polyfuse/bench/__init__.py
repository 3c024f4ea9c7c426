"""Measurements of ops, models and encoders; each is one module, and `polyfuse bench` runs them."""
