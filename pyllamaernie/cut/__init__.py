"""Smaller models without new weights: experts pruned by what they add, layers, experts and neurons sliced off."""
