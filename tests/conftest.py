"""What every test has: one thread (the machines of tests are small, and float results depend on the count)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch; child processes inherit it
