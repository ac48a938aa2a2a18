"""A visit to a GPU machine, in parts: `gpu_visit.py` runs them, `visit_kit.py` makes what they take along."""
