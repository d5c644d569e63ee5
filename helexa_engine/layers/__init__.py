"""Layers: what a model file is written in. Each owns its parameters and the ops chosen for them when it is built."""
