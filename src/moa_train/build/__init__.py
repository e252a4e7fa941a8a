"""Composition root: from a configuration to the objects of a run, by plain keyword arguments.

Nothing is imported here: a command pays for the parts that it builds.
"""
