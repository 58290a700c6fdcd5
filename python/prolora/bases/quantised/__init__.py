"""Weights of fewer bits: codes and their scales, read as the numbers that they stand for."""
