"""Measure models on data: losses, answers, programs, agreement."""
