# Tests: test_*.py, each named after what it tests.
# Helpers: toy.py (toy data), bench.py (speed), layouts.py and golden.py (checkpoints), reduction.py (token
# reduction, trained and compared).
