"""Measurements, which `polyfuse bench` and `polyfuse soak` run: of ops, the dispatcher, models and vision encoders.

A measurement is a module, or a package of modules where it has several parts. They share `timing`, which has every loop
that measures time, `results`, which says what every file of results holds, and `subjects`, the models they run.
"""
