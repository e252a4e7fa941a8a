"""Optimizers, parameter groups, learning rate schedules, gradient clipping and EMA weights."""
