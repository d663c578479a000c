# Tests: test_*.py, each named after what it claims.
# Helpers: toy.py (toy data), bench.py (speed), layouts.py and golden.py (checkpoints), reduction.py (a study).
