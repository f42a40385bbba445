"""Objectives: what each role learns. One file a method."""
