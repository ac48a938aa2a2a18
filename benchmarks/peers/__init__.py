"""Weights of other libraries beside ours: their files, outputs and architectures; `make peers` runs it.

`architectures` and `golden` run in an environment of their own with torch, timm, transformers and OpenCLIP. The rest
of this folder needs numpy alone, and the tests import it. Nothing is downloaded: all weights are random.
"""
