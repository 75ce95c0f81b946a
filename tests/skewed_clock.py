"""Runs a program whose clock is wrong: python skewed_clock.py SECONDS PROGRAM.

Before anything else is imported, `time.time` and `time.time_ns` are shifted; steady clocks are not, and neither is the
file system's, as on a host whose date is wrong.
"""

import runpy
import sys
import time

if __name__ == "__main__":
    skew_s, program = float(sys.argv[1]), sys.argv[2]
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + skew_s
    time.time_ns = lambda: right_ns() + int(skew_s * 1e9)
    sys.argv = sys.argv[2:]
    sys.path[0] = program.rpartition("/")[0]
    runpy.run_path(program, run_name="__main__")
