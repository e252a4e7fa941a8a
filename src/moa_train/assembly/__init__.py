"""Composition root: build the objects of a run from a `RunConfig`, and run a training session with them.

This module imports nothing, so that each command imports only the parts that it uses.
"""
