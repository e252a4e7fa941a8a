"""Composition root: builds the objects of a run from a `RunConfig`, and runs a training session with them.

This module imports nothing, so that a command pays only for the parts it uses.
"""
